"""MetAug: Contrastive Learning via Meta Feature Augmentation (Li et al., ICML 2022, arXiv:2203.05119)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sslzoo.batch import Batch, Contrast
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import build_head
from sslzoo.nn.numerics import autocast_off
from sslzoo.optim.optimizers import set_learning_rate
from sslzoo.optim.schedules import interpolate, learning_rate
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import OptimConfig
from sslzoo_methods.metaug.banks import MemoryBanks
from sslzoo_methods.metaug.config import BankKeys, ColorChannels, MetaConfig, MetAugConfig
from sslzoo_methods.metaug.encoders import Network, ThreeViewBackbone
from sslzoo_methods.metaug.generators import Generators, generator_optimizer
from sslzoo_methods.metaug.health import health, meta_health
from sslzoo_methods.metaug.loss import Objective
from sslzoo_methods.metaug.meta import bilevel, copied_buffers, mean_over_ranks
from sslzoo_methods.metaug.objective import ENCODER, objective


class MetAug(SSLMethod[MetAugConfig]):
    """MetAug: a step of the encoder on original and generated features, then a bilevel step of the generators."""

    Config = MetAugConfig

    def __init__(self, cfg: MetAugConfig, backbone: nn.Module, feature_dim: int) -> None:
        views = cfg.views
        whole = ThreeViewBackbone(backbone, views.space) if isinstance(views, ColorChannels) else backbone
        super().__init__(cfg, whole, feature_dim * views.encoders)
        self.automatic_optimization = False
        heads = [build_head(feature_dim, cfg.projector) for _ in range(views.encoders)]
        self.projector = nn.ModuleList(heads) if isinstance(views, ColorChannels) else heads[0]
        self.generators = Generators(cfg.generator, views=views.count, dim=cfg.projector.widths[-1])
        self.banks: MemoryBanks | None = None

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Create the memory banks if they provide the keys."""
        super().prepare(plan, optim, seed)
        cfg, keys = self.cfg, self.cfg.keys
        if isinstance(keys, BankKeys):
            shape = cfg.views.count, plan.dataset_size, cfg.projector.widths[-1]
            self.banks = MemoryBanks(*shape, negatives=keys.negatives, momentum=keys.momentum, seed=seed)

    def configure_optimizers(self) -> Any:
        """The recipe's optimiser for the encoder, and another one for the generators if they are trained."""
        encoder, meta = self.build_optimizer(), self.cfg.meta
        return encoder if meta is None else [encoder, generator_optimizer(self.generators, meta.optimizer)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take the encoder's optimiser step, then, every ``meta.every_steps``, the generators' with the new encoder."""
        meta, optimizers = self.cfg.meta, self.optimizers()
        encoder: Any = optimizers[0] if isinstance(optimizers, list) else optimizers
        lr = learning_rate(self.step, self.optim, self.plan)
        set_learning_rate(encoder, lr)
        loss = self.loss(batch)
        encoder.zero_grad()
        with autocast_off(loss):  # this is called inside Lightning's autocast region
            self.manual_backward(loss)
        happened = self.attempt(encoder.step)
        if happened and meta is not None and self.step % meta.every_steps == 0:
            assert isinstance(optimizers, list)
            # Not through Lightning's wrapper, whose loss scaler and step count are for the encoder.
            self.meta_step(batch, optimizers[1].optimizer, meta)
        self.record("train/loss", loss)
        self.setting("opt/lr", lr)
        self.finish_step(skipped=not happened)

    def loss(self, batch: Batch) -> Tensor:
        """Equation 5 with fixed generators; local crops are only queries of its first term."""
        passed, z = self.network()(self._views(batch))
        statistics = copied_buffers(self.generators)
        views, keys = self.cfg.views.count, self.cfg.keys
        generated = functional_call(self.generators, statistics, (z[:views],))
        out = self._objective(batch, z, generated, ENCODER)
        if self.banks is not None and isinstance(keys, BankKeys) and keys.updates == "once":
            self.banks.update(batch.sample_id, torch.stack(z[:views]).detach())
        self.publish(**self._named(passed, z, generated, len(batch.sample_id)))
        for name, value in health(out, z, generated).items():
            self.record(f"method/{name}", value)
        return out.loss

    def meta_step(self, batch: Batch, optimizer: torch.optim.Optimizer, cfg: MetaConfig) -> None:
        """Take one step of the generators with the current encoder. If the gradient is not finite, it is replaced by 0
        and the running statistics are restored."""
        before = copied_buffers(self.generators)
        evaluate = partial(self._objective, batch)
        views, count = self._views(batch), self.cfg.views.count
        result = bilevel(self.network(), self.generators, views, count, evaluate, cfg)
        gradient = mean_over_ranks(result.total)
        values = meta_health(gradient, result)
        finite = values["generator_gradient"].isfinite()
        for p, g in zip(self.generators.parameters(), gradient, strict=True):
            p.grad = torch.where(finite, g, 0)
        for name, buffer in self.generators.named_buffers():
            buffer.copy_(torch.where(finite, buffer, before[name]))
        for name, value in values.items():
            self.record(f"method/{name}", value)
        optimizer.step()
        optimizer.zero_grad()

    def depends_on_processes(self) -> str:
        """With virtual steps of one process each; keys are those of all processes, or of banks."""
        meta = self.cfg.meta
        if meta is not None and not meta.sync_virtual_step:
            return "method.meta.sync_virtual_step=false takes the virtual step on the images of one process"
        return ""

    def depends_on_micro_batches(self) -> str:
        """It does."""
        return "MetAug takes a step after each micro-batch"

    def network(self) -> Network:
        """Backbone and projector as one module."""
        return Network(self.backbone, self.projector)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone``, ``projector``, and ``backbone+generated``, their concatenation with generated ones."""
        passed, z = self.network()([x])
        return self._named(passed, z, self.generators(z), len(x))

    def contrasted(self, batch: Batch) -> Contrast:
        """Projections of two views, or with colour channels of the first channel and the other two of one view.

        The temperature is 2 / gamma because gamma multiplies (1 + cos) / 2.
        """
        network, temperature = self.network(), 2 / self.cfg.gamma
        if not isinstance(self.cfg.views, ColorChannels):
            return Contrast.of_views(batch, lambda x: network([x])[1][-1], temperature=temperature)
        first, others, _ = network(batch.global_views)[1]
        return Contrast({"global": (first, others)}, temperature)

    def _named(
        self, passed: Sequence[Tensor], z: Sequence[Tensor], generated: Sequence[Tensor], n: int
    ) -> dict[str, Tensor]:
        """Features of the first view or, with colour channels, of all three views."""
        count = self.cfg.views.encoders
        h = torch.cat([part[:n] for part in passed[:count]], dim=1)
        both = torch.cat([h, *generated[:count]], dim=1)
        return {"backbone": h, "projector": torch.cat(list(z[:count]), dim=1), "backbone+generated": both}

    def _views(self, batch: Batch) -> tuple[Tensor, ...]:
        return (*batch.global_views, *batch.local_views)

    def _objective(
        self, batch: Batch, z: Sequence[Tensor], generated: Sequence[Tensor], call: int
    ) -> Objective:
        ramp = interpolate(self.step, self.plan.steps(self.cfg.ramp_epochs) + 1, 0.0, 1.0)
        ids, step = batch.sample_id, self.step
        return objective(z, generated, self.cfg, self.banks, ids, call=call, step=step, ramp=ramp)
