"""Schedules as pure functions of the optimiser step, so that a resumed run needs no schedule state."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import CosineSchedule, OptimConfig, StepSchedule

Shape = Literal["linear", "cosine"]  # cosine: half a period


def interpolate(step: int, steps: int, start: float, end: float, shape: Shape = "linear") -> float:
    """Interpolate from ``start`` at step 0 to ``end`` at step ``steps - 1``; constant at ``end`` afterwards.

    ``shape`` is ``linear`` or ``cosine`` (half a period). With ``steps`` <= 1 the value is ``end``.
    """
    fraction = min(step / (steps - 1), 1.0) if steps > 1 else 1.0
    if shape == "linear":
        return start + (end - start) * fraction
    return end + (start - end) * (1 + cos(pi * fraction)) / 2


def warmup_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    start: float = 0.0,
    end: float = 0.0,
    ramp: Literal["closed", "open", "shifted"] = "closed",
) -> float:
    """Linear warm-up over W steps, then half a cosine from ``peak`` to ``end`` at step T, constant after T.

    The papers' code uses three different ramps: ``closed`` reaches the peak at step W-1, ``open`` at step W;
    ``shifted`` is (s+1)/(W+1) up to and including step W.
    """
    w = warmup_steps
    if step < w or (ramp == "shifted" and step <= w):
        fraction = {
            "closed": step / max(w - 1, 1),
            "open": step / max(w, 1),
            "shifted": (step + 1) / (w + 1),
        }[ramp]
        return start + (peak - start) * fraction
    progress = min((step - w) / max(total_steps - w, 1), 1.0)
    return end + (peak - end) * (1 + cos(pi * progress)) / 2


def learning_rate(step: int, optim: OptimConfig, plan: TrainingPlan) -> float:
    """The learning rate of optimiser step ``step`` (from 0), scaled with the batch size."""
    peak, warmup, schedule = plan.scaled_lr(optim), plan.steps(optim.warmup_epochs), optim.schedule
    if isinstance(schedule, CosineSchedule):
        return warmup_cosine(
            step,
            total_steps=plan.total_steps,
            warmup_steps=warmup,
            peak=peak,
            start=optim.warmup_start_lr,
            end=schedule.min_lr,
            ramp=optim.warmup_ramp,
        )
    if step < warmup:
        start = optim.warmup_start_lr
        return warmup_cosine(
            step, total_steps=warmup, warmup_steps=warmup, peak=peak, start=start, ramp=optim.warmup_ramp
        )
    if not isinstance(schedule, StepSchedule):
        return peak
    passed = sum(step >= plan.steps(epoch) for epoch in schedule.milestones)
    return peak * schedule.gamma**passed


def ema_momentum(
    step: int, *, total_steps: int, start: float, schedule: Literal["constant", "cosine"], end: float = 1.0
) -> float:
    """EMA coefficient at step ``step``: constant ``start``, or half a cosine from ``start`` to ``end`` at step T-1.

    With T = 1 the coefficient is ``start``.
    """
    if schedule == "constant" or total_steps <= 1:
        return start
    return interpolate(step, total_steps, start, end, shape="cosine")
