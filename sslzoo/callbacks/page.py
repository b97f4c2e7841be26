"""Redraw the page of a run while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

SHARE = 0.01  # of the time since the start, at most, goes into drawing


class PageRefresh(Callback):
    """Calls ``draw`` on rank 0 after evaluations, while that takes at most one per cent of the time.

    A failure is logged once, and nothing is drawn any more: a page must not end a run.
    """

    def __init__(self, draw: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._draw, self._clock = draw, clock
        self._begin: float | None = None
        self._spent = self._last = 0.0
        self._failed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the time."""
        self._begin = self._clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the page with what the evaluation has found."""
        assert self._begin is not None
        if self._spent + self._last <= SHARE * (self._clock() - self._begin):
            self._refresh(trainer)

    def _refresh(self, trainer: Trainer) -> None:
        if self._failed or not trainer.is_global_zero:
            return
        start = self._clock()
        try:
            self._draw()
        except Exception as error:
            self._failed = True
            log.warning("report.html could not be drawn: %s: %s", type(error).__name__, error)
        self._last = self._clock() - start
        self._spent += self._last
