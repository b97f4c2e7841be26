"""A killed run that resumes ends bit-equal to the one never killed."""

from __future__ import annotations

import signal
from functools import cache

import pytest

from sslzoo.recipe.registry import methods
from tests.chaos import Fault, Job, Outcome, run

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
