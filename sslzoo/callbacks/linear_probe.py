"""Linear probes beside the training: on the features that each step publishes, at no second forward.

N samples of a micro-batch, F features, C classes, L learning rates.
"""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sslzoo.callbacks.features import Shard, eval_sets, labelled, suffix
from sslzoo.callbacks.meter import log_metrics
from sslzoo.config import ProbeConfig, require
from sslzoo.data.randomness import is_holdout
from sslzoo.distributed import all_reduce_sum, world_size
from sslzoo.evaluate.linear import linear_probe, standardizer, within_top
from sslzoo.method import Batch, EvalBatch, SSLMethod

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet

STATISTICS_RATE = 0.1  # of the running feature statistics: about the last ten steps
EPS = 1e-5  # in the variance, as batch norm has it


class OnlineProbe:
    """L softmax classifiers on the same features, one a learning rate, trained by SGD with momentum.

    The features are standardised by running statistics of the steps before (batch norm without affine
    parameters), which makes learning rates carry over between encoders; the first step only sets them.
    The gradient is in closed form, so nothing can flow back. All sums of a step lie in one vector: one
    all-reduce, in flight while the next batch is computed.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        cfg: ProbeConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.classes, self.width, self.cfg = classes, width, cfg
        rates = len(cfg.lrs)
        self.lrs = torch.tensor(cfg.lrs, device=device, dtype=dtype)[:, None, None]
        self.weight = torch.zeros(rates, classes, 1 + width, device=device, dtype=dtype)  # bias first
        self.velocity = torch.zeros_like(self.weight)
        self.mean = torch.zeros(width, device=device, dtype=dtype)
        self.variance = torch.zeros_like(self.mean)
        self.updates = 0  # steps that entered the statistics
        self._class_index = torch.arange(classes, device=device)
        self._ones = torch.ones(1, 1, device=device, dtype=dtype)
        # Sums over the step: gradient, both moments of the features, samples trained on, samples seen.
        sizes = (self.weight.numel(), width, width, 1, 1)
        self._sums = torch.zeros(sum(sizes), device=device, dtype=dtype)
        gradient, self._first, self._second, self._trained, self._seen = self._sums.split(sizes)
        self._gradient = gradient.view(rates * classes, 1 + width)
        self._work: Any = None
        self._factor: float | None = None  # of the step that has started and not finished

    def logits(self, z: Tensor) -> Tensor:
        """Of standardised features (N, F): (L, N, C)."""
        return self._with_bias(z.to(self.mean.dtype)) @ self.weight.mT

    def _with_bias(self, z: Tensor) -> Tensor:
        return torch.cat([self._ones.expand(len(z), 1), z], dim=1)  # (N, 1+F)

    @torch.no_grad()
    def accumulate(self, x: Tensor, label: Tensor, held_out: Tensor) -> None:
        """Add a micro-batch: features (N, F), labels (N,), negative where unknown, and whether a sample
        is held out (N,): such a sample enters the statistics, its label nothing."""
        self.finish()
        centred = x.detach().to(self.mean.dtype) - self.mean
        self._first += centred.sum(0)
        self._second += (centred * centred).sum(0)
        self._seen += len(x)
        if self.updates == 0:
            return
        trains = ~held_out & (label >= 0)
        self._trained += trains.sum()
        z = self._with_bias(centred * (self.variance + EPS).rsqrt())
        error = (z @ self.weight.flatten(0, 1).T).view(len(z), -1, self.classes).softmax(2)
        # One (N, 1, C) comparison serves all rates.
        error -= (label[:, None] == self._class_index).unsqueeze(1).to(error.dtype)
        error *= trains[:, None, None]
        self._gradient.addmm_(error.flatten(1).T, z)

    @torch.no_grad()
    def start(self, factor: float) -> None:
        """Begin the step whose learning rates are ``factor`` times the configured ones."""
        self._factor = factor
        if world_size() > 1:
            self._work = dist.all_reduce(self._sums, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the step in flight, if there is one."""
        if self._factor is None:
            return
        if self._work is not None:
            self._work.wait()
        if self.updates > 0:
            gradient = (self._gradient / self._trained.clamp_min(1)).view_as(self.weight)
            if self.cfg.weight_decay:
                gradient[..., 1:].add_(self.weight[..., 1:], alpha=self.cfg.weight_decay)
            self.velocity.mul_(self.cfg.momentum).add_(gradient)
            self.weight.addcmul_(self.lrs, self.velocity, value=-self._factor)
        rate = STATISTICS_RATE if self.updates else 1.0
        shift = self._first / self._seen
        self.variance.lerp_((self._second / self._seen - shift * shift).clamp_min_(0), rate)
        self.mean.add_(shift, alpha=rate)
        self.updates += 1
        self._sums.zero_()
        self._factor = self._work = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and one integer, equal on all ranks."""
        self.finish()
        tensors = {"weight": self.weight, "velocity": self.velocity}
        return tensors | {"mean": self.mean, "variance": self.variance, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the shapes must be those of this probe."""
        for name in ("weight", "velocity", "mean", "variance"):
            own, stored = getattr(self, name), state[name]
            require(
                own.shape == stored.shape,
                f"the checkpoint's probe {name} has shape {tuple(stored.shape)}, this run's "
                f"{tuple(own.shape)}; keep probe.lrs, backbone and data as they were",
            )
            own.copy_(stored)
        self.updates = state["updates"]


class LinearProbe(Callback):
    """Train a linear probe a layer on the training data's labels, and measure it at validation.

    The learning rates follow one cosine from the configured values to 0 over the run, without warm-up
    or scaling by the batch. Of the rates, the one most often right on held-out training samples is
    reported (the smallest of equal ones): ``val/linear_top1``, ``val/linear_top5``, ``val/linear_lr``.
    Features of plain images are standardised by the statistics of the plain training images.

    Labelled data of ``probe.data``, which no training batch shows, is measured by
    :func:`sslzoo.evaluate.linear.linear_probe`, fitted anew each time; ``val/linear_l2`` is then the
    chosen strength. The first data set and layer have the plain keys, the others append
    ``/<data>/<layer>``. ``results`` holds the latest values.
    """

    def __init__(self, cfg: ProbeConfig, *, seed: int) -> None:
        self.cfg, self.seed = cfg, seed
        self.results: dict[str, float] = {}
        self.probes: dict[str, OnlineProbe] = {}
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

    def _probe(self, layer: str, x: Tensor) -> OnlineProbe:
        if layer not in self.probes:
            probe = OnlineProbe(self._classes[""], x.shape[1], self.cfg, device=x.device)
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
        probe = self._probe(layer, train_x)
        chosen = _counts(probe, standardize(train_x[held_out]), train_y[held_out])
        test = _counts(probe, standardize(test_x), test_y)
        require(chosen[2][0] > 0, "no training sample is held out to choose the probe; raise probe.holdout")
        require(test[2][0] > 0, "the test set is empty")
        best = max(range(len(self.cfg.lrs)), key=lambda i: (chosen[0][i], -self.cfg.lrs[i]))
        self.results |= {
            f"val/linear_top1{end}": test[0][best] / test[2][best],
            f"val/linear_top5{end}": test[1][best] / test[2][best],
            f"val/linear_lr{end}": self.cfg.lrs[best],
        }

    def _measure_other(self, data: str, layer: str, classes: int, end: str, device: torch.device) -> None:
        train_x, train_y, held_out, test_x, test_y = self._collected(data, layer, device)
        found = linear_probe(train_x, train_y, test_x, test_y, held_out, classes=classes)
        self.results |= {
            f"val/linear_top1{end}": found.top1,
            f"val/linear_top5{end}": found.top5,
            f"val/linear_l2{end}": found.l2,
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


def _counts(probe: OnlineProbe, z: Tensor, label: Tensor) -> list[list[int]]:
    """Over all ranks, by learning rate: samples right at top-1, at top-5, and samples."""
    logits = probe.logits(z)
    top1, top5 = (within_top(logits, label, k).sum(1) for k in (1, 5))
    return all_reduce_sum(torch.stack([top1, top5, torch.full_like(top1, len(z))])).tolist()
