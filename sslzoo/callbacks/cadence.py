"""When evaluation runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class EvaluationCadence(Callback):
    """Validation after every ``every_epochs`` epochs and, whatever remains, after the last. It counts for all ranks
    which images were unreadable."""

    def __init__(self, every_epochs: int) -> None:
        self.every_epochs = every_epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Here, because a run resumed inside an epoch has no epoch start."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        trainer.check_val_every_n_epoch = 1 if last else self.every_epochs

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop where they are too many."""
        trainer.datamodule.share_unreadable()
