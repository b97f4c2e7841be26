"""A run that is asked to leave, wherever it stands: it leaves within about a second, with 75, and loses nothing."""

from __future__ import annotations

import json
import os
import pty
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslzoo.exits import LEAVE_SIGNALS, ExitCode
from sslzoo.launch import launcher
from sslzoo.testing.kills import digest_of
from tests.command import (
    STEPS,
    Command,
    children,
    codes,
    fork,
    group,
    manifest,
    saved,
    shell,
    short_evaluation,
    until,
    write_recipe,
)

PROMPT = 3.0  # seconds to leave in; one is meant, two cores may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies, with a finished run ``one`` and another ``two`` of two ranks, never disturbed."""
    folder = tmp_path_factory.mktemp("leaving")
    write_recipe(folder)
    assert _start(folder, "one", 1)[0].wait() == 0
    assert codes(_start(folder, "two", 2)) == [0, 0]
    return folder


def _start(folder: Path, name: str, world: int, *more: str, **options) -> list[Command]:
    arguments = ("fit", "--recipe", "tiny.yaml", "--out", name, *more)
    if world == 1:
        return [fork(folder, *arguments, **options)]
    return group(folder, *arguments, "trainer.devices=2", world=world, **options)


def _ends_like(folder: Path, name: str, world: int) -> None:
    """Continued, the run ends as the one never disturbed."""
    assert codes(_start(folder, name, world, "--resume", "auto")) == [0] * world
    whole = folder / {1: "one", 2: "two"}[world]
    assert digest_of(folder / name) == digest_of(whole)
    assert (folder / name / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.parametrize("number", LEAVE_SIGNALS, ids=lambda n: n.name)
def test_every_signal_of_schedulers_saves_and_leaves(number: signal.Signals, folder: Path) -> None:
    name = f"by-{number.name}"
    (run,) = _start(folder, name, 1, faults={"pause": 0.15})
    assert until(lambda: run.ended or saved(folder / name)), run.said
    run.signal(number)
    assert run.wait() == ExitCode.PREEMPTED, run.said
    assert (
        manifest(folder / name)["error"]["message"]
        == f"{number.name}: saved at step {saved(folder / name)[-1]}"
    )
    _ends_like(folder, name, 1)


@pytest.mark.parametrize("signalled", [[0], [1], [0, 1]], ids=["leader", "other", "both"])
def test_two_ranks_save_at_one_step(signalled: list[int], folder: Path) -> None:
    name = f"two-{len(signalled)}-{signalled[0]}"
    ranks = _start(folder, name, 2, faults={"pause": 0.05})
    assert until(lambda: ranks[0].ended or saved(folder / name)), ranks[0].said
    for r in signalled:
        ranks[r].signal(signal.SIGTERM)
    start = time.monotonic()
    assert codes(ranks) == [ExitCode.PREEMPTED] * 2, [r.said for r in ranks]
    assert time.monotonic() - start < PROMPT
    assert manifest(folder / name)["exit_code"] == ExitCode.PREEMPTED
    _ends_like(folder, name, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_in_a_validation_it_leaves_at_once_and_loses_one_step(world: int, folder: Path) -> None:
    name = f"validation-{world}"
    ranks = _start(folder, name, world, faults={"evaluation_pause": 1.0})
    assert until(lambda: ranks[0].ended or STEPS - 1 in saved(folder / name)), ranks[0].said
    time.sleep(0.8)  # the last step of the epoch takes a few milliseconds
    ranks[-1].signal(signal.SIGTERM)
    start = time.monotonic()
    assert codes(ranks) == [ExitCode.PREEMPTED] * world, [r.said for r in ranks]
    assert time.monotonic() - start < PROMPT
    assert manifest(folder / name)["error"]["message"] == "SIGTERM while evaluating"
    assert saved(folder / name)[-1] == STEPS - 1
    _ends_like(folder, name, world)


@pytest.mark.parametrize("world", [1, 2])
def test_in_the_final_evaluation_it_leaves_at_once(world: int, folder: Path) -> None:
    """What it finds when it continues is what the undisturbed run found."""
    name, changes = f"final-{world}", ("eval.baselines=true", "eval.every_epochs=3")
    ranks = _start(folder, name, world, *changes, faults={"evaluation_pause": 0.4}, before=short_evaluation)
    assert until(lambda: ranks[0].ended or 3 * STEPS in saved(folder / name)), ranks[0].said
    time.sleep(0.3)
    ranks[-1].signal(signal.SIGUSR2)
    start = time.monotonic()
    assert codes(ranks) == [ExitCode.PREEMPTED] * world, [r.said for r in ranks]
    assert time.monotonic() - start < PROMPT
    assert not (folder / name / "eval" / "summary.json").exists()
    short = {"before": short_evaluation}
    assert codes(_start(folder, name, world, "--resume", "auto", *changes, **short)) == [0] * world
    whole = f"final-whole-{world}"
    assert codes(_start(folder, whole, world, *changes, **short)) == [0] * world
    found, expected = (json.loads((folder / n / "eval" / "summary.json").read_text()) for n in (name, whole))
    assert len(found) > 15
    for key in found.keys() - {"seconds", "evaluation_seconds"}:
        assert found[key] == expected[key], key


def test_while_it_starts_it_leaves_at_once_and_leaves_nothing(folder: Path) -> None:
    """Rank 1 waits for rank 0, which never comes."""
    ranks = _start(folder, "early", 2, delays=[60, 0])
    time.sleep(1.0)
    ranks[1].signal(signal.SIGTERM)
    assert ranks[1].wait(10) == ExitCode.PREEMPTED, ranks[1].said
    ranks[0].signal(signal.SIGKILL)
    ranks[0].wait()
    assert not (folder / "early").exists()


def test_what_is_ignored_on_purpose_stays_ignored(folder: Path) -> None:
    """``nohup`` ignores SIGHUP for what it starts."""

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "nohup", before=nohup, faults={"pause": 0.05})
    assert until(lambda: run.ended or saved(folder / "nohup")), run.said
    run.signal(signal.SIGHUP)
    assert run.wait() == 0, run.said


# -- data workers -----------------------------------------------------------------------------------


def _image_folder(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, n in (("train", 16), ("test", 4)):
        for c in range(4):
            place = folder / split / f"c{c}"
            place.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(draw.integers(0, 255, (20, 20), dtype=np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_to_the_whole_group_leaves_data_workers_alone(
    world: int, folder: Path, tmp_path: Path
) -> None:
    """As ``scancel`` and ``timeout`` send it: the workers used to die of it, and the run with them."""
    images = _image_folder(tmp_path / "files")
    files = ("data.dataset=imagefolder", f"data.root={images}", "data.workers=2")
    name = f"workers-{world}"
    ranks = _start(folder, name, world, *files, faults={"pause": 0.15})
    assert until(lambda: ranks[0].ended or saved(folder / name)), ranks[0].said
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGTERM)
    assert codes(ranks) == [ExitCode.PREEMPTED] * world, [r.said for r in ranks]
    assert saved(folder / name)[-1] < 12
    # None of a rank's group is left, workers included.
    assert until(lambda: not any(_group_alive(rank.pid) for rank in ranks), 10)
    again = _start(folder, name, world, "--resume", "auto", *files)
    assert codes(again) == [0] * world, [r.said for r in again]


def _group_alive(group_id: int) -> bool:
    try:
        os.killpg(group_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_in_a_validation_of_files_the_workers_are_no_accident(folder: Path, tmp_path: Path) -> None:
    """They are ended with the process, which the data loader would take for a crash of theirs."""
    images = _image_folder(tmp_path / "files")
    files = ("data.dataset=imagefolder", f"data.root={images}", "data.workers=2")
    (run,) = _start(folder, "workers-validation", 1, *files, faults={"evaluation_pause": 1.0})
    assert until(lambda: run.ended or 3 in saved(folder / "workers-validation")), run.said
    time.sleep(1.0)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == ExitCode.PREEMPTED, run.said
    assert "Traceback" not in run.err and len(run.err.splitlines()) == 2, run.said


# -- before and beside the run ------------------------------------------------------------------------


def test_a_signal_while_python_imports_is_heeded(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    run = shell(
        tmp_path, "fit", "--recipe", "simclr_fashion_mnist", "--out", "run"
    )  # a method without torch to load
    # Its handlers stand before it imports torch, which takes seconds.
    assert until(
        lambda: "SigCgt" in (status := Path(f"/proc/{run.pid}/status").read_text()) and _catches_term(status)
    )
    run.signal(signal.SIGTERM)
    assert run.wait() == ExitCode.PREEMPTED, run.said
    assert run.err == "sslzoo: SIGTERM while starting; nothing was written\n", run.said
    assert not (tmp_path / "run").exists()


def _catches_term(status: str) -> bool:
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_terminal_that_is_closed_loses_nothing(folder: Path) -> None:
    master, slave = pty.openpty()

    def attach() -> None:
        for stream in (1, 2):
            os.dup2(slave, stream)

    run = fork(
        folder, "fit", "--recipe", "tiny.yaml", "--out", "closed", before=attach, faults={"pause": 0.1}
    )
    os.close(slave)
    assert until(lambda: run.ended or saved(folder / "closed"))
    os.close(master)  # from here on whatever it prints fails
    run.signal(signal.SIGHUP)
    assert run.wait() == ExitCode.PREEMPTED
    assert manifest(folder / "closed")["error"]["message"].startswith("SIGHUP: saved at step ")
    _ends_like(folder, "closed", 1)


def test_what_was_not_asked_to_leave_but_lost_a_rank_has_failed(folder: Path) -> None:
    """torchrun and srun send SIGTERM to the others when the kernel has killed one: requeueing would not help."""
    ranks = _start(folder, "lost", 2, faults={"evaluation_pause": 3.0})
    assert until(lambda: ranks[0].ended or STEPS - 1 in saved(folder / "lost")), ranks[0].said
    time.sleep(0.8)
    ranks[1].signal(signal.SIGKILL)
    ranks[0].signal(signal.SIGTERM)
    assert codes(ranks, 30) == [ExitCode.FAILURE, -signal.SIGKILL], ranks[0].said
    assert manifest(folder / "lost")["exit_code"] == ExitCode.FAILURE
    assert "Traceback" not in ranks[0].err, ranks[0].said


def test_the_launcher_ends_a_rank_that_waits_for_a_dead_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "PATIENCE", 2.0)
    run = fork(
        folder,
        *("fit", "--recipe", "tiny.yaml", "--out", "hang", "trainer.devices=2"),
        faults={"hang_in_evaluation": 0},
    )
    assert until(lambda: run.ended or STEPS - 1 in saved(folder / "hang"), 120), run.said
    time.sleep(1.0)
    os.kill(children(run.pid)[1], signal.SIGKILL)
    assert run.wait(30) == ExitCode.FAILURE, run.said
    assert "rank 1 was killed by SIGKILL" in run.err, run.said
    assert manifest(folder / "hang")["error"]["rank"] == 1
    assert "rank 1 was killed by SIGKILL" in (folder / "hang" / "train.log").read_text().splitlines()[-1]
