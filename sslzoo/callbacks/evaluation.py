"""What the evaluating callbacks share: the collection of features at validation, and how results are named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sslzoo.batch import EvalBatch
from sslzoo.callbacks.meter import log_metrics
from sslzoo.checks import require
from sslzoo.distributed import world_size
from sslzoo.method import SSLMethod

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet


class Shard:
    """This rank's part of one eval set, collected batch by batch."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._label: list[Tensor] = []
        self._sample_id: list[Tensor] = []

    def add(self, features: Tensor, batch: EvalBatch) -> None:
        """Keep the features (N, F) of ``batch``."""
        self._x.append(features)
        self._label.append(batch.label)
        self._sample_id.append(batch.sample_id)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features (M, F) in float32, labels (M,), sample ids (M,). Collective: a rank whose shard is
        empty learns the width F from the others."""
        width = torch.tensor([self._x[0].shape[1] if self._x else 0], device=device)
        if world_size() > 1:
            dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if not self._x:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return torch.zeros(0, int(width), device=device), none, none
        return torch.cat(self._x).float(), torch.cat(self._label), torch.cat(self._sample_id)


class FeatureEvaluation(Callback, ABC):
    """Collects the published features of every labelled eval set, and reports what a subclass measures.

    ``results`` holds the latest values. Of the first data set and layer they have the plain metric's name;
    the others append ``/<data>/<layer>``, where ``data`` stands for the training data.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers
        self.results: dict[str, float] = {}
        self.classes: dict[str, int] = {}  # by labelled data set; the training data is named ''
        self._sets: list[EvalSet] = []
        self._shards: dict[tuple[str, str, str], Shard] = {}

    @abstractmethod
    def measure(self, pl_module: LightningModule, data: str, layer: str) -> dict[str, float]:
        """Values by plain metric name; empty where there is nothing to measure yet."""

    def collected(
        self, data: str, split: str, layer: str, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's features (M, F), labels (M,) and sample ids (M,). Collective."""
        return self._shards.get((data, split, layer), Shard()).tensors(device)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Learn from the DataModule which sets there are."""
        self._sets = trainer.datamodule.eval_sets()
        self.classes = {s.name: s.num_classes for s in self._sets if s.num_classes > 0}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last measurement."""
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
        """Collect this rank's features."""
        of = self._sets[dataloader_idx]
        if of.num_classes > 0:
            for layer in self.layers:
                shard = self._shards.setdefault((of.name, of.split, layer), Shard())
                shard.add(published(pl_module, layer), batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every data set and layer and log; the features are let go."""
        self.results = {}
        first = (next(iter(self.classes), ""), self.layers[0])
        for data in self.classes:
            for layer in self.layers:
                end = "" if (data, layer) == first else f"/{data or 'data'}/{layer}"
                found = self.measure(pl_module, data, layer)
                self.results |= {name + end: value for name, value in found.items()}
        self._shards = {}
        log_metrics(trainer, self.results)


def published(pl_module: LightningModule, layer: str) -> Tensor:
    """The features of ``layer`` that the step just made public; ``ValueError`` names those there are."""
    assert isinstance(pl_module, SSLMethod)
    known = pl_module.published
    require(
        layer in known,
        f"layer {layer!r} (see probe.layers) is not there: the method publishes {', '.join(known) or 'nothing'}",
    )
    return known[layer]
