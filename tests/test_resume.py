"""A killed run that resumes ends bit-equal to the one never killed."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sslzoo.testing.kills import Fault, Outcome, run
from tests.chaos import tiny_job

JOBS: dict[str, dict[str, Any]] = {
    "one": {},
    "one-accumulate": {"accumulate": 2},
    "two": {"world": 2},
    "two-accumulate": {"world": 2, "accumulate": 2},
}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """``undisturbed(name)``: the outcome of the job never killed, trained once."""

    @cache
    def outcome(name: str) -> Outcome:
        return run(tiny_job(**JOBS[name]), tmp_path_factory.mktemp("undisturbed"))

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
def test_a_run_killed_six_times_equals_the_run_never_killed(name, tmp_path: Path, undisturbed):
    resumed = run(tiny_job(**JOBS[name]), tmp_path, _faults(JOBS[name].get("accumulate", 1)))
    assert resumed.sessions == 7
    _same(resumed, undisturbed(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_kills_at_random_moments(name, tmp_path: Path, undisturbed):
    resumed = run(tiny_job(**JOBS[name], pause=0.15), tmp_path, random_kills=6, seed=5)
    assert sum(-signal.SIGKILL in codes for codes in resumed.codes) >= 5
    _same(resumed, undisturbed(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", JOBS)
def test_many_random_kills(name, seed, tmp_path: Path, undisturbed):
    resumed = run(tiny_job(**JOBS[name], pause=0.02), tmp_path, random_kills=8, seed=seed)
    _same(resumed, undisturbed(name))
