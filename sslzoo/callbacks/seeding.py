"""Seed random generators and count the sampler position at each micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

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

    ``draws``: whether a micro-batch has drawn random numbers from these generators. They depend on the number of
    processes and of micro-batches, which then must not change when the run continues.
    """

    def __init__(self) -> None:
        self.draws = False
        self._seeded: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Whether numbers were drawn."""
        return {"draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.draws = state_dict["draws"]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the generators for this micro-batch."""
        seed_generators(key(STEP, pl_module.seed, trainer.datamodule.position, trainer.global_rank))
        if not self.draws:
            self._seeded = _states()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch."""
        trainer.datamodule.position += 1
        if not self.draws:
            self.draws = not all(map(torch.equal, self._seeded, _states()))


def _states() -> list[Tensor]:
    """The states of the generators that :func:`seed_generators` seeds; on the CPU, for CUDA devices too."""
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [generator.get_state() for generator in (torch.default_generator, *devices)]
