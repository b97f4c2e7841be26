"""Seed random generators and count the sampler position at each micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sslzoo.randomness import STEP, key


def seed_generators(seed: int) -> None:
    """Seed the default generators of the CPU and of every initialised CUDA device.

    ``torch.manual_seed`` does the same but takes 0.1 ms, mostly for looking up devices.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


def window_closed(trainer: Any, pl_module: Any) -> bool:
    """Whether no accumulation of gradients is in progress, according to the number of finished micro-batches."""
    return trainer.datamodule.position % pl_module.plan.accumulate == 0


class StepSeeding(Callback):
    """Seeds the main process at each micro-batch and counts micro-batches in ``trainer.datamodule.position``.

    Dropout, masks and mixing then depend only on (seed, position, rank), so that no generator state has to
    be saved and ranks draw different numbers. The DataModule saves ``position`` and starts its sampler there.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the generators for this micro-batch."""
        seed_generators(key(STEP, pl_module.seed, trainer.datamodule.position, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch."""
        trainer.datamodule.position += 1
