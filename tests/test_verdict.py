"""Failures made on purpose are named within an epoch, healthy runs are left alone; see ``data/verdict/record.py``."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sslzoo.verdict import Verdict, judge, judge_file
from tests.data.verdict.record import CASES, HERE, RUNS, run

# Failure -> states, epoch of its onset, and what its reason must say.
FAILURES = {
    "no-negatives": ("collapsed", 1, "where 0.088 is even: complete collapse"),
    "late-no-negatives": ("watch", 3, "embedding deviation has fallen"),
    "temperature": ("collapsed", 1, "a temperature far too low"),
    "rate": ("collapsed or watch", 1, "usual causes: a rate far too high"),
    "no-augmentation": ("watch", 1, "augmentation is off"),
    "frozen": ("watch", 1, "the backbone is frozen"),
    "labels": ("watch", 1, "the labels do not match the images"),
}
RECOVERED = {"rate-2": 5}  # run -> epoch at which it is healthy again, its rate having fallen to 0
RECORDED = sorted(path.stem for path in HERE.glob("*.csv"))
HEALTHY = [name for name in RECORDED if name.startswith("healthy-")]


def rows_of(name: str) -> list[dict[str, str]]:
    with (HERE / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def course(rows: list[dict[str, str]]) -> Iterator[tuple[int, Verdict]]:
    """Epoch, from 1, and verdict after each evaluation."""
    for i, row in enumerate(rows):
        if row["repr/std"]:
            verdict = judge(rows[: i + 1])
            assert verdict is not None
            yield int(row["epoch"]) + 1, verdict


def test_every_run_is_recorded() -> None:
    assert set(RECORDED) == {f"{name}-{seed}" for name, seed, _ in RUNS}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_healthy_at_every_evaluation(name: str) -> None:
    states = [verdict.state for _, verdict in course(rows_of(name))]
    assert len(states) >= 3 and set(states) == {"healthy"}


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in HEALTHY])
def test_failures_are_named_within_an_epoch_of_their_onset(name: str) -> None:
    states, onset, said = FAILURES[name.rpartition("-")[0]]
    found = list(course(rows_of(name)))
    assert all(verdict.state == "healthy" for epoch, verdict in found if epoch < onset)
    named = [epoch for epoch, verdict in found if verdict.state in states and said in verdict.reason]
    assert named and named[0] <= onset + 1
    until = RECOVERED.get(name, math.inf)
    assert all(
        (verdict.state == "healthy") == (epoch >= until) for epoch, verdict in found if epoch >= named[0]
    )


def test_the_first_epoch_of_the_state_is_told() -> None:
    rows = rows_of("no-negatives-42")
    assert [verdict.since_epoch for _, verdict in course(rows)] == [1] * 5
    late = list(course(rows_of("late-no-negatives-42")))
    assert [verdict.since_epoch for _, verdict in late] == [1, 1, 3, 3, 3]
    assert late[-1][1].sentence.startswith(
        "watch since epoch 3: embedding deviation has fallen from 0.069 to 0.029"
    )


def test_a_loss_that_is_not_finite_is_a_collapse() -> None:
    row: Mapping[str, str] = {"step": "1", "epoch": "2", "train/loss": "nan"}
    verdict = judge([row])
    assert verdict is not None
    assert (verdict.state, verdict.since_epoch) == ("collapsed", 3)


def test_without_an_evaluation_there_is_no_verdict(tmp_path: Path) -> None:
    assert judge([{"step": "1", "epoch": "0", "train/loss": "1.0"}]) is None
    assert judge_file(tmp_path / "metrics.csv") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "state"),
    [("healthy-simclr", "healthy"), ("no-negatives", "collapsed"), ("no-augmentation", "watch")],
)
def test_trained_now(name: str, state: str, tmp_path: Path) -> None:
    """Two failures and a healthy run, not recorded ones."""
    verdict = judge_file(run(CASES[name], 3, tmp_path, images=512, epochs=2))
    assert verdict is not None and verdict.state == state, verdict
