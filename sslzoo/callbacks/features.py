"""What the evaluating callbacks share: which sets are labelled, this rank's shards, how results are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from sslzoo.config import require
from sslzoo.distributed import world_size
from sslzoo.method import EvalBatch

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


def eval_sets(trainer: Trainer) -> list[EvalSet]:
    """The DataModule's eval sets, in the order of the validation loaders; ``ValueError`` if two share a name."""
    sets: list[EvalSet] = trainer.datamodule.eval_sets()  # type: ignore[attr-defined]
    names = [s.name for s in sets if s.split == "train"]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"probe.data names {', '.join(twice)} twice; results are reported by data set")
    return sets


def labelled(sets: Iterable[EvalSet]) -> dict[str, int]:
    """Number of classes of each labelled data set; the training data, if among them, is named ''."""
    return {s.name: s.num_classes for s in sets if s.num_classes > 0}


def suffix(data: str, layer: str, *, first: tuple[str, str]) -> str:
    """What follows the metric's name: nothing for the ``first`` (data, layer), else ``/<data>/<layer>``,
    where ``data`` stands for the training data."""
    return "" if (data, layer) == first else f"/{data or 'data'}/{layer}"
