"""The derived lengths of a run."""

from __future__ import annotations

from typing import Literal

import pytest

from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import SGDConfig


def plan(**changes: int) -> TrainingPlan:
    return TrainingPlan(**({"dataset_size": 1050, "global_batch_size": 100, "max_epochs": 3} | changes))


def test_an_epoch_drops_its_last_partial_batch() -> None:
    p = plan(world_size=2, accumulate=5)
    assert (p.steps_per_epoch, p.total_steps, p.micro_batch_size, p.micro_batches_per_epoch) == (
        10,
        30,
        10,
        50,
    )


def test_imagenet_has_312_steps_of_4096() -> None:
    assert plan(dataset_size=1_281_167, global_batch_size=4096).steps_per_epoch == 312


def test_steps_of_fractional_epochs_are_rounded() -> None:
    assert [plan().steps(e) for e in (0, 0.04, 0.06, 1.5)] == [0, 0, 1, 15]


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.2), ("sqrt", 0.1 * 512**0.5), ("none", 0.1)])
def test_learning_rate_scaling(scaling: Literal["linear", "sqrt", "none"], expected: float) -> None:
    optim = SGDConfig(lr=0.1, lr_scaling=scaling, weight_decay=0.0, warmup_epochs=0.0)
    assert plan(global_batch_size=512).scaled_lr(optim) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "data.global_batch_size=100 cannot be split evenly over 3 processes"),
        ({"accumulate": 3}, "make it a multiple of 3"),
        ({"dataset_size": 99}, "the data set has 99 samples, fewer than"),
        ({"max_epochs": 0}, "trainer.max_epochs must be positive"),
    ],
)
def test_refuses(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)
