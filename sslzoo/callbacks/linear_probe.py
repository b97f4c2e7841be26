"""Linear probes beside the training: on the features that each step publishes, at no second forward.

N samples of a micro-batch, F features, C classes, L learning rates.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sslzoo.batch import Batch
from sslzoo.callbacks.evaluation import FeatureEvaluation, published
from sslzoo.evaluate.metrics import standardizer
from sslzoo.evaluate.sgd_probe import SGDProbe, choose, linear_evaluation
from sslzoo.method import SSLMethod
from sslzoo.randomness import is_holdout
from sslzoo.recipe.sections import ProbeConfig


class LinearProbe(FeatureEvaluation):
    """Train a linear probe a layer on the training data's labels, and measure it at validation.

    The learning rates follow one cosine from the configured values to 0 over the run, without warm-up
    or scaling by the batch. Of the rates, the one most often right on held-out training samples is
    reported (the smallest of equal ones): ``val/linear_top1``, ``val/linear_top5``, ``val/linear_lr``.
    Features of plain images are standardised by the statistics of the plain training images.

    Labelled data of ``probe.data``, which no training batch shows, is measured by
    :func:`sslzoo.evaluate.sgd_probe.linear_evaluation`, trained anew each time; ``brief``, for one epoch.
    """

    def __init__(self, cfg: ProbeConfig, *, seed: int, brief: bool = False) -> None:
        super().__init__(cfg.layers)
        self.cfg, self.seed, self.brief = cfg, seed, brief
        self.probes: dict[str, SGDProbe] = {}
        self._restored: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._held_out = torch.zeros(0, dtype=torch.bool)  # by sample id

    # -- training -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the count of optimiser steps where it stands; look up held-out samples from now on."""
        assert isinstance(pl_module, SSLMethod)
        self._steps = pl_module.optimizer_steps
        if "" in self.classes:
            ids = torch.arange(pl_module.plan.dataset_size, device=pl_module.device)
            self._held_out = is_holdout(ids, self.cfg.holdout, self.seed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the micro-batch; step when the optimiser has stepped, drop the sums when it was to and did not."""
        if batch.label is None or "" not in self.classes:
            return
        assert isinstance(pl_module, SSLMethod)
        held_out = self._held_out[batch.sample_id]
        stepped = pl_module.optimizer_steps > self._steps
        # The step that these features belong to, from 0.
        factor = 0.5 * (1 + cos(pi * self._steps / pl_module.plan.total_steps))
        for layer in self.layers:
            x = published(pl_module, layer)
            probe = self._probe(layer, x)
            probe.accumulate(x, batch.label, held_out)
            if stepped and pl_module.step_skipped:
                probe.drop()
            elif stepped:
                probe.start(factor)
        self._steps = pl_module.optimizer_steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the last step."""
        for probe in self.probes.values():
            probe.finish()

    def _probe(self, layer: str, x: Tensor) -> SGDProbe:
        if layer not in self.probes:
            probe = SGDProbe(self.classes[""], x.shape[1], self.cfg, device=x.device)
            if layer in self._restored:
                probe.load_state_dict(self._restored.pop(layer))
            self.probes[layer] = probe
        return self.probes[layer]

    # -- validation ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the step in flight and forget the last measurement."""
        for probe in self.probes.values():
            probe.finish()
        super().on_validation_start(trainer, pl_module)

    def measure(self, pl_module: LightningModule, data: str, layer: str) -> dict[str, float]:
        """The training data by the probe that learned beside it, other data by one of its own."""
        train_x, train_y, ids = self.collected(data, "train", layer, pl_module.device)
        test_x, test_y, _ = self.collected(data, "test", layer, pl_module.device)
        held_out = is_holdout(ids, self.cfg.holdout, self.seed)
        if data:
            train, test, classes = (train_x, train_y), (test_x, test_y), self.classes[data]
            found = linear_evaluation(
                train, test, held_out, self.cfg, classes=classes, seed=self.seed, brief=self.brief
            )
        elif layer in self.probes or layer in self._restored:
            # Plain images are not distributed like augmented views: they have statistics of their own.
            standardize = standardizer(train_x)
            held_out_set = standardize(train_x[held_out]), train_y[held_out]
            found = choose(self._probe(layer, train_x), held_out_set, (standardize(test_x), test_y))
        else:  # no step of training yet
            return {}
        return {"val/linear_top1": found.top1, "val/linear_top5": found.top5, "val/linear_lr": found.lr}

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The probes' tensors, by layer."""
        return self._restored | {layer: probe.state_dict() for layer, probe in self.probes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the first features tell the shapes."""
        self._restored = dict(state_dict)
        self.probes = {}
