"""Redraw the page of a run while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer

from sslzoo.callbacks.share import Share

log = logging.getLogger(__name__)


class PageRefresh(Callback):
    """Calls ``draw`` on rank 0 after evaluations, while that takes at most one per cent of the time.

    A failure does not end the run: the next evaluation tries again. Each kind of error is logged once.
    """

    def __init__(self, draw: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._draw, self._share = draw, Share(clock)
        self._failures: set[type[Exception]] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the time."""
        self._share.start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the page with what the evaluation has found."""
        if not trainer.is_global_zero or not self._share.allows():
            return
        try:
            with self._share.spent():
                self._draw()
        except Exception as error:
            if type(error) not in self._failures:
                log.warning("report.html could not be drawn: %s: %s", type(error).__name__, error)
            self._failures.add(type(error))
