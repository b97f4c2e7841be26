"""Run an analysis during training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from sslzoo.analysis import Analysis
from sslzoo.batch import Batch
from sslzoo.callbacks.meter import find_meter, log_metrics


class Watch(Callback):
    """Applies ``analysis`` to a batch every ``every_steps`` optimiser steps (in its config), before the step.

    Method and random state are restored afterwards, so training is bit-identical with and without it. ``history``,
    saved in checkpoints, has a record per analysed batch: ``step``, ``epoch`` and the analysis's description. Its
    metrics are written to ``metrics.csv``.
    """

    def __init__(self, analysis: Analysis[Any]) -> None:
        self.analysis = analysis
        self.history: list[dict[str, Any]] = []
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Key of the history in checkpoints, which includes the analysis's name because there may be several."""
        return f"{type(self).__qualname__} {self.analysis.cfg.name}"

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Analyse the first micro-batch of every ``every_steps``-th step."""
        step = pl_module.optimizer_steps
        if step % self.analysis.cfg.every_steps or step == self._last_step:
            return
        self._last_step = step
        with trainer.precision_plugin.forward_context():
            seen = self.analysis.observe(pl_module, batch)
        described = self.analysis.describe([seen])
        self.history.append({"step": step, "epoch": trainer.current_epoch} | described)
        meter = find_meter(trainer)
        if meter is not None:
            log_metrics(trainer, self.analysis.metrics(described))
            meter.restart_clock()  # exclude the analysis from the training time

    def state_dict(self) -> dict[str, Any]:
        """The history, equal on all ranks."""
        return {"history": self.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history, self._last_step = list(state_dict["history"]), state_dict["last_step"]
