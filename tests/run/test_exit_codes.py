"""The exit code of a process, the same code in its manifest, and the word at its end.

The runs that a signal ends, and those of two ranks, are real processes. The others are forks, which take a fifth of the
time. What a signal to one rank of two does is in ``test_leaving.py``, by forks.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sslzoo.exits import ExitCode
from sslzoo.records.record import STATES
from tests.command import Command, children, fork, manifest, saved, shell, until, write_recipe

LIMIT = 180.0  # seconds; most of a run is its imports


@dataclass(frozen=True)
class Case:
    """A run that is started, what happens to it once it has saved something, and its end."""

    code: ExitCode
    says: str  # its last words
    faults: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    then: Callable[[Command], None] | None = None


def _rank(number: int, sent: int) -> Callable[[Command], None]:
    def send(command: Command) -> None:
        os.kill(children(command.pid)[number], sent)

    return send


SLOW, TWO = {"pause": 0.1}, ("trainer.devices=2",)
SAVED, CONTINUE = r"SIGTERM: saved at step \d+", r"continue with: sslzoo fit .*--resume auto"
CASES = {
    "done": Case(ExitCode.DONE, r"report: \S+report\.html\nrun directory: "),
    "failure": Case(ExitCode.FAILURE, "RuntimeError: this rank cannot train", {"raise_at": [0, 5]}),
    "usage": Case(
        ExitCode.USAGE, r"override: optim\.lrr: unknown key; did you mean optim\.lr\?", {}, ("optim.lrr=3",)
    ),
    "term": Case(ExitCode.PREEMPTED, SAVED, SLOW, (), lambda c: c.signal(signal.SIGTERM)),
    "nan": Case(ExitCode.NAN, r"train/loss is nan by step \d", {"nan_at": 5}),
    "interrupt": Case(
        ExitCode.INTERRUPT, "interrupted while training", SLOW, (), lambda c: c.signal(signal.SIGINT)
    ),
    "group": Case(ExitCode.PREEMPTED, SAVED, SLOW, TWO, lambda c: os.killpg(c.pid, signal.SIGTERM)),
    "second": Case(
        ExitCode.FAILURE, r"rank 1 on \S+ failed first: RuntimeError: this rank", {"raise_at": [1, 5]}, TWO
    ),
    "killed": Case(ExitCode.FAILURE, "rank 1 was killed by SIGKILL", SLOW, TWO, _rank(1, signal.SIGKILL)),
}
# Forks show most of this in ``test_leaving.py`` and ``test_ranks.py``, in a third of the time.
LONG = {"group", "second", "killed"}
REAL = {"term", *LONG}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory):
    """``ended(name)``: the run directory, the exit code and the process of that case, which goes through it once."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(folder)

    @cache
    def go_through(name: str) -> tuple[Path, int, Command]:
        case, run = CASES[name], folder / name
        command = (shell if name in REAL else fork)(
            folder,
            "fit",
            "--recipe",
            "tiny.yaml",
            "--out",
            name,
            *case.overrides,
            faults=case.faults,
            name=name,
        )
        if case.then is not None:
            assert until(lambda: command.ended or (run.exists() and saved(run)), LIMIT), command.said
            case.then(command)
        return run, command.wait(LIMIT), command

    return go_through


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CASES]
)
def test_exit_code_manifest_and_last_words(name: str, ended) -> None:
    case = CASES[name]
    run, code, command = ended(name)
    assert code == case.code, command.said
    last = command.err if case.code else command.out
    assert re.search(case.says, last), command.said
    if case.code == ExitCode.USAGE:
        assert not run.exists()
        assert len(command.err.splitlines()) == 1
        return
    kept = manifest(run)
    assert kept["exit_code"] == kept["sessions"][-1]["exit_code"] == case.code
    assert (kept["error"] is None) == (case.code == ExitCode.DONE)
    assert not list(run.rglob("*.part")) and not (run / "run.lock").exists()
    assert f"<strong>{STATES.get(case.code, 'failed')}</strong>" in (run / "report.html").read_text()
    if case.code != ExitCode.DONE:
        assert re.search(case.says.removeprefix(r"rank 1 on \S+ failed first: "), kept["error"]["message"])
        # What happened and what to do stand at the very end, after any traceback.
        *_, happened, what_next = [
            line for line in command.err.splitlines() if "the traceback is in" not in line
        ]
        assert happened.startswith("sslzoo fit: ") and re.search(case.says, happened), command.err
        expected = "start a new run with a different --out" if case.code == ExitCode.NAN else CONTINUE
        assert re.search(expected, what_next), command.err
        assert re.search(kept["error"]["message"][:40], (run / "train.log").read_text()) or name == "killed"


@pytest.mark.slow
def test_the_rank_that_failed_first_is_named_and_alone_on_the_terminal(ended) -> None:
    run, _, command = ended("second")
    assert manifest(run)["error"] | {"host": ""} == {
        "rank": 1,
        "host": "",
        "kind": "RuntimeError",
        "message": "RuntimeError: this rank cannot train",
        "log": "logs/rank-1.log",
    }
    assert command.err.count("Traceback (most recent call last)") == 1
    assert "this rank cannot train" in (run / "logs" / "rank-1.log").read_text()
    # What rank 0 died of is in its own log, not on the screen.
    assert "Traceback" in (run / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_is_the_cause_and_not_its_neighbours_connection(ended) -> None:
    run, _, command = ended("killed")
    assert manifest(run)["error"]["kind"] == "SIGKILL"
    assert "Traceback" not in command.err


def test_a_continued_run_says_where_from(ended) -> None:
    run, _, _ = ended("term")
    again = fork(
        run.parent, "fit", "--recipe", "tiny.yaml", "--out", run.name, "--resume", "auto", name="again"
    )
    assert again.wait(LIMIT) == 0, again.said
    assert "continuing from " in again.out
    assert [start["exit_code"] for start in manifest(run)["sessions"]] == [ExitCode.PREEMPTED, ExitCode.DONE]
