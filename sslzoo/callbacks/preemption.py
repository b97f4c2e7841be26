"""Leaving in order when the scheduler asks: save at the next safe moment, then a documented exit code."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.position import window_closed
from sslzoo.exits import ExitCode

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGREE_EVERY = 8  # optimiser steps between the ranks' agreements; one process reacts at once


class Preemption(Callback):
    """On SIGTERM or SIGUSR1, to any or all ranks: all save together and raise ``SystemExit(PREEMPTED)``.

    The handler only sets a flag. Lightning's own handler broadcasts from inside the signal and hangs
    when another rank than 0, or the whole group, is signalled; its replacement for every step costs up
    to half a millisecond. Both are switched off here. Stands after the checkpoint callback it uses.
    """

    def __init__(self, checkpoint: ExactCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take over the signals before Lightning would."""
        if stage != "fit":
            return
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # agreeing must not wait for the GPU

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _agreed(self, trainer: Trainer) -> int:
        """The highest signal number that any rank received, or 0."""
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Leave, if a signal came and no window is open."""
        step = pl_module.optimizer_steps
        agree = trainer.world_size == 1 or step % AGREE_EVERY == 0
        if agree and window_closed(trainer, pl_module):
            self._leave_if_asked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A signal in the last steps or the last validation."""
        self._leave_if_asked(trainer, pl_module)

    def _leave_if_asked(self, trainer: Trainer, pl_module: Any) -> None:
        number = self._agreed(trainer)
        if number:
            step = pl_module.optimizer_steps
            if step != self._checkpoint.saved_step and step > 0:
                self._checkpoint.save(trainer, pl_module)
            log.warning(
                "%s: saved at step %d, leaving with exit code %d; --resume auto continues",
                signal.Signals(number).name,
                step,
                ExitCode.PREEMPTED,
            )
            raise SystemExit(ExitCode.PREEMPTED)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _nothing() -> None:
    pass
