"""Evaluation during training: features are collected once per validation, and judges measure their quality."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sslzoo.batch import EvalBatch
from sslzoo.callbacks.meter import log_metrics
from sslzoo.callbacks.representation import Representation
from sslzoo.checks import require
from sslzoo.distributed import world_size
from sslzoo.evaluate import logistic
from sslzoo.evaluate.figures import LAYER, Measured, figure_key, figure_name
from sslzoo.evaluate.gallery import gallery
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.evaluate.logistic import linear_probe
from sslzoo.evaluate.task import Features, Roles, Samples, Task, count_samples, roles
from sslzoo.files import write_json
from sslzoo.method import SSLMethod
from sslzoo.recipe.sections import EvalConfig, ProbeConfig

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet

log = logging.getLogger(__name__)


class Judge(Protocol):
    """Measures the quality of features."""

    name: str  # in log messages
    layers: tuple[str, ...]  # the layers it measures
    own_data: bool  # whether it only measures the training data's own labels

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """Values by figure, such as ``linear_top1``; empty if there is nothing to measure yet. Collective."""
        ...


class LinearProbe:
    """Logistic regression on features of plain training images, fitted from scratch each time: ``linear_top1``,
    ``linear_top5`` and the selected L2 strength ``linear_l2``."""

    name, own_data = "linear probe", False

    def __init__(self, cfg: ProbeConfig, *, brief: bool = False) -> None:
        self.layers, self.brief = cfg.layers, brief

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """See :func:`sslzoo.evaluate.logistic.linear_probe`."""
        result = linear_probe(task, effort=logistic.QUICK, brief=self.brief)
        return {"linear_top1": result.top1, "linear_top5": result.top5, "linear_l2": result.l2}


class KNN:
    """Weighted k-NN classification of test samples by training samples: ``knn_top1``."""

    name, layers, own_data = "k-NN", ("backbone",), False

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg

    def judge(self, task: Task, layer: str) -> dict[str, float]:
        """See :func:`sslzoo.evaluate.knn.knn_accuracy`."""
        return {"knn_top1": knn_accuracy(task, k=self.cfg.knn_k, temperature=self.cfg.knn_temperature)}


class FeatureEvaluation(Callback):
    """Collects the published features of every labelled data set, applies ``judges`` to them, and logs the results as
    ``val/<figure>``. Those of the plain training images, which need no labels, are also measured by
    ``representation``, and logged as ``repr/<figure>``.

    ``latest`` has the results of the last validation; it is saved in checkpoints for the summary of the run.
    Neighbours and map of the features of the first labelled data set, or else of the plain training images, are written
    to the file ``pictures``, if there is one.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        representation: Representation,
        probe: ProbeConfig,
        evaluation: EvalConfig,
        *,
        seed: int,
        pictures: Path | None = None,
    ) -> None:
        self.judges, self.representation = tuple(judges), representation
        self.probe, self.evaluation, self.seed = probe, evaluation, seed
        self.pictures = pictures
        self.latest: Measured | None = None
        self._sets: list[EvalSet] = []
        self._shards: dict[tuple[str, str, str], Shard] = {}
        # Only layers that are needed are collected.
        self._layers = tuple(dict.fromkeys([LAYER, *(layer for judge in judges for layer in judge.layers)]))

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Get the evaluation sets from the DataModule."""
        self._sets = trainer.datamodule.validation_sets()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty shards."""
        self._shards = {
            (s.name, s.split, layer): Shard(-(-s.size // world_size()))
            for s in self._sets
            for layer in self._layers
            if s.num_classes or layer == LAYER
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
        eval_set = self._sets[dataloader_idx]
        for layer in self._layers if eval_set.num_classes else (LAYER,):
            self._shards[eval_set.name, eval_set.split, layer].add(published(pl_module, layer), batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log every data set and layer, and free the features."""
        figures: dict[str, float] = {}
        samples: dict[str, Samples] = {}
        representation: dict[str, float] = {}
        labelled = [s for s in self._sets if s.num_classes]
        first = self._sets[0].name
        for train, test in zip(labelled[::2], labelled[1::2], strict=True):
            name = figure_name(train.name)
            took: dict[str, float] = {}
            for layer in self._layers:
                task = self._task(train, test, layer, pl_module.device)
                if (train.name, layer) == ("", LAYER):
                    representation = self._represented(trainer, pl_module, train, *task.train)
                samples[name] = count_samples(task.roles, len(task.test.x), listed=train.size + test.size)
                for judge in self.judges:
                    if layer in judge.layers and not (judge.own_data and train.name):
                        start = time.perf_counter()
                        results = judge.judge(task, layer)
                        took[judge.name] = took.get(judge.name, 0.0) + time.perf_counter() - start
                        for figure, value in results.items():
                            figures[figure_key(figure, train.name, layer, first=first)] = value
                if (train.name, layer) == (labelled[0].name, LAYER):
                    start = time.perf_counter()
                    self._picture(task, train, test, trainer, pl_module)
                    took["pictures"] = time.perf_counter() - start
            if trainer.is_global_zero:
                seconds = ", ".join(f"{judge} {value:.1f} s" for judge, value in took.items())
                log.info("evaluated on %s: %s; %s", name, samples[name].in_words(), seconds)
        for plain in (s for s in self._sets if not s.num_classes):
            shard = self._shards.pop((plain.name, plain.split, LAYER))
            x, sample_id = shard.rows(pl_module.device)
            representation = self._represented(trainer, pl_module, plain, x, None, sample_id)
            if not labelled:
                shown = Features(x, torch.full_like(sample_id, -1), sample_id)
                every = torch.ones_like(sample_id, dtype=torch.bool)
                task = Task(shown, shown, Roles(every, every, every), 0)
                self._picture(task, plain, plain, trainer, pl_module)
        self.latest = Measured(figures, samples, representation)
        values = {f"val/{key}": value for key, value in figures.items()}
        log_metrics(trainer, values | {f"repr/{key}": value for key, value in representation.items()})

    def _represented(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        of: EvalSet,
        x: Tensor,
        label: Tensor | None,
        sample_id: Tensor,
    ) -> dict[str, float]:
        assert isinstance(pl_module, SSLMethod)
        start = time.perf_counter()
        found = self.representation.measure(trainer, pl_module, of, x, label, sample_id)
        if trainer.is_global_zero:
            log.info("representation of plain images: %.1f s", time.perf_counter() - start)
        return found

    def _picture(
        self, task: Task, train: EvalSet, test: EvalSet, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Write neighbours and map, with the step that they are of, if there is a file for them. Collective."""
        assert isinstance(pl_module, SSLMethod)
        if self.pictures is None:
            return
        drawn = gallery(task, train, test)
        if drawn is None:
            return
        at = {"step": pl_module.optimizer_steps, "epoch": trainer.current_epoch + 1}
        try:
            self.pictures.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.pictures, at | drawn)
        except OSError as error:  # pictures must not end a run
            log.warning("%s could not be written: %s", self.pictures, error)

    def _task(self, train: EvalSet, test: EvalSet, layer: str, device: torch.device) -> Task:
        """The collected features of a data set. Collective."""
        shares = [self._shards.pop((s.name, s.split, layer)).features(device) for s in (train, test)]
        roles_of = roles(shares[0].sample_id, len(train.source), self.probe, self.evaluation, self.seed)
        return Task(shares[0], shares[1], roles_of, train.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """The results of the last validation, and what the next one compares with."""
        if self.latest is None:
            return {}
        return self.latest.to_state() | {"neighbours": self.representation.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the results."""
        self.latest = Measured.from_state(state_dict) if state_dict else None
        self.representation.load_state_dict(state_dict.get("neighbours", {}))


class Shard:
    """This rank's part of an evaluation set, at most ``rows`` samples, collected batch by batch without copies."""

    def __init__(self, rows: int) -> None:
        self._rows, self._filled = rows, 0
        self._x: Tensor | None = None
        self._label: list[Tensor] = []
        self._sample_id: list[Tensor] = []

    def add(self, features: Tensor, batch: EvalBatch) -> None:
        """Append the features (N, F) of ``batch``."""
        if self._x is None:
            shape = (self._rows, features.shape[1])
            self._x = torch.empty(shape, dtype=torch.float32, device=features.device)
        self._x[self._filled : self._filled + len(features)] = features
        self._filled += len(features)
        if batch.label is not None:
            self._label.append(batch.label)
        self._sample_id.append(batch.sample_id)

    def features(self, device: torch.device) -> Features:
        """The collected features of M labelled samples. Collective."""
        x, sample_id = self.rows(device)
        return Features(x, torch.cat([sample_id[:0], *self._label]), sample_id)

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The collected features (M, F) and sample_id (M,). Collective: a rank without samples gets the width F from
        others."""
        width = torch.tensor([0 if self._x is None else self._x.shape[1]], device=device)
        if world_size() > 1:
            dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if self._x is None:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return torch.zeros(0, int(width), device=device), none
        return self._x[: self._filled], torch.cat(self._sample_id)


def published(pl_module: LightningModule, layer: str) -> Tensor:
    """The features of ``layer`` published by this step; ``ValueError`` lists the published layers."""
    assert isinstance(pl_module, SSLMethod)
    known = pl_module.published
    require(
        layer in known,
        f"layer {layer!r} (see probe.layers) is not published; the method publishes {', '.join(known) or 'none'}",
    )
    return known[layer]
