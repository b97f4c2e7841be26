"""Linear probe trained alongside the method, on the features that each step publishes anyway.

Shapes: N samples in a micro-batch, F features, C classes, L learning rates.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sslzoo.batch import Batch
from sslzoo.callbacks.evaluation import published
from sslzoo.evaluate.metrics import standardizer
from sslzoo.evaluate.sgd_probe import SGDProbe, choose
from sslzoo.evaluate.task import Task
from sslzoo.method import SSLMethod
from sslzoo.randomness import is_holdout
from sslzoo.recipe.sections import ProbeConfig


class OnlineProbe(Callback):
    """Trains a linear probe per layer on the labels (``classes`` classes) of the training data. At validation it is one
    of the judges: ``online_top1``, ``online_top5``, ``online_lr``.

    It is trained on augmented views and tested on plain images, which can cost 10 points of accuracy with small crops,
    so it shows the progress of the training rather than the quality of the features.

    The learning rates follow a cosine from the configured values to 0 over the run, without warm-up or scaling with
    the batch size. The reported rate is the one with the best accuracy on held-out training samples (ties: the
    smallest). Features of plain images are standardised with statistics of the plain training images. Each step costs
    an all-reduce of L x C x (1 + F) numbers per layer.
    """

    name, own_data = "online probe", True

    def __init__(self, cfg: ProbeConfig, *, classes: int, seed: int) -> None:
        self.cfg, self.classes, self.seed = cfg, classes, seed
        self.layers = cfg.layers
        self.probes: dict[str, SGDProbe] = {}
        self._restored: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._held_out = torch.zeros(0, dtype=torch.bool)  # by sample id

    # -- training -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue counting steps from the method's count, and determine the held-out samples."""
        assert isinstance(pl_module, SSLMethod)
        self._steps = pl_module.optimizer_steps
        ids = torch.arange(pl_module.plan.dataset_size, device=pl_module.device)
        self._held_out = is_holdout(ids, self.cfg.holdout, self.seed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the micro-batch. Take a step after an optimiser step, or drop the sums if that step was skipped."""
        assert isinstance(pl_module, SSLMethod) and batch.label is not None
        held_out = self._held_out[batch.sample_id]
        stepped = pl_module.optimizer_steps > self._steps
        # self._steps is the step that these features belong to, from 0.
        factor = 0.5 * (1 + cos(pi * self._steps / pl_module.plan.total_steps))
        for layer in self.layers:
            x = published(pl_module, layer)
            probe = self._probe(layer, x.shape[1], x.device)
            probe.accumulate(x, batch.label, held_out)
            if stepped and pl_module.step_skipped:
                probe.drop()
            elif stepped:
                probe.start(factor)
        self._steps = pl_module.optimizer_steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the step in progress."""
        for probe in self.probes.values():
            probe.finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the last step."""
        for probe in self.probes.values():
            probe.finish()

    def _probe(self, layer: str, width: int, device: torch.device) -> SGDProbe:
        if layer not in self.probes:
            probe = SGDProbe(self.classes, width, self.cfg, device=device)
            if layer in self._restored:
                probe.load_state_dict(self._restored.pop(layer))
            self.probes[layer] = probe
        return self.probes[layer]

    # -- validation ---------------------------------------------------------------------------

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """Measure the current probe; empty before the first training step."""
        if layer not in self.probes and layer not in self._restored:
            return {}
        # Plain images have different statistics from augmented views.
        standardize = standardizer(task.train, task.train.finite().nonzero().squeeze(1))
        result = choose(self._probe(layer, task.train.x.shape[1], task.train.device), task, standardize)
        return {"online_top1": result.top1, "online_top5": result.top5, "online_lr": result.lr}

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The probes' tensors, by layer."""
        return self._restored | {layer: probe.state_dict() for layer, probe in self.probes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the shapes are known from the first features."""
        self._restored = dict(state_dict)
        self.probes = {}
