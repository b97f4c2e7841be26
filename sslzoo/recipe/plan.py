"""Batch sizes and step counts of a run, all derived in one place. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from sslzoo.checks import require
from sslzoo.recipe.sections import OptimConfig, Recipe


@dataclass(frozen=True)
class Division:
    """How the images of an optimiser step are divided."""

    processes: int
    micro_batches: int

    def __str__(self) -> str:
        several = [
            f"{count} {word}{plural * (count > 1)}"
            for count, word, plural in (
                (self.processes, "process", "es"),
                (self.micro_batches, "micro-batch", "es"),
            )
        ]
        return " x ".join(several)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How many samples, steps and processes a run has. An epoch drops its last partial batch."""

    dataset_size: int
    global_batch_size: int  # samples per optimiser step
    max_epochs: int
    world_size: int = 1
    accumulate: int = 1  # micro-batches per optimiser step

    def __post_init__(self) -> None:
        shares = self.world_size * self.accumulate
        require(
            self.global_batch_size % shares == 0,
            f"data.global_batch_size={self.global_batch_size} cannot be split evenly over {self.world_size} "
            f"processes with {self.accumulate} micro-batches each; make it a multiple of {shares}",
        )
        require(
            self.dataset_size >= self.global_batch_size,
            f"the data set has {self.dataset_size} samples, fewer than data.global_batch_size="
            f"{self.global_batch_size}; lower data.global_batch_size",
        )
        require(self.max_epochs > 0, f"trainer.max_epochs must be positive, got {self.max_epochs}")

    @property
    def division(self) -> Division:
        """How the images of a step are divided."""
        return Division(self.world_size, self.accumulate)

    @property
    def micro_batch_size(self) -> int:
        """Samples per process and forward pass."""
        return self.global_batch_size // (self.world_size * self.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return self.dataset_size // self.global_batch_size

    @property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes per process and epoch."""
        return self.steps_per_epoch * self.accumulate

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.max_epochs

    def steps(self, epochs: float) -> int:
        """Optimiser steps in ``epochs``, which may be fractional, rounded to the nearest integer."""
        return round(epochs * self.steps_per_epoch)

    def scaled_lr(self, optim: OptimConfig) -> float:
        """Peak learning rate, scaled with the global batch size as ``optim.lr_scaling`` says."""
        factor = {"linear": self.global_batch_size / 256, "sqrt": sqrt(self.global_batch_size), "none": 1.0}
        return optim.lr * factor[optim.lr_scaling]


def plan_of(recipe: Recipe, dataset_size: int, world_size: int) -> TrainingPlan:
    """The plan of a run of ``recipe`` on ``dataset_size`` images and ``world_size`` processes."""
    return TrainingPlan(
        dataset_size=dataset_size,
        global_batch_size=recipe.data.global_batch_size,
        max_epochs=recipe.max_epochs,
        world_size=world_size,
        accumulate=recipe.accumulate,
    )
