"""Margin analysis: contrastive learning with margins (Rho et al., 2023, arXiv:2306.11526)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.distributed import all_reduce_mean, all_reduce_sum, world_size
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import build_head
from sslzoo.optim.schedules import interpolate
from sslzoo_methods.margin import config
from sslzoo_methods.margin.bases import BASES, Crops, MoCoV2, MomentumBase, Term
from sslzoo_methods.margin.config import MarginConfig
from sslzoo_methods.margin.factors import NO_MARGIN, Margin, Pairs, pull_sums
from sslzoo_methods.margin.health import health
from sslzoo_methods.margin.loss import (
    isolated_loss,
    isolated_push,
    macl_loss,
    macl_push,
    macl_temperature,
    margin_loss,
    margin_push,
    view_alignment,
)

MACL_EPS = 1e-8


class MarginContrast(SSLMethod[MarginConfig]):
    """A base framework with a margin on its positives, or with selected effects of a margin."""

    Config = MarginConfig

    def __init__(self, cfg: MarginConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = build_head(feature_dim, cfg.projector)
        width = cfg.projector.widths[-1]
        self.base = BASES[cfg.base.name](cfg.base, backbone, self.projector, width)
        self.predictor = nn.Identity() if self.base.predictor is None else self.base.predictor
        self.target = self.base.target if isinstance(self.base, MomentumBase) else None
        self.queue = self.base.queue if isinstance(self.base, MoCoV2) else None

    def loss(self, batch: Batch) -> Tensor:
        """Mean over all pairs of a query view and another global key view, scaled as in the base framework."""
        views = len(batch.global_views)
        features = [self.backbone(view) for view in (*batch.global_views, *batch.local_views)]
        projected = [self.projector(h) for h in features]
        self.publish(backbone=features[0], projector=projected[0])
        queries = [self.predictor(z) for z in projected]
        temperature = self._temperature(projected[:views])
        crops = Crops(batch.global_views, projected, queries, self.seed, self.step)
        terms = self.base.terms(crops, temperature, partial(self._push, temperature))
        margin = self.margin(terms[0].negatives)
        sums = all_reduce_sum(torch.stack([pull_sums(term.pairs.theta, margin) for term in terms]))
        losses = [self._term_loss(t, margin, s, temperature) for t, s in zip(terms, sums, strict=True)]
        self.setting("method/angular_margin", margin.angular)
        self.setting("method/subtractive_margin", margin.subtractive)
        images = len(batch.sample_id) * world_size()
        report = health(terms, margin, sums, images=images, cfg=self.cfg, temperature=temperature)
        for name, value in report.items():
            self.record(name, value)
        return self.base.total(torch.stack(losses).mean())

    def margin(self, negatives: int) -> Margin:
        """The recipe's margin in this step; EqCo's depends on ``negatives``, the number per anchor."""
        family, ramp = self.cfg.family, self.margin_ramp()
        match family:
            case config.Combined():
                m1, m2 = ramp * family.radians, ramp * family.subtractive_margin
                return Margin(angular=m1, subtractive=m2, wide_angle=family.wide_angle)
            case config.ArcFace():
                return Margin(angular=ramp * family.radians, subtractive=0.0, wide_angle="arcface")
            case config.CosFace():
                return Margin(angular=0.0, subtractive=ramp * family.subtractive_margin)
            case config.EqCo():
                m2 = self.cfg.base.temperature * log(family.alpha / negatives)
                return Margin(angular=0.0, subtractive=ramp * m2)
            case config.SphereFace():
                return Margin(angular=0.0, subtractive=0.0, multiplier=family.multiplier)
            case config.NoMargin() | config.MACL():
                return NO_MARGIN

    def margin_ramp(self) -> float:
        """Factor of the margin in this step according to its schedule."""
        schedule = self.cfg.family.schedule
        if not isinstance(schedule, config.Ramp):
            return 1.0
        return interpolate(self.step, self.plan.steps(schedule.epochs) + 1, 0.0, 1.0, schedule.name)

    def _temperature(self, projected: list[Tensor]) -> float | Tensor:
        """tau, which macl adapts to the alignment of the global views in the global batch."""
        tau, family = self.cfg.base.temperature, self.cfg.family
        if not isinstance(family, config.MACL):
            return tau
        alignment = all_reduce_mean(view_alignment(projected))
        return macl_temperature(alignment, temperature=tau, alpha=family.alpha, initial=family.alignment)

    def _term_loss(self, term: Term, margin: Margin, sums: Tensor, temperature: float | Tensor) -> Tensor:
        beta, effects = self.cfg.base.beta, self.cfg.effects
        if isinstance(temperature, Tensor):
            return macl_loss(term.pairs, temperature=temperature, eps=MACL_EPS)[0].mean()
        if isinstance(effects, config.Isolated):
            loss = isolated_loss(term.pairs, margin, effects, temperature=temperature, beta=beta, sums=sums)
        else:
            detached = isinstance(effects, config.Detached)
            loss = margin_loss(term.pairs, margin, temperature=temperature, beta=beta, detached=detached)
        return loss.mean()

    def _push(self, temperature: float | Tensor, negatives: int) -> Callable[[Pairs], Tensor]:
        """The derivative of :meth:`_term_loss` by the logsumexp of an anchor's ``negatives``."""
        margin, beta, effects = self.margin(negatives), self.cfg.base.beta, self.cfg.effects
        if isinstance(temperature, Tensor):
            return partial(macl_push, temperature=temperature, eps=MACL_EPS)
        if isinstance(effects, config.Isolated):
            return partial(isolated_push, margin=margin, effects=effects, temperature=temperature, beta=beta)
        return partial(margin_push, margin=margin, temperature=temperature, beta=beta)

    def depends_on_processes(self) -> str:
        """ShuffleBN does."""
        base = self.cfg.base
        shuffled = isinstance(base, config.MoCoV2Config) and base.momentum_batchnorm == "shuffle"
        return "method.base.momentum_batchnorm=shuffle divides the images of a process" if shuffled else ""

    def depends_on_micro_batches(self) -> str:
        """Whatever looks at several images of the batch does."""
        if self.cfg.base.name in ("simclr", "mocov3"):
            return f"method.base={self.cfg.base.name} contrasts the images of a micro-batch with one another"
        if isinstance(self.cfg.family, config.MACL):
            return "method.family=macl takes its temperature from the images of a micro-batch"
        if isinstance(self.cfg.effects, config.Isolated):
            return "method.effects=isolated has sums over the images of a micro-batch"
        return self.depends_on_processes()

    def contrasted(self, batch: Batch) -> Contrast:
        """Anchors are predictions (projections without predictor); positives are momentum keys (projections without
        momentum encoder)."""
        return Contrast.of_views(
            batch,
            lambda x: self.predictor(self.projector(self.backbone(x))),
            (lambda x: self.projector(self.backbone(x))) if self.target is None else self.target,
            temperature=self.cfg.base.temperature,
        )

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone`` (N, F) and ``projector`` (N, D)."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}

    def after_step(self, step: int) -> None:
        """Update the base's momentum encoder and queue."""
        self.base.after_step(step, self.plan.total_steps)

    def after_skipped_step(self, step: int) -> None:
        """Drop the keys that the base collected."""
        self.base.after_skipped_step()
