"""SogCLR: Stochastic Optimization of the Global Contrastive loss (ICML 2022, arXiv:2202.12387)."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.checks import require
from sslzoo.distributed import rank
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import mlp
from sslzoo.nn.numerics import normalize
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import OptimConfig
from sslzoo.run.loggers import log_histogram
from sslzoo_methods.sogclr.bimodal import bimodal_loss, global_temperature_loss
from sslzoo_methods.sogclr.config import SogCLRConfig
from sslzoo_methods.sogclr.gamma import rate_of
from sslzoo_methods.sogclr.gathering import columns_gradient, gather_columns
from sslzoo_methods.sogclr.health import health
from sslzoo_methods.sogclr.loss import Estimates, gcl_loss_lean, ntxent_loss
from sslzoo_methods.sogclr.table import Descent, EstimatorTable, remember

MODALITIES = {"gcl": 1, "gcl_bimodal": 2, "ntxent": 0}  # tables that each loss keeps


class SogCLR(SSLMethod[SogCLRConfig]):
    """Contrast with all images through a running estimate per image, written once a micro-batch."""

    Config = SogCLRConfig
    per_sample_state = ("tables",)

    def __init__(self, cfg: SogCLRConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        widths, norm = (feature_dim, *cfg.projector), cfg.projector_norm
        self.projector = mlp(widths, output_norm=norm, output_bias=norm == "none")
        if cfg.temperature == "global_learnable":
            self.tau = nn.Parameter(torch.tensor(cfg.tau))
        self._ids_checked = False

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Make the empty tables, one per modality."""
        super().prepare(plan, optim, seed)
        cfg, descent = self.cfg, None
        if cfg.temperature == "individual":
            descent = Descent(cfg.rho, cfg.eta, cfg.beta, cfg.tau_min, cfg.tau_max)
        self.tables = nn.ModuleList(
            EstimatorTable(plan.dataset_size, tau_init=cfg.tau, descent=descent)
            for _ in range(MODALITIES[cfg.loss])
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The learnable temperature has its own rate and no decay."""
        (group,) = super().parameter_groups()
        tau = [pair for pair in group["named"] if pair[0] == "tau"]
        others = group | {"named": [pair for pair in group["named"] if pair[0] != "tau"]}
        own = {"named": tau, "lr_factor": self.cfg.tau_lr_factor, "weight_decay": 0.0}
        return [others, own] if tau else [others]

    def loss(self, batch: Batch) -> Tensor:
        """The recipe's loss. Global crops are anchors and write the table, local ones columns only."""
        self._check(batch)
        cfg, index, count = self.cfg, batch.sample_id, len(batch.global_views)
        z = self._embed(batch)  # (V, b, D)
        columns, offset = gather_columns(z, cfg.gather_grad), rank() * len(index)
        if cfg.loss == "ntxent":
            return ntxent_loss(z[:count], columns, temperature=cfg.tau, offset=offset)
        tables = [table for table in self.tables if isinstance(table, EstimatorTable)]
        log_u = [table.read(index) for table in tables]
        tau = [self._temperature(table, index) for table in tables]
        options: dict[str, Any] = {"first_visit": cfg.first_visit}
        options |= {"gamma": rate_of(cfg, self.plan, self.step), "u_floor": cfg.u_floor, "offset": offset}
        learned: tuple[Estimates, ...]
        if cfg.loss == "gcl":
            options |= {"temperature": tau[0], "u_write": cfg.u_write}
            loss, estimates = gcl_loss_lean(z[:count], columns, log_u[0], **options)
            learned = (estimates,)
            if cfg.gather_grad == "full_noreduce":
                loss = loss + columns_gradient(
                    z, columns[:count], estimates.log_mixed, temperature=tau[0], u_floor=cfg.u_floor
                )
        else:
            options |= {"temperature": tau, "scale": cfg.bimodal_scale}
            loss, learned = bimodal_loss(list(z), list(columns), log_u, **options)
        for name, value in health(learned, log_u, tau).items():
            self.record(f"method/{name}", value)
        self.record("method/visited", tables[0].visited())
        self.setting("method/gamma", options["gamma"])
        remember(tables, index, learned)
        if cfg.loss_scale == "unit":
            loss = loss / cfg.tau
        if cfg.temperature == "global_learnable":
            loss = loss + global_temperature_loss(self.tau, learned, rho=cfg.rho)
        return loss

    def after_step(self, step: int) -> None:
        """Keep the learnable temperature above its lower bound."""
        if self.cfg.temperature == "global_learnable":
            self.tau.data.clamp_(min=self.cfg.tau_min)

    def on_train_epoch_end(self) -> None:
        """Histograms of the tables, where the recipe asks for them."""
        every = self.cfg.histogram_every_epochs
        if every and self.epoch % every == 0:
            for k, table in enumerate(self.tables):
                assert isinstance(table, EstimatorTable)
                log_histogram(self.trainer.loggers, f"method/log_u_{k}", table.known(), step=self.step)

    def _check(self, batch: Batch) -> None:
        """Shapes at every step; the ids once, since that waits for the device."""
        count, local = len(batch.global_views), len(batch.local_views)
        require(count >= 2, f"SogCLR needs two global views, got {count}; set count: 2 in views")
        if self.cfg.loss == "gcl_bimodal":
            require(count == 2 and not local, "method.loss=gcl_bimodal takes exactly two global views")
        if not self._ids_checked:
            largest, size = int(batch.sample_id.max()), self.plan.dataset_size
            require(largest < size, f"sample id {largest} is outside the table of {size} images")
            self._ids_checked = True

    def _embed(self, batch: Batch) -> Tensor:
        """Normalised embeddings (V, b, D); views of one size share a pass, and its batch statistics."""
        views = (*batch.global_views, *batch.local_views)
        if self.cfg.separate_views:
            features = [self.backbone(view) for view in views]
            z = [self.projector(h) for h in features]
        else:
            sizes = [list(group) for _, group in groupby(views, key=lambda view: view.shape[1:])]
            features = [h for same in sizes for h in self.backbone(torch.cat(same)).chunk(len(same))]
            z = self.projector(torch.cat(features)).chunk(len(views))
        self.publish(backbone=features[0])
        return normalize(torch.stack(list(z)))

    def _temperature(self, table: EstimatorTable, index: Tensor) -> float | Tensor:
        if self.cfg.temperature == "individual":
            return table.tau_i[index]
        return self.tau if self.cfg.temperature == "global_learnable" else self.cfg.tau
