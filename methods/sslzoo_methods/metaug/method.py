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
from sslzoo.optim.optimizers import build_optimizer, set_learning_rate
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
    """An encoder's step on original and generated features, then the generators' through a virtual one."""

    Config = MetAugConfig
    needs_double_backward = True

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
        """Make the banks, where the keys are theirs."""
        super().prepare(plan, optim, seed)
        cfg, keys = self.cfg, self.cfg.keys
        if isinstance(keys, BankKeys):
            shape = cfg.views.count, plan.dataset_size, cfg.projector.widths[-1]
            self.banks = MemoryBanks(*shape, negatives=keys.negatives, momentum=keys.momentum, seed=seed)

    def configure_optimizers(self) -> Any:
        """The recipe's optimiser for the encoder, and the generators' own, where they learn."""
        encoder, meta = build_optimizer(self.parameter_groups(), self.optim), self.cfg.meta
        return encoder if meta is None else [encoder, generator_optimizer(self.generators, meta.optimizer)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The encoder's optimiser step, then, where due, the generators' with the new encoder."""
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
            # Not Lightning's wrapper: its scaler and its count of steps are the encoder's.
            self.meta_step(batch, optimizers[1].optimizer, meta)
        self.record("train/loss", loss)
        self.setting("opt/lr", lr)
        self.finish_step(skipped=not happened)

    def loss(self, batch: Batch) -> Tensor:
        """Equation 5 with the generators held fixed; local crops are queries of its first term only."""
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
        """One step of the generators, at the encoder as it stands. A gradient that is not finite counts as zero, and
        what it came from does not enter their statistics."""
        before = copied_buffers(self.generators)
        evaluate = partial(self._objective, batch)
        views, count = self._views(batch), self.cfg.views.count
        found = bilevel(self.network(), self.generators, views, count, evaluate, cfg)
        gradient, indirect = mean_over_ranks(found.total), found.indirect
        if cfg.order == 2:
            indirect = mean_over_ranks(indirect)
        values = meta_health(gradient, indirect)
        sound = values["generator_gradient"].isfinite()
        for p, g in zip(self.generators.parameters(), gradient, strict=True):
            p.grad = torch.where(sound, g, 0)
        for name, buffer in self.generators.named_buffers():
            buffer.copy_(torch.where(sound, buffer, before[name]))
        for name, value in values.items():
            self.record(f"method/{name}", value)
        optimizer.step()
        optimizer.zero_grad()

    def network(self) -> Network:
        """Backbone and projector as one function."""
        return Network(self.backbone, self.projector)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """``backbone``, ``projector``, and the backbone's with generated features beside them."""
        passed, z = self.network()([x])
        return self._named(passed, z, self.generators(z), len(x))

    def contrasted(self, batch: Batch) -> Contrast:
        """Projections of two views; of one, where three encoders see it: of its first channel and of the other two.

        gamma multiplies (1 + cos) / 2, hence the temperature.
        """
        network, temperature = self.network(), 2 / self.cfg.gamma
        if not isinstance(self.cfg.views, ColorChannels):
            return Contrast.of_views(batch, lambda x: network([x])[1][-1], temperature=temperature)
        first, others, _ = network(batch.global_views)[1]
        return Contrast({"global": (first, others)}, temperature)

    def _named(
        self, passed: Sequence[Tensor], z: Sequence[Tensor], generated: Sequence[Tensor], n: int
    ) -> dict[str, Tensor]:
        """Features of the first view, or of all three of a crop."""
        count = self.cfg.views.encoders
        h = torch.cat([part[:n] for part in passed[:count]], dim=1)
        made = torch.cat([h, *generated[:count]], dim=1)
        return {"backbone": h, "projector": torch.cat(list(z[:count]), dim=1), "backbone+generated": made}

    def _views(self, batch: Batch) -> tuple[Tensor, ...]:
        return (*batch.global_views, *batch.local_views)

    def _objective(
        self, batch: Batch, z: Sequence[Tensor], generated: Sequence[Tensor], call: int
    ) -> Objective:
        ramp = interpolate(self.step, self.plan.steps(self.cfg.ramp_epochs) + 1, 0.0, 1.0)
        ids, step = batch.sample_id, self.step
        return objective(z, generated, self.cfg, self.banks, ids, call=call, step=step, ramp=ramp)
