"""Build the ``lightning.Trainer`` from a recipe's ``trainer`` section."""

from __future__ import annotations

import atexit
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from sslzoo.checkpoints import AtomicCheckpointIO
from sslzoo.checks import require
from sslzoo.nn.batchnorm import LayerSync
from sslzoo.processes.placement import ALONE, Placement
from sslzoo.processes.rendezvous import connect
from sslzoo.recipe.trainer_keys import FP16, check_precision, stated_devices

# Timeout of collectives, after which a hanging rank ends the run (torch's default is 30 minutes). Long enough for
# one rank to evaluate or write a checkpoint while the others wait.
TIMEOUT = timedelta(minutes=10)
# Lightning warnings that do not apply here, and a deprecation in Lightning's own use of torch.
_IRRELEVANT = (
    "isinstance.treespec, LeafSpec",
    "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler resumes mid-epoch
    "does not have many workers",  # data in memory need none
    "is smaller than the logging interval",  # Meter has its own interval
)


class NoProfiler(PassThroughProfiler):
    """Like Lightning's default profiler, which measures nothing, but without its overhead of one generator per action.

    :meth:`profile` only returns a context manager: it is no decorator and yields None.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """A context that does nothing."""
        return self._nothing


class PlacedEnvironment(ClusterEnvironment):
    """Gives Lightning the ranks found by :mod:`sslzoo.processes.placement` instead of letting it detect them."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self._placement = placement

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning must not start processes, because all ranks are running already."""
        return True

    @property
    def main_address(self) -> str:
        """Address of rank 0."""
        return self._placement.address

    @property
    def main_port(self) -> int:
        """Port of the rendezvous."""
        return self._placement.port

    @staticmethod
    def detect() -> bool:
        """False: this environment is passed explicitly and never auto-detected."""
        return False

    def world_size(self) -> int:
        """Number of processes in the run."""
        return self._placement.world_size

    def set_world_size(self, size: int) -> None:
        """Do nothing; the number of processes was checked against the recipe before."""
        assert size == self._placement.world_size

    def global_rank(self) -> int:
        """Rank of this process among all."""
        return self._placement.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: Lightning would set the rank that it derives from node and local rank."""

    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return self._placement.local_rank

    def node_rank(self) -> int:
        """Index of this machine."""
        return self._placement.node_rank


class PlacedDDP(DDPStrategy):
    """DDP that also starts after torchrun has restarted the ranks.

    The ranks of all attempts share the store of torchrun's agent. Torch 2.14 uses the same keys in each of them, and
    hangs on those of the attempt before; here, keys carry the attempt.
    """

    def __init__(self, placement: Placement, **options: Any) -> None:
        super().__init__(**options)
        self._placement = placement

    def setup_distributed(self) -> None:
        """Create the process group, which Lightning then finds."""
        place = self._placement
        if place.attempt > 0:
            backend = self._get_process_group_backend()
            dist.init_process_group(
                backend,
                store=connect(place, "group"),
                rank=place.rank,
                world_size=place.world_size,
                timeout=TIMEOUT,
                device_id=None if self.root_device.type == "cpu" else self.root_device,
            )
            if backend == "nccl":  # as Lightning does: torch warns about groups that are left
                atexit.register(dist.destroy_process_group)
        super().setup_distributed()


def build_strategy(trainer: Mapping[str, Any], placement: Placement) -> DDPStrategy | str:
    """``auto`` for one process, DDP (gloo on CPUs, NCCL on GPUs) for several.

    Buffers are not broadcast at every step: queues are equal on all ranks anyway, and
    ``BroadcastBatchNormStats`` broadcasts batch-norm statistics before validation.
    """
    name = trainer.get("strategy", "auto")
    if placement.world_size == 1:
        return "auto"
    # Renamed in torch 2.14, where the old name raises a warning.
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return PlacedDDP(
        placement,
        **options,
        gradient_as_bucket_view=True,
        find_unused_parameters=name.endswith("_true"),
        timeout=TIMEOUT,
    )


def check_device(trainer: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if this machine lacks the devices that the recipe's ``trainer`` section asks for, or cannot
    compute in ``trainer.precision``."""
    wanted, devices = trainer.get("accelerator", "auto"), stated_devices(trainer.get("devices", "auto"))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = {"cpu": True, "cuda": cuda, "mps": mps}.get(wanted, cuda or mps)
    half = trainer.get("precision") in FP16
    if not here and wanted != "auto":
        changes = ["trainer.accelerator=cpu"]
        changes += ["trainer.devices=1"] if devices not in (None, 1) else []
        changes += ["trainer.precision=bf16-mixed"] if half else []
        what = "GPU" if wanted == "gpu" else f"device for trainer.accelerator={wanted}"
        raise ValueError(
            f"this machine has no {what} that torch can use (sslzoo doctor says why); to use its CPU, add "
            f"{' '.join(changes)}"
        )
    if wanted == "cpu" or not here:
        check_precision(trainer)
    elif cuda and devices is not None and wanted != "mps":
        count = torch.cuda.device_count()
        require(
            devices <= count,
            f"trainer.devices={trainer['devices']} asks for {devices} GPUs, and this machine has {count}; set "
            f"trainer.devices={count}",
        )


def build_trainer(
    trainer: Mapping[str, Any],
    *,
    run_dir: Path,
    callbacks: Sequence[Callback],
    placement: Placement = ALONE,
) -> Trainer:
    """Build the Trainer from the recipe's ``trainer`` section, with those Lightning features disabled that
    would break exact resume or that the framework replaces.

    Raises ``ValueError`` if this machine lacks what the section asks for.
    """
    check_device(trainer)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its greetings and tips
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message=f".*{message}")
    plugins: list[Any] = [AtomicCheckpointIO(), PlacedEnvironment(placement)]
    if trainer.get("sync_batchnorm", False):
        plugins.append(LayerSync())
    options = {
        "profiler": NoProfiler(),
        **trainer,
        "strategy": build_strategy(trainer, placement),
        "plugins": plugins,
        "callbacks": list(callbacks),
        "logger": False,  # set once the run directory exists
        "default_root_dir": str(run_dir),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    try:
        return Trainer(**options)
    except MisconfigurationException as error:
        raise ValueError(
            f"{error} Check trainer.accelerator={trainer.get('accelerator', 'auto')} and "
            f"trainer.devices={trainer.get('devices', 'auto')}; sslzoo doctor shows what this machine has"
        ) from error
