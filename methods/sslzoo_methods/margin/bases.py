"""The base frameworks: their modules, the pairs they compare, and their total loss.

Shapes: N samples on this rank, M on all ranks, V global views, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sslzoo.distributed import gather, gather_detached, rank, world_size
from sslzoo.nn.heads import build_head
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.numerics import normalize
from sslzoo.nn.queue import FeatureQueue
from sslzoo.nn.shuffle import shuffle, shuffled_order, unshuffle
from sslzoo.optim.schedules import ema_momentum
from sslzoo_methods.margin.config import (
    BYOLConfig,
    MoCoV2Config,
    MoCoV3Config,
    SimCLRConfig,
    SimSiamConfig,
)
from sslzoo_methods.margin.factors import Chunk, Pairs
from sslzoo_methods.margin.loss import attract, contrast, contrast_queue

ConfigT = TypeVar("ConfigT", SimCLRConfig, MoCoV2Config, MoCoV3Config, BYOLConfig, SimSiamConfig)
MomentumT = TypeVar("MomentumT", MoCoV2Config, MoCoV3Config, BYOLConfig)

Push = Callable[[int], Callable[[Pairs], Tensor]]  # from the number of negatives per anchor to Chunk.push


class Crops(NamedTuple):
    """The output of the online branch for a batch."""

    views: tuple[Tensor, ...]  # images of the global views
    projected: list[Tensor]  # projections (N, D) of each global view, then of each local view
    queries: list[Tensor]  # the same after the predictor, if there is one
    seed: int  # ShuffleBN's order is a function of seed and step
    step: int


class Term(NamedTuple):
    """The pairs of one query view and one key view (in NT-Xent of both views at once)."""

    pairs: Pairs
    negatives: int  # number per anchor
    local: bool  # whether the query is a local crop


class Base(ABC, Generic[ConfigT]):
    """A base framework. The method registers its modules and saves them under its own names."""

    predictor: nn.Module | None = None

    def __init__(self, cfg: ConfigT, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        self.cfg = cfg

    @abstractmethod
    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """The pairs that the loss compares. ``push`` is needed for losses in chunks alone."""

    def total(self, mean: Tensor) -> Tensor:
        """The loss as a function of the mean over the terms."""
        return mean

    def after_step(self, step: int, total_steps: int) -> None:
        """Update state that changes once per optimiser step."""

    def after_skipped_step(self) -> None:
        """Drop anything kept for :meth:`after_step`."""


class SimCLR(Base[SimCLRConfig]):
    """NT-Xent: both views are contrasted with both views of the global batch. With more than two crops, each crop is
    contrasted with every other global view."""

    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """Keys are the projections of all ranks, with gradients."""
        views = len(crops.views)
        keys = gather(torch.stack(crops.projected[:views], dim=1)).unbind(dim=1)  # (M, D) per view
        rows, m = _own_rows(crops.queries[0]), len(keys[0])
        if len(crops.queries) == 2:
            negatives = 2 * m - 2
            chunk = _chunk(self.cfg.chunk_size, push, negatives)
            candidates, own = torch.cat(keys), torch.cat([rows, rows + m])
            anchors, positive = torch.cat(crops.queries), torch.cat([rows + m, rows])
            pairs = contrast(anchors, candidates, positive, own=own, temperature=temperature, chunk=chunk)
            return [Term(pairs, negatives, local=False)]
        chunk = _chunk(self.cfg.chunk_size, push, m - 1)
        return _cross_views(
            crops,
            dict(enumerate(keys)),
            lambda q, k: contrast(q, k, rows, own=None, temperature=temperature, chunk=chunk),
            negatives=m - 1,
        )


class MomentumBase(Base[MomentumT]):
    """A base whose keys come from a momentum encoder."""

    def __init__(self, cfg: MomentumT, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        super().__init__(cfg, backbone, projector, width)
        self.online = (backbone, projector)
        self.target = MomentumEncoder(*self.online)

    def encode(self, views: tuple[Tensor, ...]) -> Tensor:
        """Keys (N, V, D) of this rank, without gradients."""
        return torch.stack([self.target(view) for view in views], dim=1)

    def after_step(self, step: int, total_steps: int) -> None:
        """Update the momentum encoder."""
        start, end = self.cfg.momentum_start, self.cfg.momentum_end
        coefficient = ema_momentum(step, total_steps=total_steps, start=start, schedule="cosine", end=end)
        self.target.update(*self.online, coefficient=coefficient)


class MoCoV2(MomentumBase[MoCoV2Config]):
    """Contrasts queries with their momentum key and a queue of earlier keys, the only negatives; the loss is the mean
    over the orders of the views."""

    def __init__(self, cfg: MoCoV2Config, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        super().__init__(cfg, backbone, projector, width)
        self.queue = FeatureQueue(cfg.queue_size, width)
        self.pending: list[Tensor] = []  # keys (M, V, D) of the step's micro-batches

    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """Keys come from every global view or, without symmetrisation, only from the second."""
        keyed = range(len(crops.views)) if self.cfg.symmetric else range(1, 2)
        keys = self._keys(crops, tuple(crops.views[v] for v in keyed))
        self.pending.append(normalize(keys))
        own = keys[_own_rows(crops.queries[0])].unbind(dim=1)
        queue = self.queue.features.clone()  # after_step writes it in place
        chunk = _chunk(self.cfg.chunk_size, push, len(queue))
        return _cross_views(
            crops,
            dict(zip(keyed, own, strict=True)),
            lambda q, k: contrast_queue(q, k, queue, temperature=temperature, chunk=chunk),
            negatives=len(queue),
        )

    def _keys(self, crops: Crops, views: tuple[Tensor, ...]) -> Tensor:
        """Keys (M, V, D) of all ranks."""
        if self.cfg.momentum_batchnorm == "same":
            return gather_detached(self.encode(views))
        order = shuffled_order(
            len(views[0]) * world_size(),
            seed=crops.seed,
            step=crops.step,
            micro_batch=len(self.pending),
            device=views[0].device,
        )
        keys = self.encode(tuple(shuffle(view, order) for view in views))
        return unshuffle(gather_detached(keys), order)

    def after_step(self, step: int, total_steps: int) -> None:
        """Push the step's keys to the queue, in the order of the global batch, and update the momentum encoder."""
        self.queue.push(torch.cat(self.pending).transpose(0, 1).flatten(0, 1))
        self.pending = []
        super().after_step(step, total_steps)

    def after_skipped_step(self) -> None:
        """Drop the step's keys."""
        self.pending = []


class MoCoV3(MomentumBase[MoCoV3Config]):
    """Contrasts predictions with the momentum keys of the global batch; the loss is 2 tau (L12 + L21)."""

    def __init__(self, cfg: MoCoV3Config, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        super().__init__(cfg, backbone, projector, width)
        self.predictor = build_head(width, cfg.predictor)

    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """The positive is the key of the same image; the keys of other images are the negatives."""
        keys = gather_detached(self.encode(crops.views))  # (M, V, D)
        rows, chunk = _own_rows(crops.queries[0]), _chunk(self.cfg.chunk_size, push, len(keys) - 1)
        return _cross_views(
            crops,
            dict(enumerate(keys.unbind(dim=1))),
            lambda q, k: contrast(q, k, rows, own=None, temperature=temperature, chunk=chunk),
            negatives=len(keys) - 1,
        )

    def total(self, mean: Tensor) -> Tensor:
        """The loss, summed over both orders of the views."""
        scale = 2 * self.cfg.temperature if self.cfg.loss_scale is None else self.cfg.loss_scale
        return 2 * scale * mean


class BYOL(MomentumBase[BYOLConfig]):
    """Attracts predictions to momentum targets; the loss is 2 - 2 cos, summed over both orders of the views."""

    def __init__(self, cfg: BYOLConfig, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        super().__init__(cfg, backbone, projector, width)
        self.predictor = build_head(width, cfg.predictor)

    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """Positive pairs only, so nothing needs gathering."""
        keys = dict(enumerate(self.encode(crops.views).unbind(dim=1)))
        return _cross_views(crops, keys, attract, negatives=0)

    def total(self, mean: Tensor) -> Tensor:
        """The loss, summed over both orders of the views."""
        return 2 * (mean + 2)


class SimSiam(Base[SimSiamConfig]):
    """Attracts predictions to detached projections; the loss is -cos, averaged over both orders of the views."""

    def __init__(self, cfg: SimSiamConfig, backbone: nn.Module, projector: nn.Module, width: int) -> None:
        super().__init__(cfg, backbone, projector, width)
        self.predictor = build_head(width, cfg.predictor)

    def terms(self, crops: Crops, temperature: float | Tensor, push: Push) -> list[Term]:
        """Positive pairs only, so nothing needs gathering."""
        keys = {v: crops.projected[v].detach() for v in range(len(crops.views))}
        return _cross_views(crops, keys, attract, negatives=0)


BASES: dict[str, type[Base[Any]]] = {
    "simclr": SimCLR,
    "mocov2": MoCoV2,
    "mocov3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
}


def _cross_views(
    crops: Crops, keys: Mapping[int, Tensor], compare: Callable[[Tensor, Tensor], Pairs], *, negatives: int
) -> list[Term]:
    """One term per pair of a query view and another key view; ``keys`` are by view. Local crops are only queries."""
    return [
        Term(compare(query, key), negatives, local=a >= len(crops.views))
        for a, query in enumerate(crops.queries)
        for b, key in keys.items()
        if a != b
    ]


def _chunk(size: int | None, push: Push, negatives: int) -> Chunk | None:
    return None if size is None else Chunk(size, push(negatives))


def _own_rows(x: Tensor) -> Tensor:
    """Indices (N,) of this rank's rows ``x`` (N, ...) among those of all ranks."""
    return torch.arange(len(x), device=x.device) + rank() * len(x)
