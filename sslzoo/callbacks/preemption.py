"""Callback that saves a checkpoint and stops the training when a signal asks for it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.seeding import window_closed
from sslzoo.exits import Preempted
from sslzoo.processes.departure import Departure


class Preemption(Callback):
    """Tells ``departure`` the phase of the training, and saves at the step at which the ranks agreed to stop.

    Lightning's own signal handler runs a broadcast, which hangs if a rank other than 0 or the whole group
    receives the signal; its alternative check in every step costs up to half a millisecond. Both are disabled.
    """

    def __init__(self, checkpoint: ExactCheckpoint, departure: Departure) -> None:
        self._checkpoint, self._departure = checkpoint, departure

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Disable Lightning's signal handling."""
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Enter the phase in which a signal leads to a checkpoint."""
        self._departure.enter("training", saves=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save and raise :class:`Preempted` if the ranks agreed to stop at this step."""
        step = pl_module.optimizer_steps
        if window_closed(trainer, pl_module) and self._departure.boundary(step):
            if step != self._checkpoint.saved_step and step > 0:
                self._checkpoint.save(trainer, pl_module)
            raise Preempted(f"{self._departure.signal_name}: saved at step {step}")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Enter a phase that stops at once: there is a checkpoint from before it, and the evaluation is repeated."""
        self._departure.enter("evaluating")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Return to the training phase."""
        self._departure.enter("training", saves=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Enter a phase that stops at once: the last checkpoint is written, and the rest can be repeated."""
        self._departure.enter("finishing")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Report the error to the other ranks before Lightning's teardown, which can take seconds."""
        self._departure.raised(exception)


def _nothing() -> None:
    pass
