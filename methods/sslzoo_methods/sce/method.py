"""SCE: Similarity Contrastive Estimation (Denize et al., WACV 2023, arXiv:2111.14585)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.distributed import gather_detached, rank, world_size
from sslzoo.method import SSLMethod
from sslzoo.nn.batchnorm import to_split
from sslzoo.nn.heads import build_head
from sslzoo.nn.measurements import moments
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.numerics import normalize
from sslzoo.nn.passes import forward_crops
from sslzoo.nn.queue import FeatureQueue, warn_of_stale_keys
from sslzoo.nn.shuffle import shuffle, shuffled_order, unshuffle
from sslzoo.optim.schedules import ema_momentum, interpolate
from sslzoo_methods.sce.config import ReSSLLoss, SCEConfig, SCELoss, ThreeTermLoss, Warmup
from sslzoo_methods.sce.loss import RESSL, SCEOutput, TermWeights, crop_pairs, sce_multicrop_loss

SPLITS = 8  # simulated devices of split batch norm, as in the official CIFAR runs


class SCE(SSLMethod[SCEConfig]):
    """SCE: the online branch predicts the similarities of the momentum branch's view to other images.

    State: the momentum encoder and the queue, both saved in checkpoints and equal on all ranks.
    """

    Config = SCEConfig

    def __init__(self, cfg: SCEConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        dim = cfg.projector.widths[-1]
        self.projector = build_head(feature_dim, cfg.projector)
        self.predictor = nn.Identity() if cfg.predictor is None else build_head(dim, cfg.predictor)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector)
        if cfg.momentum_batchnorm == "split":
            to_split(self.momentum_encoder, SPLITS)
        self.queue = FeatureQueue(cfg.queue_size, dim) if cfg.queue_size else None
        # Keys (M, D) per view of each of this step's micro-batches, queued after the step.
        self.pending: list[list[Tensor]] = []

    def loss(self, batch: Batch) -> Tensor:
        """Weighted mean over pairs: crop 0 against the others or, if symmetric, every global crop against
        every other crop. All pairs use the queue as it was after the previous step."""
        cfg = self.cfg
        crops = (*batch.global_views, *batch.local_views)
        views = batch.global_views if cfg.symmetric else crops[:1]
        keys = self._keys(views)
        projected: list[Tensor] = []

        def head(h: Tensor) -> Tensor:
            projected.append(self.projector(h))
            return self.predictor(projected[-1])

        features, outputs = forward_crops(
            self.backbone,
            head,
            crops if cfg.symmetric else crops[1:],
            cfg.crop_batching,
        )
        self.publish(backbone=features[0], projector=projected[0][: len(features[0])])
        online = [normalize(z) for z in outputs]
        n = online[0].shape[0]
        first_row = rank() * n
        out = sce_multicrop_loss(
            online,
            [key[first_row : first_row + n] for key in keys],
            crop_pairs(len(views), len(crops), symmetric=cfg.symmetric, weighting=cfg.pair_weighting),
            keys=keys if cfg.batch_negatives else None,
            first_row=first_row,
            queue=None if self.queue is None else self.queue.features,
            temperature=cfg.temperature,
            target_temperature=self._warmed_up(cfg.target_temperature, cfg.target_temperature_warmup),
            weights=self._term_weights(),
            target_positive=cfg.loss.target_positive if isinstance(cfg.loss, SCELoss) else "masked",
        )
        self._record_health(out, online[0].detach())
        if self.queue is not None:
            if self.step == 0 and not self.pending:
                warn_of_stale_keys(len(self.queue.features), len(views) * self.plan.dataset_size)
            self.pending.append(keys)
        return out.terms.loss

    @torch.no_grad()
    def _keys(self, views: Sequence[Tensor]) -> list[Tensor]:
        """L2-normalised keys (M, D) per view, of all ranks in rank order, using a single gather."""
        order = None
        if self.cfg.momentum_batchnorm == "shuffle":
            order = shuffled_order(
                len(views[0]) * world_size(),
                seed=self.seed,
                step=self.step,
                micro_batch=len(self.pending),
                device=views[0].device,
            )
            views = [shuffle(view, order) for view in views]
        backbone, projector = self.momentum_encoder.layers
        _, outputs = forward_crops(backbone, projector, views, self.cfg.crop_batching)
        every = gather_detached(torch.cat([normalize(z) for z in outputs], dim=1))
        if order is not None:
            every = unshuffle(every, order)
        return list(every.chunk(len(views), dim=1))

    def after_step(self, step: int) -> None:
        """Push this step's keys to the queue and update the momentum encoder."""
        if self.queue is not None:
            # In the order of the whole batch, which does not depend on its division into micro-batches.
            self.queue.push(torch.cat([key for view in zip(*self.pending, strict=True) for key in view]))
            self.pending = []
        cfg, now, total = self.cfg, step, self.plan.total_steps
        if cfg.momentum_schedule == "cosine_epoch":
            now, total = step // self.plan.steps_per_epoch, self.plan.max_epochs
        shape = "constant" if cfg.momentum_schedule == "constant" else "cosine"
        coefficient = ema_momentum(now, total_steps=total, start=cfg.momentum, schedule=shape)
        self.momentum_encoder.update(self.backbone, self.projector, coefficient=coefficient)
        self.setting("method/momentum", coefficient)

    def after_skipped_step(self, step: int) -> None:
        """Drop this step's keys."""
        self.pending = []

    def depends_on_processes(self) -> str:
        """Batch norm of the momentum branch over a part of a process's images does."""
        kind = self.cfg.momentum_batchnorm
        return "" if kind == "same" else f"method.momentum_batchnorm={kind} divides the images of a process"

    def depends_on_micro_batches(self) -> str:
        """Negatives from the batch do; the queue is the same for all of a step's micro-batches."""
        if self.cfg.batch_negatives:
            return "method.batch_negatives=true contrasts the images of a micro-batch with one another"
        return self.depends_on_processes()

    def contrasted(self, batch: Batch) -> Contrast:
        """Online embeddings as anchors, momentum embeddings as positives; if asymmetric, of the first view."""
        if not self.cfg.symmetric:
            first, second, *rest = batch.global_views
            batch = batch._replace(global_views=(second, first, *rest))
        return Contrast.of_views(
            batch,
            lambda x: self.predictor(self.projector(self.backbone(x))),
            self.momentum_encoder,
            temperature=self.cfg.temperature,
        )

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone`` (N, F) and ``projector`` (N, D)."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}

    def _term_weights(self) -> TermWeights:
        loss = self.cfg.loss
        if isinstance(loss, ReSSLLoss):
            return RESSL
        if isinstance(loss, ThreeTermLoss):
            return TermWeights(loss.contrastive_weight, loss.relational_weight, loss.ceil_weight)
        return TermWeights.sce(self._warmed_up(loss.contrastive_weight, loss.contrastive_weight_warmup))

    def _warmed_up(self, value: float, warmup: Warmup | None) -> float:
        if warmup is None:
            return value
        return interpolate(self.step, self.plan.steps(warmup.epochs), warmup.start, value, warmup.shape)

    def _record_health(self, out: SCEOutput, online: Tensor) -> None:
        for name, value in out.health().items():
            self.record(f"method/{name}", value)
        self.record("method/online_std", moments(online))
