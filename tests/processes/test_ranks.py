"""The ranks of a run: started by whatever starter, they are one run or none, and none waits for one that is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sslzoo.exits import ExitCode
from sslzoo.processes import rendezvous
from sslzoo.testing.kills import digest_of
from sslzoo.testing.ranks import free_port
from tests.command import (
    Command,
    codes,
    fork,
    group,
    manifest,
    shell,
    srun_variables,
    until,
    write_recipe,
)

TWO = "trainer.devices=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies, with a finished run ``whole`` of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_recipe(folder)
    assert codes(_start(folder, "whole")) == [0, 0]
    return folder


def _start(folder: Path, run: str, *more: str, recipe: object = "tiny.yaml", **options: Any) -> list[Command]:
    return group(folder, "fit", "--recipe", recipe, "--out", run, *more, TWO, **options)


def _is_one_run(folder: Path, run: str) -> None:
    """Of two ranks that shared each batch, as ``whole``."""
    assert manifest(folder / run)["world_size"] == 2
    assert digest_of(folder / run) == digest_of(folder / "whole")


# -- started by ------------------------------------------------------------------------------------------

# What each rank of torchrun inherits inside a job: SLURM describes the agent, not the rank.
INSIDE_A_JOB = {k: v for k, v in srun_variables(0, 1, "0").items() if k != "MASTER_PORT"}


def test_torchrun_inside_a_slurm_job_is_one_run(folder: Path) -> None:
    assert codes(_start(folder, "torchrun", environment=INSIDE_A_JOB)) == [0, 0]
    _is_one_run(folder, "torchrun")


def test_srun_is_one_run(folder: Path) -> None:
    assert codes(_start(folder, "srun", starter="srun")) == [0, 0]
    _is_one_run(folder, "srun")


@pytest.mark.slow
def test_plain_fit_in_a_batch_script_starts_its_own_ranks(folder: Path) -> None:
    batch = INSIDE_A_JOB | {"SLURM_NTASKS": "2"}
    del batch["SLURM_STEP_ID"], batch["SLURM_STEP_NUM_TASKS"]
    command = shell(folder, "fit", "--recipe", "tiny.yaml", TWO, environment=batch)
    assert command.wait(120) == 0, command.said
    _is_one_run(folder, "runs/tiny/slurm-4711")
    assert (folder / "runs/tiny/slurm-4711/logs/rank-1.log").exists()


@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_another_number_of_processes_than_planned_is_refused(starter: str, folder: Path) -> None:
    ranks = group(folder, "fit", "--recipe", "tiny.yaml", "--out", f"alone-{starter}", starter=starter)
    assert codes(ranks) == [ExitCode.USAGE] * 2
    assert ranks[0].err.startswith(f"sslzoo fit: {starter} started 2 process(es), but"), ranks[0].said
    assert "set trainer.devices=2 trainer.num_nodes=1" in ranks[0].err
    assert not (folder / f"alone-{starter}").exists()


def test_several_machines_that_nobody_connects_are_refused_at_once(folder: Path) -> None:
    command = fork(folder, "fit", "--recipe", "tiny.yaml", TWO, "trainer.num_nodes=2")
    assert command.wait() == ExitCode.USAGE
    assert len(command.err.splitlines()) == 1
    assert "torchrun --nnodes 2 --nproc-per-node 2" in command.err and "srun" in command.err, command.said


# -- together or not at all --------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_comes_late_is_waited_for_and_named(
    late: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "SPEAK", 0.5)
    run = f"late-{late}"
    ranks = _start(folder, run, delays=[2.5 * (r == late) for r in range(2)])
    assert codes(ranks) == [0, 0], [r.said for r in ranks]
    _is_one_run(folder, run)
    if late == 1:
        assert "warning: waiting for the other processes (ranks 1) for " in ranks[0].err, ranks[0].said
    else:
        assert "waiting for rank 0 at 127.0.0.1:" in (folder / run / "logs" / "rank-1.log").read_text()


def test_a_rank_that_never_comes_ends_the_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SPEAK", 0.5)
    monkeypatch.setattr(rendezvous, "JOIN", 2.0)
    ranks = _start(folder, "never", delays=[0, 100])
    assert ranks[0].wait(20) == ExitCode.USAGE, ranks[0].said
    assert "sslzoo fit: waited 0 minutes for the other processes" in ranks[0].err
    os.kill(ranks[1].pid, 9)
    ranks[1].wait()
    assert not (folder / "never").exists()


def test_what_is_wrong_on_one_rank_alone_stops_all_in_one_line(folder: Path, tmp_path: Path) -> None:
    """The second machine lacks the images."""
    recipe = tmp_path / "there.yaml"
    images = str(folder / "images")
    recipe.write_text((folder / "tiny.yaml").read_text().replace(images, f'"${{oc.env:IMAGES,{images}}}"'))
    elsewhere = {"IMAGES": str(tmp_path / "nothing")}
    ranks = _start(folder, "there", recipe=recipe, by_rank=[{}, elsewhere])
    assert codes(ranks) == [ExitCode.USAGE] * 2, [r.said for r in ranks]
    (line,) = ranks[0].err.splitlines()
    assert line.startswith("sslzoo fit: rank 1 on ") and "cannot open fashion_mnist" in line
    assert not ranks[1].err
    assert not (folder / "there").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_in_the_evaluation_does_not_leave_the_others_waiting(
    failing: int, folder: Path
) -> None:
    run = f"evaluation-{failing}"
    ranks = _start(folder, run, faults={"raise_in_evaluation": failing})
    start = time.monotonic()
    assert codes(ranks) == [ExitCode.FAILURE] * 2, [r.said for r in ranks]
    assert time.monotonic() - start < 20
    error = manifest(folder / run)["error"]
    assert (error["rank"], error["message"]) == (failing, "RuntimeError: this rank cannot evaluate")
    assert ranks[0].err.count("Traceback (most recent call last)") == 1 and not ranks[1].err


def test_a_rank_stuck_with_one_that_failed_is_ended(folder: Path) -> None:
    """Rank 0 would wait for the other in a collective: the group has a timeout of ten minutes."""
    run = "stuck"
    ranks = _start(folder, run, faults={"hang_in_evaluation": 1, "raise_in_evaluation": 0})
    start = time.monotonic()
    assert codes(ranks, 30) == [ExitCode.FAILURE] * 2, [r.said for r in ranks]
    assert time.monotonic() - start < 20
    assert manifest(folder / run)["error"]["message"] == "RuntimeError: this rank cannot evaluate"


# -- several machines ----------------------------------------------------------------------------------------


def _agent(folder: Path, node: int, port: int, run: Path, *, hidden: Path | None = None) -> Command:
    """torchrun as started on machine ``node`` of two; ``hidden`` is a folder that this machine has not."""
    torchrun = (
        *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "sslzoo"),
    )
    arguments = (
        "fit",
        "--recipe",
        folder / "tiny.yaml",
        "--out",
        run,
        "--resume",
        "auto",
        "trainer.num_nodes=2",
    )
    command = [sys.executable, *torchrun, *map(str, arguments)]
    if hidden is not None:
        mounted = f'mount -t tmpfs none "{hidden}" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mounted, "sh", *command]
    name = f"node{node}"
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "FAULTS": "{}"}
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        process = subprocess.Popen(command, cwd=folder, env=kept | environment, stdout=out, stderr=err)
    return Command(folder, name, process)


def _can_unshare() -> bool:
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.slow  # six starts of Python with torch
def test_two_machines_are_one_run_and_need_one_directory(folder: Path, tmp_path: Path) -> None:
    """Two torchrun agents on loopback. On the second machine the run directory is empty: it says so, and both leave."""
    run = tmp_path / "shared" / "run"
    port = free_port()
    nodes = [_agent(folder, n, port, run) for n in range(2)]
    assert [n.wait(180) for n in nodes] == [0, 0], [n.said for n in nodes]
    _is_one_run(folder, str(run))
    if not _can_unshare():
        pytest.skip("mounting needs a privilege that this machine refuses")
    for path in sorted((run / "checkpoints").glob("step=*"))[1:]:
        path.unlink()  # something is left to do
    port = free_port()
    nodes = [_agent(folder, n, port, run, hidden=tmp_path / "shared" if n else None) for n in range(2)]
    ended = [n.wait(180) for n in nodes]
    assert all(code != 0 for code in ended), [n.said for n in nodes]
    said = [line for line in nodes[0].err.splitlines() if line.startswith("sslzoo fit:")]
    assert len(said) == 1 and "rank 1 on" in said[0] and "cannot read" in said[0], nodes[0].said
    assert "must be on a file system that all machines share" in said[0]


@pytest.mark.slow  # four starts of Python with torch
@pytest.mark.parametrize("out", [[], ["--out", "restarted"]], ids=["new directory", "named"])
def test_torchrun_restarts_failed_ranks_and_the_run_continues(out: list[str], folder: Path) -> None:
    agent = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "sslzoo")
    arguments = (*agent, "fit", "--recipe", "tiny.yaml", *out, TWO)
    faults = {"raise_once_at": [1, 8]}
    command = shell(folder, *arguments, faults=faults, module="torch.distributed.run", name="restart")
    assert command.wait(180) == 0, command.said
    assert "continuing from" in command.out and "step=000000008.ckpt" in command.out
    (run,) = [folder / "restarted"] if out else (folder / "runs" / "tiny").glob("torchrun-*")
    _is_one_run(folder, str(run.relative_to(folder)))
    assert [start["exit_code"] for start in manifest(run)["sessions"]] == [1, 0]


@pytest.mark.slow  # ten seconds of waiting
def test_one_of_two_machines_says_how_to_start_the_other(folder: Path) -> None:
    port = str(free_port())
    here = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = shell(folder, "fit", "--recipe", "tiny.yaml", "trainer.num_nodes=2", environment=here)
    assert until(lambda: "waiting" in command.err or command.ended, 120)
    command.signal(15)
    command.wait(60)
    said = f"start the same command with MASTER_ADDR=127.0.0.1 MASTER_PORT={port} and NODE_RANK=1"
    assert "waiting for the other processes (ranks 1: " in command.err and said in command.err
