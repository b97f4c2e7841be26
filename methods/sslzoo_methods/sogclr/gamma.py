"""The inner moving-average rate gamma as a pure function of the optimiser step."""

from __future__ import annotations

from math import cos, pi

from sslzoo.checks import one_of, require
from sslzoo.recipe.plan import TrainingPlan
from sslzoo_methods.sogclr.config import SogCLRConfig

GAMMA_SCHEDULES = ("constant", "cosine", "per_step")


def inner_rate(
    step: int, *, schedule: str, gamma: float, gamma_min: float, decay_epochs: int, steps_per_epoch: int
) -> float:
    """gamma of optimiser step ``step``, the weight of the new estimate.

    ``constant`` is ``gamma``. ``cosine`` goes from 1 in epoch 0 to ``gamma_min`` in epoch E =
    ``decay_epochs`` and stays, one value an epoch (FastCLIP, arXiv:2407.01445; LibAUC's code, whose prose
    omits the 1 of 1 + cos). ``per_step`` is the same with fractional epochs, our extension.
    """
    one_of("gamma_schedule", schedule, GAMMA_SCHEDULES)
    if schedule == "constant":
        return gamma
    require(decay_epochs > 0, f"gamma_decay_epochs must be positive, got {decay_epochs}")
    epoch = step // steps_per_epoch if schedule == "cosine" else step / steps_per_epoch
    if epoch >= decay_epochs:
        return gamma_min
    return gamma_min + (1 - gamma_min) * (1 + cos(pi * epoch / decay_epochs)) / 2


def decay_epochs(configured: int, max_epochs: int) -> int:
    """E of the cosine: as configured, or half of the training epochs, rounded down, at least 1, for 0."""
    return configured if configured > 0 else max(max_epochs // 2, 1)


def rate_of(cfg: SogCLRConfig, plan: TrainingPlan, step: int) -> float:
    """:func:`inner_rate` as a recipe configures it."""
    return inner_rate(
        step,
        schedule=cfg.gamma_schedule,
        gamma=cfg.gamma,
        gamma_min=cfg.gamma_min,
        decay_epochs=decay_epochs(cfg.gamma_decay_epochs, plan.max_epochs),
        steps_per_epoch=plan.steps_per_epoch,
    )
