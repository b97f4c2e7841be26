"""Angles, probabilities and gradient factors of margins while any contrastive method trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import radians
from typing import Any

from lightning.pytorch import Callback, Trainer

from sslzoo.batch import Batch
from sslzoo.callbacks.meter import find_meter, log_metrics
from sslzoo.checks import require
from sslzoo.evaluate.margins import describe, margin_name, observe_batch, temperature_of
from sslzoo.margins import Margin


def _metrics(prefix: str, scalars: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The first margin's scalars under ``prefix``, the others' under their names."""
    first, *others = scalars
    values = {f"{prefix}/{key}": value for key, value in scalars[first].items()}
    return values | {f"{prefix}/{name}/{key}": v for name in others for key, v in scalars[name].items()}


class MarginAnalysis(Callback):
    """Asks every ``every_steps`` optimiser steps what margins would do to the embeddings of the batch.

    ``margins``: pairs (m1 in degrees, m2). ``temperature`` of 0 takes the method's own. Before the step the views
    that :meth:`SSLMethod.contrasted` names go once more through the network, without gradient; random numbers,
    batch-norm statistics and all other buffers are put back, so training is bit-identical with and without.
    An anchor's negatives are the other samples' positives, whatever the loss itself has.

    Metrics ``margins/theta_mean`` and so on for the first margin, ``margins/m1=..,m2=../...`` for the others,
    ``margins/local/theta_mean`` for local crops. ``history``, which is in checkpoints, holds a record a time:
    step, epoch, temperature, the histogram of the angles in 36 bins of 5 degrees, the scalars of every margin,
    and those two of other pairs under the name of their kind.
    """

    def __init__(
        self, margins: Sequence[tuple[float, float]], *, every_steps: int = 100, temperature: float = 0.0
    ) -> None:
        require(len(margins) > 0, "margin analysis needs at least one margin, such as (10.0, 0.0)")
        require(every_steps > 0, f"every_steps must be positive, got {every_steps}")
        self.margins = {
            margin_name(m1, m2): Margin(angular=radians(m1), subtractive=m2) for m1, m2 in margins
        }
        self.every_steps, self.temperature = every_steps, temperature
        self.history: list[dict[str, Any]] = []
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a method without a temperature before anything runs."""
        temperature_of(pl_module, self.temperature)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Look at the first micro-batch of a step that is due."""
        step = pl_module.optimizer_steps
        if step % self.every_steps or step == self._last_step:
            return
        self._last_step = step
        temperature = temperature_of(pl_module, self.temperature)
        with trainer.precision_plugin.forward_context():
            seen = observe_batch(pl_module, batch, temperature=temperature)
        found = describe(seen, self.margins, temperature=temperature)
        when = {"step": step, "epoch": trainer.current_epoch, "temperature": temperature}
        self.history.append(when | found)
        meter = find_meter(trainer)
        if meter is not None:
            values = _metrics("margins", found["margins"])
            for kind in seen:
                if kind != "global":
                    values |= _metrics(f"margins/{kind}", found[kind]["margins"])
            log_metrics(trainer, values)
            meter.restart_clock()  # what this cost is no training time

    def state_dict(self) -> dict[str, Any]:
        """The history, equal on all ranks."""
        return {"history": self.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history."""
        self.history, self._last_step = list(state_dict["history"]), state_dict["last_step"]
