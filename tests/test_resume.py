"""A killed run that resumes ends bit-equal to the one never killed; a signalled one leaves in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sslzoo.callbacks.checkpoint import checkpoints, latest
from sslzoo.exits import ExitCode
from sslzoo.registry import methods
from tests.chaos import Fault, Job, Outcome, digest_of, output, run, start, wait

JOBS = {
    "one": Job(),
    "one-accumulate": Job(accumulate=2),
    "two": Job(world=2),
    "two-accumulate": Job(world=2, accumulate=2),
}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """``undisturbed(job)``: the outcome of the job never killed, trained once."""

    @cache
    def outcome(job: Job) -> Outcome:
        return run(job, tmp_path_factory.mktemp("undisturbed"))

    return outcome


def _same(resumed: Outcome, whole: Outcome) -> None:
    assert resumed.digest == whole.digest
    assert resumed.metrics == whole.metrics


def _faults(accumulate: int) -> tuple[Fault, ...]:
    """Six steps an epoch, three epochs. In the middle of an epoch and of a window; while validating; at
    the epoch's end; at the first micro-batch of an epoch, before the save is resumed from; in a write."""
    return (
        Fault("batch", 4 * accumulate + accumulate - 1),
        Fault("validation", 6 * accumulate),
        Fault("epoch_end", 6 * accumulate),
        Fault("write", 2),
        Fault("start", 12 * accumulate),
        Fault("batch", 18 * accumulate),
    )


@pytest.mark.parametrize("name", JOBS)
def test_a_run_killed_six_times_equals_the_run_never_killed(name, tmp_path, undisturbed):
    job = JOBS[name]
    resumed = run(job, tmp_path, _faults(job.accumulate))
    assert resumed.sessions == 7
    _same(resumed, undisturbed(job))


@pytest.mark.parametrize("name", ["one", "two"])
def test_kills_at_random_moments(name, tmp_path, undisturbed):
    job = JOBS[name]
    slowed = Job(world=job.world, pause=0.15)
    resumed = run(slowed, tmp_path, random_kills=6, seed=5)
    assert sum(-signal.SIGKILL in codes for codes in resumed.codes) >= 5
    _same(resumed, undisturbed(job))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", [f"{method}_fashion_mnist" for method in methods()])
def test_bundled_recipes_survive_kills(recipe, world, tmp_path):
    job = Job(recipe=recipe, world=world, samples=80, overrides=(*_FEW, *_SMALL.get(recipe, ())))
    whole = run(job, tmp_path / "whole")
    faults = [
        Fault("batch", 3),
        Fault("validation", 5),
        Fault("write", 2),
        Fault("batch", 8),
        Fault("start", 11),
    ]
    _same(run(job, tmp_path / "killed", faults), whole)


_FEW = ("logging.every_steps=2", "logging.checkpoint_every_steps=2", "eval.every_epochs=1", "eval.size=20")
_SMALL = {"sce_fashion_mnist": ("method.queue_size=64",)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", JOBS)
def test_many_random_kills(name, seed, tmp_path, undisturbed):
    job = JOBS[name]
    slowed = Job(world=job.world, accumulate=job.accumulate, pause=0.02)
    _same(run(slowed, tmp_path, random_kills=8, seed=seed), undisturbed(job))


# -- signals ----------------------------------------------------------------------------------


def _wait_for_a_save(processes: list[Any], folder: Path) -> None:
    while latest(folder / "checkpoints") is None and all(p.is_alive() for p in processes):
        time.sleep(0.01)


def _signalled(job: Job, folder: Path, number: int, ranks: list[int]) -> list[int | None]:
    """Exit codes after ``number`` was sent to ``ranks`` once the run had saved something."""
    processes = start(job, folder)
    _wait_for_a_save(processes, folder)
    for rank in ranks:
        os.kill(processes[rank].pid, number)
    return wait(processes, 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [("one", [0]), ("one-accumulate", [0]), ("two", [0]), ("two", [1]), ("two", [0, 1])],
    ids=str,
)
def test_a_signal_saves_leaves_and_resumes_exactly(number, name, ranks, tmp_path, undisturbed):
    job = JOBS[name]
    slowed = Job(world=job.world, accumulate=job.accumulate, pause=0.06)
    codes = _signalled(slowed, tmp_path, number, ranks)
    assert codes == [ExitCode.PREEMPTED] * job.world, output(tmp_path)
    saved = latest(tmp_path / "checkpoints")
    assert saved is not None and saved.name < "step=000000018.ckpt"
    _same(run(job, tmp_path), undisturbed(job))


def test_one_process_saves_at_the_step_of_the_signal(tmp_path):
    # Checkpoints come at 3, at 5 before the evaluation, and at 6; the signal makes one of its own at once.
    processes = start(Job(pause=0.15), tmp_path)
    _wait_for_a_save(processes, tmp_path)
    time.sleep(0.2)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert wait(processes) == [ExitCode.PREEMPTED]
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")][-1] in {
        f"step={step:09d}.ckpt" for step in (4, 5)
    }


@pytest.mark.slow  # four imports of torch
def test_torchrun_forwards_the_signal_and_does_not_hang(tmp_path, undisturbed):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.chaos import Job, fit\n"
        "torch.set_num_threads(1)\n"
        "fit(Job(world=2, pause=float(sys.argv[2])), Path(sys.argv[1]), None)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    folder = tmp_path / "run"
    first = subprocess.Popen(
        [*command, str(folder), "0.1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 90
    while latest(folder / "checkpoints") is None and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=30)
    assert first.returncode != 0
    saved = latest(folder / "checkpoints")
    assert saved is not None and saved.name < "step=000000018.ckpt", said.decode()
    subprocess.run([*command, str(folder), "0"], env=environment, check=True, timeout=90, capture_output=True)
    assert digest_of(folder) == undisturbed(JOBS["two"]).digest
    assert (folder / "metrics.csv").read_text() == undisturbed(JOBS["two"]).metrics
