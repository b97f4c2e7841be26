"""Evaluation while a method trains: features are collected at validation, once, and judges say what they are worth."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sslzoo.batch import EvalBatch
from sslzoo.callbacks.meter import log_metrics
from sslzoo.checks import require
from sslzoo.distributed import world_size
from sslzoo.evaluate.figures import Measured, figure_key, figure_name
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.evaluate.logistic import linear_probe
from sslzoo.evaluate.task import Features, Samples, Task, count_samples, roles
from sslzoo.method import SSLMethod
from sslzoo.recipe.sections import EvalConfig, ProbeConfig

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet

log = logging.getLogger(__name__)


class Judge(Protocol):
    """Says what features are worth."""

    name: str  # in the log
    layers: tuple[str, ...]  # that it looks at
    own_data: bool  # whether at the training data alone

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """Values by figure, such as ``linear_top1``; none where there is nothing to measure yet. Collective."""
        ...


class LinearProbe:
    """Fit a logistic regression to the training features of plain images, anew each time: ``linear_top1``,
    ``linear_top5`` and the L2 strength chosen, ``linear_l2``."""

    name, own_data = "linear probe", False

    def __init__(self, cfg: ProbeConfig, *, brief: bool = False) -> None:
        self.layers, self.brief = cfg.layers, brief

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """See :func:`sslzoo.evaluate.logistic.linear_probe`."""
        found = linear_probe(task, brief=self.brief)
        return {"linear_top1": found.top1, "linear_top5": found.top5, "linear_l2": found.l2}


class KNN:
    """Vote each test sample by its nearest training samples: ``knn_top1``."""

    name, layers, own_data = "k-NN", ("backbone",), False

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """See :func:`sslzoo.evaluate.knn.knn_accuracy`."""
        return {"knn_top1": knn_accuracy(task, k=self.cfg.knn_k, temperature=self.cfg.knn_temperature)}


class FeatureEvaluation(Callback):
    """Collects the published features of every labelled data set, lets ``judges`` measure them, and logs
    ``val/<figure>``.

    ``latest`` is what the last validation measured; it is in checkpoints, as the summary of the run needs it.
    """

    def __init__(
        self, judges: Sequence[Judge], probe: ProbeConfig, evaluation: EvalConfig, *, seed: int
    ) -> None:
        self.judges, self.probe, self.evaluation, self.seed = tuple(judges), probe, evaluation, seed
        self.latest: Measured | None = None
        self._sets: list[EvalSet] = []
        self._shards: dict[tuple[str, str, str], Shard] = {}
        # What no judge looks at is not kept.
        self._layers = tuple(dict.fromkeys(layer for judge in judges for layer in judge.layers))

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Learn from the DataModule which sets there are."""
        self._sets = trainer.datamodule.eval_sets()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._shards = {
            (s.name, s.split, layer): Shard(-(-s.size // world_size()))
            for s in self._sets
            for layer in self._layers
        }

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect this rank's features."""
        of = self._sets[dataloader_idx]
        for layer in self._layers:
            self._shards[of.name, of.split, layer].add(published(pl_module, layer), batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every data set and layer and log; the features are let go."""
        figures: dict[str, float] = {}
        samples: dict[str, Samples] = {}
        first = self._sets[0].name
        for train, test in zip(self._sets[::2], self._sets[1::2], strict=True):
            name = figure_name(train.name)
            took: dict[str, float] = {}
            for layer in self._layers:
                task = self._task(train, test, layer, pl_module.device)
                samples[name] = count_samples(task.roles, len(task.test.x), listed=train.size + test.size)
                for judge in self.judges:
                    if layer in judge.layers and not (judge.own_data and train.name):
                        start = time.perf_counter()
                        found = judge.judge(task, layer)
                        took[judge.name] = took.get(judge.name, 0.0) + time.perf_counter() - start
                        for figure, value in found.items():
                            figures[figure_key(figure, train.name, layer, first=first)] = value
            if trainer.is_global_zero:
                seconds = ", ".join(f"{judge} {value:.1f} s" for judge, value in took.items())
                log.info("evaluated on %s: %s; %s", name, samples[name].in_words(), seconds)
        self.latest = Measured(figures, samples)
        log_metrics(trainer, {f"val/{key}": value for key, value in figures.items()})

    def _task(self, train: EvalSet, test: EvalSet, layer: str, device: torch.device) -> Task:
        """What was collected of a data set. Collective."""
        shares = [self._shards.pop((s.name, s.split, layer)).features(device) for s in (train, test)]
        roles_of = roles(shares[0].sample_id, len(train.source), self.probe, self.evaluation, self.seed)
        return Task(shares[0], shares[1], roles_of, train.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """What was measured last."""
        return {} if self.latest is None else self.latest.to_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""
        self.latest = Measured.from_state(state_dict) if state_dict else None


class Shard:
    """This rank's part of one eval set, at most ``rows`` samples, collected batch by batch without a second copy."""

    def __init__(self, rows: int) -> None:
        self._rows, self._filled = rows, 0
        self._x: Tensor | None = None
        self._label: list[Tensor] = []
        self._sample_id: list[Tensor] = []

    def add(self, features: Tensor, batch: EvalBatch) -> None:
        """Keep the features (N, F) of ``batch``."""
        if self._x is None:
            shape = (self._rows, features.shape[1])
            self._x = torch.empty(shape, dtype=torch.float32, device=features.device)
        self._x[self._filled : self._filled + len(features)] = features
        self._filled += len(features)
        self._label.append(batch.label)
        self._sample_id.append(batch.sample_id)

    def features(self, device: torch.device) -> Features:
        """What there is, M samples. Collective: a rank whose shard is empty learns the width F from the others."""
        width = torch.tensor([0 if self._x is None else self._x.shape[1]], device=device)
        if world_size() > 1:
            dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if self._x is None:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return Features(torch.zeros(0, int(width), device=device), none, none)
        return Features(self._x[: self._filled], torch.cat(self._label), torch.cat(self._sample_id))


def published(pl_module: LightningModule, layer: str) -> Tensor:
    """The features of ``layer`` that the step just made public; ``ValueError`` names those there are."""
    assert isinstance(pl_module, SSLMethod)
    known = pl_module.published
    require(
        layer in known,
        f"layer {layer!r} (see probe.layers) is not there: the method publishes {', '.join(known) or 'nothing'}",
    )
    return known[layer]
