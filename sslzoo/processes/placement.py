"""Rank and world size of this process, read from the environment before a process group exists.

Importable without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sslzoo.checks import require
from sslzoo.recipe.sections import Recipe

LAUNCHER_FOLDER = "SSLZOO_LAUNCHER_FOLDER"  # set by sslzoo's own launcher for the ranks that it starts
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SPECIAL_STEPS = 0xFFFFFFF0  # SLURM step ids from here on are batch scripts and interactive steps


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rank, world size and address of this process within the run."""

    starter: str = "alone"  # what started it: alone, sslzoo (its own launcher), torchrun or srun
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    per_node: int = 1  # processes per machine
    address: str = "127.0.0.1"  # of rank 0
    port: int = 0
    attempt: int = 0  # number of restarts by torchrun, which restarts a failed group

    @property
    def is_leader(self) -> bool:
        """Whether this is global rank 0."""
        return self.rank == 0


ALONE = Placement()


def place(environ: Mapping[str, str] = os.environ) -> Placement:
    """Read the placement from the variables of torchrun, otherwise of srun; without either the process is alone.

    torchrun's variables take precedence over SLURM's, which describe its agent in a SLURM job. A batch
    script has SLURM's variables too, but only steps started by srun have several tasks.
    """
    if all(name in environ for name in _TORCHRUN):
        return Placement(
            starter="sslzoo" if LAUNCHER_FOLDER in environ else "torchrun",
            rank=int(environ["RANK"]),
            local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
            node_rank=int(environ.get("GROUP_RANK", environ.get("NODE_RANK", "0"))),
            world_size=int(environ["WORLD_SIZE"]),
            per_node=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    tasks = _srun_tasks(environ)
    if tasks == 1:
        return ALONE
    nodes = (
        environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ["SLURM_JOB_NODELIST"]
    )
    # Two steps of the same job need different ports.
    port = 15000 + (int(environ["SLURM_JOB_ID"]) + 101 * int(environ["SLURM_STEP_ID"])) % 10000
    count = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or "1")
    return Placement(
        starter="srun",
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        node_rank=int(environ.get("SLURM_NODEID", "0")),
        world_size=tasks,
        per_node=tasks // count,
        address=environ.get("MASTER_ADDR") or first_node(nodes),
        port=int(environ.get("MASTER_PORT") or port),
    )


def _srun_tasks(environ: Mapping[str, str]) -> int:
    if not 0 <= int(environ.get("SLURM_STEP_ID", "-1")) < SPECIAL_STEPS:
        return 1
    return int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1")


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu003`` for ``gpu[003-007,12],login``."""
    return re.split(r"[,\s]", re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes))[0]


def devices_per_node(recipe: Recipe) -> int:
    """Number of processes per machine. Imports torch only if it depends on the number of GPUs."""
    if recipe.devices is not None:
        return recipe.devices
    import torch

    return max(torch.cuda.device_count(), 1) if torch.cuda.is_available() else 1


def world_size_of(recipe: Recipe) -> int:
    """Number of processes in the whole run."""
    return devices_per_node(recipe) * recipe.nodes


def processes_here(recipe: Recipe) -> int:
    """Number of processes on this machine for what may use any number: one per device that the recipe asks for, but
    not more than there are GPUs."""
    processes = devices_per_node(recipe)
    if processes == 1 or recipe.trainer.get("accelerator") == "cpu":
        return processes
    import torch

    return min(processes, max(torch.cuda.device_count(), 1))


def check_world_size(placement: Placement, recipe: Recipe) -> None:
    """Raise ``ValueError`` if the number of processes differs from the recipe's.

    Otherwise the shares of the processes would not add up to the global batch.
    """
    devices, planned = devices_per_node(recipe), world_size_of(recipe)
    nodes = max(placement.world_size // max(placement.per_node, 1), 1)
    per_node = "" if nodes == recipe.nodes == 1 else f", {placement.per_node} on each of {nodes} machine(s)"
    require(
        (placement.per_node, placement.world_size) == (devices, planned),
        f"{placement.starter} started {placement.world_size} process(es){per_node}, but trainer.devices={devices} x "
        f"trainer.num_nodes={recipe.nodes} in the recipe is {planned}; set trainer.devices={placement.per_node} "
        f"trainer.num_nodes={nodes}, or start {planned}",
    )
