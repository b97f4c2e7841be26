"""Margin analysis: contrastive learning with margins (Rho et al., 2023, arXiv:2306.11526)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.distributed import all_reduce_mean, all_reduce_sum, gather, gather_detached, rank, world_size
from sslzoo.margins import NO_MARGIN, Margin, pull_sums
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import mlp
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.numerics import ieee_matmul, normalize
from sslzoo.nn.queue import FeatureQueue
from sslzoo.nn.shuffle import shuffle, shuffled_order, unshuffle
from sslzoo.optim.schedules import ema_momentum, interpolate
from sslzoo_methods.margin.bases import (
    CONSTANT,
    HEADS,
    PREDICTORS,
    VIEW_ORDERS,
    Term,
    key_views,
    margin_of,
    pair_views,
)
from sslzoo_methods.margin.config import WITH_TARGET, MarginConfig
from sslzoo_methods.margin.health import health
from sslzoo_methods.margin.loss import (
    isolated_loss,
    macl_loss,
    macl_temperature,
    margin_loss,
    view_alignment,
)


class MarginContrast(SSLMethod[MarginConfig]):
    """A base framework whose positives carry a margin, or chosen effects of one."""

    Config = MarginConfig

    def __init__(self, cfg: MarginConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = mlp((feature_dim, *cfg.projector), **HEADS[cfg.base])
        self.predictor = (
            mlp((cfg.projector[-1], *cfg.predictor), **PREDICTORS.get(cfg.base, {}))
            if cfg.predictor
            else nn.Identity()
        )
        self.target = MomentumEncoder(backbone, self.projector) if cfg.base in WITH_TARGET else None
        self.queue = FeatureQueue(cfg.queue_size, cfg.projector[-1]) if cfg.queue_size else None
        self.pending: tuple[int, list[Tensor]] = (-1, [])  # the step, and its keys for the queue

    def loss(self, batch: Batch) -> Tensor:
        """Mean over every (query view, other global key view), scaled as the base framework does."""
        cfg = self.cfg
        if (views := len(batch.global_views)) < 2:
            raise ValueError("margin needs two global views; set views to count: 2 with role: global")
        features = [self.backbone(view) for view in (*batch.global_views, *batch.local_views)]
        self.publish(backbone=features[0])
        projected = [self.projector(h) for h in features]
        queries = [self.predictor(z) for z in projected]
        keys = self._keys(batch, projected)
        temperature = self._temperature(projected, views)
        # after_step writes the queue in place
        queue = None if self.queue is None else self.queue.features.clone()
        offset = rank() * len(batch.sample_id)
        with ieee_matmul():
            terms = pair_views(cfg, queries, keys, queue, views=views, offset=offset, temperature=temperature)
        margin = margin_of(cfg, terms[0].negatives, self.margin_ramp())
        sums = all_reduce_sum(torch.stack([pull_sums(term.pairs.theta, margin) for term in terms]))
        losses = [self._term_loss(t, margin, s, temperature) for t, s in zip(terms, sums, strict=True)]
        for name, value in health(terms, margin, sums, cfg=cfg, temperature=temperature).items():
            self.record(name, value)
        self.setting("method/angular_margin", margin.angular)
        self.setting("method/subtractive_margin", margin.subtractive)
        mean = torch.stack(losses).mean() + CONSTANT.get(cfg.base, 0.0)
        return VIEW_ORDERS.get(cfg.base, 1.0) * cfg.own_scale * mean

    def margin_ramp(self) -> float:
        """Share of the margins that acts in this step: a pure function of it."""
        cfg = self.cfg
        if cfg.schedule == "constant":
            return 1.0
        return interpolate(self.step, self.plan.steps(cfg.schedule_epochs) + 1, 0.0, 1.0, cfg.schedule)

    def _keys(self, batch: Batch, projected: list[Tensor]) -> dict[int, Tensor]:
        """Keys by view, in the form that pair_views wants of this base."""
        cfg = self.cfg
        views = key_views(cfg.base, len(batch.global_views), cfg.symmetric)
        if self.target is None:
            keys = torch.stack([projected[v] for v in views], dim=1)  # (N, V, D)
            keys = gather(keys) if cfg.base == "simclr" else keys.detach()
        else:
            keys = self._target_keys([batch.global_views[v] for v in views])
        return dict(zip(views, keys.unbind(dim=1), strict=True))

    @torch.no_grad()
    def _target_keys(self, views: list[Tensor]) -> Tensor:
        """The momentum encoder's (N, V, D), or (M, V, D) of all ranks where the batch is contrasted."""
        assert self.target is not None
        n, order = len(views[0]), None
        if self.pending[0] != self.step:  # what a skipped step left behind is dropped
            self.pending = (self.step, [])
        if self.cfg.momentum_batchnorm == "shuffle":
            part = len(self.pending[1])
            order = shuffled_order(
                n * world_size(), seed=self.seed, step=self.step, micro_batch=part, device=views[0].device
            )
            views = [shuffle(view, order) for view in views]
        keys = torch.stack([self.target(view) for view in views], dim=1)
        if self.cfg.base == "byol":
            return keys
        keys = gather_detached(keys) if order is None else unshuffle(gather_detached(keys), order)
        if self.queue is None:
            return keys
        self.pending[1].append(normalize(keys))
        return keys[rank() * n : (rank() + 1) * n]

    def _temperature(self, projected: list[Tensor], views: int) -> float | Tensor:
        """tau; for macl adapted to the alignment of the global views of the global batch."""
        cfg = self.cfg
        if cfg.family != "macl":
            return cfg.temperature
        alignment = all_reduce_mean(view_alignment(projected[:views]))
        return macl_temperature(
            alignment, temperature=cfg.temperature, alpha=cfg.macl_alpha, initial=cfg.macl_alignment
        )

    def _term_loss(self, term: Term, margin: Margin, sums: Tensor, temperature: float | Tensor) -> Tensor:
        cfg = self.cfg
        if isinstance(temperature, Tensor):
            return macl_loss(term.pairs, temperature=temperature, eps=1e-8)[0].mean()
        if cfg.isolated:
            return isolated_loss(
                term.pairs,
                margin,
                temperature=temperature,
                beta=cfg.beta,
                effects=cfg.effects,
                logit_on=cfg.logit_on,
                emphasis_scale=cfg.emphasis_scale,
                factor_range=cfg.factor_range,
                value_preserving=cfg.value_preserving,
                sums=sums,
            ).mean()
        acting = margin if cfg.effects else NO_MARGIN
        return margin_loss(term.pairs, acting, temperature=temperature, beta=cfg.beta, slope=cfg.slope).mean()

    def embed_key(self, x: Tensor) -> Tensor:
        """Of the momentum encoder, where the base has one; else the projection."""
        return self.projector(self.backbone(x)) if self.target is None else self.target(x)

    def after_step(self, step: int) -> None:
        """Push the step's keys, in the order of the global batch; move the momentum encoder."""
        if self.queue is not None:
            keys = torch.cat(self.pending[1])  # (M, V, D)
            self.queue.push(keys.transpose(0, 1).flatten(0, 1))
            self.pending = (-1, [])
        if self.target is not None:
            cfg, total = self.cfg, self.plan.total_steps
            coefficient = ema_momentum(
                step, total_steps=total, start=cfg.momentum_start, schedule="cosine", end=cfg.momentum_end
            )
            self.target.update(self.backbone, self.projector, coefficient=coefficient)
