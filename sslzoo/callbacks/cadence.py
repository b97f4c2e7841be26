"""When evaluation runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class EvaluationCadence(Callback):
    """Validation after every ``every_epochs`` epochs and after the last one; then the ranks combine their unreadable
    images."""

    def __init__(self, every_epochs: int) -> None:
        self.every_epochs = every_epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the interval. Done here because a run resumed within an epoch has no epoch start."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        trainer.check_val_every_n_epoch = 1 if last else self.every_epochs

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop if too many images are unreadable."""
        trainer.datamodule.share_unreadable()
