"""Tells in the first epochs that a run goes wrong, and stops one that has collapsed if the recipe asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from rich.console import Console

from sslzoo.callbacks.meter import find_meter
from sslzoo.distributed import world_size
from sslzoo.exits import Collapsed
from sslzoo.terminal import OUT, redraws
from sslzoo.verdict import Verdict, judge_file

log = logging.getLogger(__name__)


class Health(Callback):
    """Judges ``metrics.csv`` after each evaluation, and says so when the verdict changes.

    ``verdict`` is that of the last evaluation, on rank 0. With ``stop``, :class:`Collapsed` is raised on all ranks.
    With ``silent``, nothing is said.
    """

    def __init__(self, metrics: Path, *, stop: bool, silent: bool = False, out: Console = OUT) -> None:
        self.metrics, self.stop, self.silent, self._out = metrics, stop, silent, out
        self.verdict: Verdict | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """What earlier starts of the run have said is not repeated."""
        if trainer.is_global_zero:
            self.verdict = judge_file(self.metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Judge, say and stop."""
        if trainer.is_global_zero:
            before, self.verdict = self.verdict, judge_file(self.metrics)
            state = before.state if before is not None else "healthy"
            if self.verdict is not None and self.verdict.state != state and not self.silent:
                self._say(trainer, self.verdict)
        if self.stop:
            collapsed = self.verdict is not None and self.verdict.state == "collapsed"
            said = [self.verdict.sentence if self.verdict is not None and collapsed else ""]
            if world_size() > 1:
                dist.broadcast_object_list(said, src=0, device=pl_module.device)
            if said[0]:
                raise Collapsed(said[0])

    def _say(self, trainer: Trainer, verdict: Verdict) -> None:
        """A collapse is a warning, and an alert of dashboards; the rest goes to stdout, with the progress, and to the
        log."""
        if verdict.state == "collapsed":
            log.warning("%s", verdict.sentence)
            if (meter := find_meter(trainer)) is not None:
                meter.alert("Collapsed", verdict.sentence)
        else:
            log.info("%s", verdict.sentence)
            self._out.print(verdict.sentence, markup=False, highlight=False, soft_wrap=not redraws(self._out))
