"""Which rank a process is, by the environment that each launcher makes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sslzoo.processes.placement import ALONE, Placement, check_world_size, first_node, place, world_size_of
from sslzoo.processes.rendezvous import missing_ranks
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.sections import Recipe
from tests.command import srun_variables, torchrun_variables

TORCHRUN = torchrun_variables(3, 8, "29500") | {"LOCAL_RANK": "1", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = srun_variables(3, 8, "12345") | {
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# What a batch script sees: the job's number of tasks, and no step.
BATCH = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "gpu[01-02]"}


def test_torchrun_and_srun_are_told_apart() -> None:
    assert place({}) == ALONE
    torchrun = Placement(
        starter="torchrun", rank=3, local_rank=1, node_rank=1, world_size=8, per_node=2, port=29500
    )
    assert place(TORCHRUN) == torchrun
    assert place(SRUN | TORCHRUN) == torchrun  # one agent per node, started by srun
    srun = place(SRUN)
    assert (srun.starter, srun.rank, srun.world_size, srun.per_node) == ("srun", 3, 8, 2)
    assert (srun.address, srun.port, srun.node_rank, srun.local_rank) == ("127.0.0.1", 12345, 1, 1)


@pytest.mark.parametrize(
    "environment",
    [
        BATCH,
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun with one task
        BATCH | {"SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        BATCH | {"SLURM_STEP_ID": "4294967291"},  # the batch step itself
        {"RANK": "1"},  # left over from something else
    ],
)
def test_a_batch_script_is_no_rank(environment: dict[str, str]) -> None:
    assert place(environment) == ALONE


def test_two_steps_of_a_job_meet_at_different_ports() -> None:
    steps = [srun_variables(0, 2, "") | {"SLURM_STEP_ID": str(step)} for step in (0, 1)]
    ports = {place(step).port for step in steps}
    assert len(ports) == 2 and all(15000 <= port < 25000 for port in ports)
    assert place(srun_variables(1, 2, "") | {"SLURM_STEP_ID": "0"}).port == place(steps[0]).port


def test_the_first_node_of_a_list() -> None:
    for nodes in ("gpu003", "gpu[003-007,12]", "gpu003,login", "gpu003 gpu004", "gpu[003,9],cpu[1-2]"):
        assert first_node(nodes) == "gpu003"


def _on(*trainer: str) -> Recipe:
    return load_recipe(
        "quickstart", ["data.global_batch_size=96", *(f"trainer.{key}" for key in trainer)]
    ).recipe


def test_the_number_of_processes_must_be_the_planned_one() -> None:
    assert world_size_of(_on("devices=[0,1,3]", "num_nodes=2")) == 6
    assert world_size_of(_on("devices='0,1'")) == 2
    assert world_size_of(_on("devices=auto", "accelerator=cpu")) == 1
    check_world_size(place(TORCHRUN), _on("devices=2", "num_nodes=4"))
    with pytest.raises(
        ValueError, match=r"torchrun started 8 process.* is 1; set trainer\.devices=2 trainer\.num_nodes=4"
    ):
        check_world_size(place(TORCHRUN), _on("devices=1"))
    with pytest.raises(
        ValueError, match=r"8 process\(es\), 2 on each of 4 machine\(s\), but trainer.devices=4 x"
    ):
        check_world_size(place(TORCHRUN), _on("devices=4", "num_nodes=2"))


def test_missing_machines_are_told_how_to_join() -> None:
    own = Placement(starter="sslzoo", world_size=6, per_node=2, address="gpu1", port=29500)
    said = missing_ranks(own, [3, 4, 5])
    assert said == (
        "ranks 3, 4, 5: start the same command with MASTER_ADDR=gpu1 MASTER_PORT=29500 and NODE_RANK=2 on the "
        "other machines"
    )
    assert missing_ranks(own, [1]) == "ranks 1"
    assert missing_ranks(replace(own, starter="srun"), [2, 3, 4, 5]) == "ranks 2, 3, 4, 5"
