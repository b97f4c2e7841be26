"""Linear probes beside the training: on the features that each step publishes, at no second forward.

N samples of a micro-batch, F features, C classes, L learning rates.
"""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sslzoo.callbacks.features import Shard, eval_sets, labelled, suffix
from sslzoo.callbacks.meter import log_metrics
from sslzoo.config import ProbeConfig, require
from sslzoo.data.randomness import is_holdout
from sslzoo.evaluate.linear import standardizer
from sslzoo.evaluate.sgd_probe import LinearResult, SGDProbe, choose, linear_evaluation
from sslzoo.method import Batch, EvalBatch, SSLMethod

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet


class LinearProbe(Callback):
    """Train a linear probe a layer on the training data's labels, and measure it at validation.

    The learning rates follow one cosine from the configured values to 0 over the run, without warm-up
    or scaling by the batch. Of the rates, the one most often right on held-out training samples is
    reported (the smallest of equal ones): ``val/linear_top1``, ``val/linear_top5``, ``val/linear_lr``.
    Features of plain images are standardised by the statistics of the plain training images.

    Labelled data of ``probe.data``, which no training batch shows, is measured by
    :func:`sslzoo.evaluate.sgd_probe.linear_evaluation`, trained anew each time. The first data set and
    layer have the plain keys, the others append ``/<data>/<layer>``. ``results`` holds the latest values.
    """

    def __init__(self, cfg: ProbeConfig, *, seed: int) -> None:
        self.cfg, self.seed = cfg, seed
        self.results: dict[str, float] = {}
        self.probes: dict[str, SGDProbe] = {}
        self._sets: list[EvalSet] = []
        self._classes: dict[str, int] = {}
        self._restored: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._shards: dict[tuple[str, str, str], Shard] = {}

    # -- training -----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn from the DataModule which sets there are."""
        self._sets = eval_sets(trainer)
        self._classes = labelled(self._sets)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the count of optimiser steps where it stands."""
        assert isinstance(pl_module, SSLMethod)
        self._steps = pl_module.optimizer_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the micro-batch; step when the optimiser has stepped."""
        if batch.label is None or "" not in self._classes:
            return
        assert isinstance(pl_module, SSLMethod)
        held_out = is_holdout(batch.sample_id, self.cfg.holdout, self.seed)
        stepped = pl_module.optimizer_steps > self._steps
        # The step that these features belong to, from 0.
        factor = 0.5 * (1 + cos(pi * self._steps / pl_module.plan.total_steps))
        for layer in self.cfg.layers:
            x = self._features(pl_module, layer)
            probe = self._probe(layer, x)
            probe.accumulate(x, batch.label, held_out)
            if stepped:
                probe.start(factor)
        self._steps = pl_module.optimizer_steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the last step."""
        for probe in self.probes.values():
            probe.finish()

    def _features(self, pl_module: SSLMethod[Any], layer: str) -> Tensor:
        known = pl_module.published
        require(
            layer in known,
            f"probe.layers names {layer!r}, but the method publishes {', '.join(known) or 'nothing'}",
        )
        return known[layer]

    def _probe(self, layer: str, x: Tensor) -> SGDProbe:
        if layer not in self.probes:
            probe = SGDProbe(self._classes[""], x.shape[1], self.cfg, device=x.device)
            if layer in self._restored:
                probe.load_state_dict(self._restored.pop(layer))
            self.probes[layer] = probe
        return self.probes[layer]

    # -- validation ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the step in flight and forget the last measurement."""
        for probe in self.probes.values():
            probe.finish()
        self._shards = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the features."""
        of = self._sets[dataloader_idx]
        if of.num_classes > 0:
            assert isinstance(pl_module, SSLMethod)
            for layer in self.cfg.layers:
                shard = self._shards.setdefault((of.name, of.split, layer), Shard())
                shard.add(self._features(pl_module, layer), batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the learning rates and log."""
        device = pl_module.device
        self.results = {}
        first = (next(iter(self._classes), ""), self.cfg.layers[0])
        for data, classes in self._classes.items():
            for layer in self.cfg.layers:
                end = suffix(data, layer, first=first)
                if data:
                    self._measure_other(data, layer, classes, end, device)
                elif layer in self.probes or layer in self._restored:
                    self._measure_own(layer, end, device)
        self._shards = {}
        log_metrics(trainer, self.results)

    def _measure_own(self, layer: str, end: str, device: torch.device) -> None:
        train_x, train_y, held_out, test_x, test_y = self._collected("", layer, device)
        # Plain images are not distributed like augmented views: they have statistics of their own.
        standardize = standardizer(train_x)
        held_out_set = standardize(train_x[held_out]), train_y[held_out]
        self._report(choose(self._probe(layer, train_x), held_out_set, (standardize(test_x), test_y)), end)

    def _measure_other(self, data: str, layer: str, classes: int, end: str, device: torch.device) -> None:
        train_x, train_y, held_out, test_x, test_y = self._collected(data, layer, device)
        found = linear_evaluation(
            (train_x, train_y), (test_x, test_y), held_out, self.cfg, classes=classes, seed=self.seed
        )
        self._report(found, end)

    def _report(self, found: LinearResult, end: str) -> None:
        self.results |= {
            f"val/linear_top1{end}": found.top1,
            f"val/linear_top5{end}": found.top5,
            f"val/linear_lr{end}": found.lr,
        }

    def _collected(
        self, data: str, layer: str, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """This rank's training features, labels and which are held out; test features and labels."""
        x, y, ids = self._shards.get((data, "train", layer), Shard()).tensors(device)
        test_x, test_y, _ = self._shards.get((data, "test", layer), Shard()).tensors(device)
        return x, y, is_holdout(ids, self.cfg.holdout, self.seed), test_x, test_y

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The probes' tensors, by layer."""
        return self._restored | {layer: probe.state_dict() for layer, probe in self.probes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the first features tell the shapes."""
        self._restored = dict(state_dict)
        self.probes = {}
