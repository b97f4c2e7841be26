"""Randomness and sampler position as functions of how far the run is. Stands first among the callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sslzoo.data.randomness import STEP, key
from sslzoo.distributed import broadcast_from_zero


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


class Position(Callback):
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


class SameEncoder(Callback):
    """Gives every rank rank 0's buffers before validation, so that all evaluate the same encoder.

    Batch-norm running statistics differ between ranks unless batch norm is synchronised: each sees its
    own rows, and buffers are not broadcast at every step.
    """

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Broadcast running statistics; nothing with one process."""
        if trainer.world_size > 1:
            for module in pl_module.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    for buffer in module.buffers(recurse=False):
                        broadcast_from_zero(buffer)
