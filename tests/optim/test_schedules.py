"""Schedules: end points, clamping, and the three warm-up ramps."""

from __future__ import annotations

from typing import Any

import pytest

from sslzoo.optim.schedules import Shape, ema_momentum, interpolate, learning_rate, warmup_cosine
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import ConstantSchedule, CosineSchedule, SGDConfig, StepSchedule

PLAN = TrainingPlan(dataset_size=1000, global_batch_size=100, max_epochs=10)  # 10 steps an epoch


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.5), (0.04, 0.07)])
def test_interpolate_reaches_its_end_and_stays_rising_or_falling(
    shape: Shape, start: float, end: float
) -> None:
    values = [interpolate(s, 6, start, end, shape) for s in range(9)]
    assert values[0] == pytest.approx(start)
    assert values[5:] == [pytest.approx(end)] * 4
    assert sorted(values, reverse=start > end) == values
    assert interpolate(0, 1, start, end, shape) == end


def test_interpolate_in_the_middle() -> None:
    assert interpolate(1, 5, 0.0, 1.0, "linear") == 0.25
    assert interpolate(1, 5, 0.0, 1.0, "cosine") == pytest.approx((1 - 2**-0.5) / 2)


def curve(steps: int, **options: object) -> list[float]:
    base = {"total_steps": 20, "warmup_steps": 4, "peak": 2.0} | options
    return [warmup_cosine(s, **base) for s in range(steps)]  # type: ignore[arg-type]


def test_closed_ramp_has_the_peak_twice() -> None:
    got = curve(25)
    assert got[:5] == [pytest.approx(x) for x in (0.0, 2 / 3, 4 / 3, 2.0, 2.0)]
    assert got[12] == pytest.approx(1.0)
    assert got[20:] == [0.0] * 5  # after the end: neither restart nor drift


def test_open_and_shifted_ramps() -> None:
    assert curve(5, ramp="open") == [pytest.approx(x) for x in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert curve(5, ramp="shifted") == [pytest.approx(x) for x in (0.4, 0.8, 1.2, 1.6, 2.0)]
    assert curve(21, ramp="shifted")[20] == pytest.approx(0.0)


def test_warmup_of_one_step_starts_at_its_start_and_of_none_at_the_peak() -> None:
    assert curve(2, warmup_steps=1, start=0.1) == [0.1, 2.0]
    assert curve(1, warmup_steps=0) == [2.0]
    assert curve(21, warmup_steps=0, end=0.5)[20] == pytest.approx(0.5)
    assert curve(2, warmup_steps=4, start=1.0)[0] == 1.0


def optim(**changes: Any) -> SGDConfig:
    base = {"lr": 0.4, "lr_scaling": "linear", "weight_decay": 0.0, "warmup_epochs": 1.0}
    return SGDConfig(**(base | changes))


def test_learning_rate_scales_with_the_batch_and_counts_steps() -> None:
    peak = 0.4 * 100 / 256
    assert learning_rate(0, optim(), PLAN) == 0.0
    assert learning_rate(9, optim(), PLAN) == pytest.approx(peak)
    assert learning_rate(55, optim(), PLAN) == pytest.approx(peak / 2)
    assert learning_rate(100, optim(schedule=CosineSchedule(min_lr=0.01)), PLAN) == pytest.approx(0.01)


def test_constant_and_step_schedules() -> None:
    constant = optim(schedule=ConstantSchedule(), lr_scaling="none")
    assert learning_rate(4, constant, PLAN) == pytest.approx(0.4 * 4 / 9)
    assert learning_rate(99, constant, PLAN) == 0.4
    steps = optim(schedule=StepSchedule(milestones=(6, 8)), lr_scaling="none", warmup_epochs=0.0)
    got = [learning_rate(s, steps, PLAN) for s in (0, 59, 60, 79, 80)]
    assert got == [pytest.approx(x) for x in (0.4, 0.4, 0.04, 0.04, 0.004)]


def test_ema_momentum() -> None:
    options = {"total_steps": 11, "start": 0.9}
    assert ema_momentum(7, schedule="constant", **options) == 0.9
    got = [ema_momentum(s, schedule="cosine", **options) for s in (0, 5, 10, 30)]
    assert got == [pytest.approx(x, abs=1e-15) for x in (0.9, 0.95, 1.0, 1.0)]
    assert got[2] == 1.0
    assert ema_momentum(0, total_steps=1, start=0.9, schedule="cosine") == 0.9
