"""Leaving in order when the scheduler asks: save at the next safe moment, then a documented exit code."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.seeding import window_closed
from sslzoo.exits import Preempted
from sslzoo.run.departure import Departure


class Preemption(Callback):
    """Tells ``departure`` in which phase the training is, and saves where the ranks have agreed to leave.

    Lightning's own handler broadcasts from inside the signal and hangs when another rank than 0, or the whole
    group, is signalled; its replacement for every step costs up to half a millisecond. Both are switched off
    here.
    """

    def __init__(self, checkpoint: ExactCheckpoint, departure: Departure) -> None:
        self._checkpoint, self._departure = checkpoint, departure

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Keep Lightning from taking the signals."""
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From now on leaving means saving."""
        self._departure.enter("training", saves=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Leave, if the ranks have agreed on this step."""
        step = pl_module.optimizer_steps
        if window_closed(trainer, pl_module) and self._departure.boundary(step):
            if step != self._checkpoint.saved_step and step > 0:
                self._checkpoint.save(trainer, pl_module)
            raise Preempted(f"{self._departure.signal_name}: saved at step {step}")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """An evaluation is repeated: the checkpoint of the step before it is there."""
        self._departure.enter("evaluating")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Back to training."""
        self._departure.enter("training", saves=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last checkpoint is written; what follows can be repeated."""
        self._departure.enter("finishing")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Tell the other ranks before Lightning tears down, which can take seconds."""
        self._departure.raised(exception)


def _nothing() -> None:
    pass
