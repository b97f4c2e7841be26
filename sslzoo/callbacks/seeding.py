"""Randomness and sampler position as functions of how far the run is."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sslzoo.randomness import STEP, key


def seed_generators(seed: int) -> None:
    """Seed the default generators of the CPU and of every initialised CUDA device.

    ``torch.manual_seed`` does the same and costs 0.1 ms, most of it looking for devices.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


def window_closed(trainer: Any, pl_module: Any) -> bool:
    """Whether no gradient is half accumulated, given the micro-batches finished so far."""
    return trainer.datamodule.position % pl_module.plan.accumulate == 0


class StepSeeding(Callback):
    """Seeds the main process at each micro-batch and counts it in ``trainer.datamodule.position``.

    Dropout, masks and mixing then depend on (seed, position, rank) alone, so no generator state needs
    saving and the ranks differ as they should. The DataModule keeps ``position`` in its state and
    starts its sampler there.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed for this micro-batch."""
        seed_generators(key(STEP, pl_module.seed, trainer.datamodule.position, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count it."""
        trainer.datamodule.position += 1
