"""SogCLR: Stochastic Optimization of the Global Contrastive loss (ICML 2022, arXiv:2202.12387)."""

from typing import Any

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.callbacks.meter import log_histogram
from sslzoo.checks import require
from sslzoo.distributed import rank
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import build_head
from sslzoo.nn.numerics import normalize
from sslzoo.nn.passes import forward_crops
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import OptimConfig
from sslzoo_methods.sogclr.bimodal import bimodal_loss, global_temperature_loss
from sslzoo_methods.sogclr.config import (
    GCL,
    IndividualTemperatures,
    LearnableTemperature,
    NTXent,
    SogCLRConfig,
)
from sslzoo_methods.sogclr.gamma import inner_rate
from sslzoo_methods.sogclr.gathering import columns_gradient, gather_columns
from sslzoo_methods.sogclr.health import health
from sslzoo_methods.sogclr.loss import Estimates, gcl_loss_lean, ntxent_loss
from sslzoo_methods.sogclr.table import Descent, EstimatorTable, remember

MODALITIES = {"gcl": 1, "gcl_bimodal": 2, "ntxent": 0}  # number of tables per loss


class SogCLR(SSLMethod[SogCLRConfig]):
    """SogCLR: contrast with all training images by a running estimate per image, updated in each micro-batch."""

    Config = SogCLRConfig

    def __init__(self, cfg: SogCLRConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = build_head(feature_dim, cfg.projector)
        self.rule = None if isinstance(cfg.loss, NTXent) else cfg.loss.temperature_rule
        if isinstance(self.rule, LearnableTemperature):
            self.tau = nn.Parameter(torch.tensor(cfg.temperature))
        self._ids_checked = False

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Create empty tables, one per modality."""
        super().prepare(plan, optim, seed)
        rule, descent = self.rule, None
        if isinstance(rule, IndividualTemperatures):
            descent = Descent(rule.rho, rule.eta, rule.beta, rule.tau_min, rule.tau_max)
        self.tables = nn.ModuleList(
            EstimatorTable(plan.dataset_size, tau_init=self.cfg.temperature, descent=descent)
            for _ in range(MODALITIES[self.cfg.loss.name])
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Put a learnable temperature into its own group, with its own learning rate and no weight decay."""
        (group,) = super().parameter_groups()
        if not isinstance(self.rule, LearnableTemperature):
            return [group]
        tau = [pair for pair in group["named"] if pair[0] == "tau"]
        others = group | {"named": [pair for pair in group["named"] if pair[0] != "tau"]}
        return [others, {"named": tau, "lr_factor": self.rule.lr_factor, "weight_decay": 0.0}]

    def loss(self, batch: Batch) -> Tensor:
        """The recipe's loss. Global crops are anchors and update the tables; local crops are only columns."""
        self._check_ids(batch)
        cfg, index, count = self.cfg.loss, batch.sample_id, len(batch.global_views)
        z = self._embed(batch)  # (V, b, D)
        columns, offset = gather_columns(z, cfg.gather_grad), rank() * len(index)
        if isinstance(cfg, NTXent):
            return ntxent_loss(z[:count], columns, temperature=self.cfg.temperature, offset=offset)
        tables = [table for table in self.tables if isinstance(table, EstimatorTable)]
        log_u = [table.read("log_u", index) for table in tables]
        tau = [self._temperature(table, index) for table in tables]
        gamma = inner_rate(
            self.step,
            cfg.gamma,
            steps_per_epoch=self.plan.steps_per_epoch,
            max_epochs=self.plan.max_epochs,
        )
        options: dict[str, Any] = {"gamma": gamma, "first_visit": cfg.first_visit}
        options |= {"u_floor": cfg.u_floor, "offset": offset}
        learned: tuple[Estimates, ...]
        if isinstance(cfg, GCL):
            options |= {"temperature": tau[0], "u_write": cfg.u_write}
            loss, estimates = gcl_loss_lean(z[:count], columns, log_u[0], **options)
            learned = (estimates,)
            if cfg.gather_grad == "full_noreduce":
                loss = loss + columns_gradient(
                    z, columns[:count], estimates.log_mixed, temperature=tau[0], u_floor=cfg.u_floor
                )
        else:
            options |= {"temperature": tau, "scale": cfg.scale}
            loss, learned = bimodal_loss(list(z), list(columns), log_u, **options)
        for name, value in health(learned, log_u, tau).items():
            self.record(f"method/{name}", value)
        self.setting("method/gamma", gamma)
        written = remember(tables, index, learned)
        self.record("method/log_u_min", written.min())
        self.record("method/log_u_max", written.max())
        if cfg.divide_by_temperature:
            loss = loss / self.cfg.temperature
        if isinstance(self.rule, LearnableTemperature):
            loss = loss + global_temperature_loss(self.tau, learned, rho=self.rule.rho)
        return loss

    def depends_on_processes(self) -> str:
        """With gradients of one process alone."""
        if self.cfg.loss.gather_grad == "local":
            return "method.loss.gather_grad=local has no gradients of other processes"
        return ""

    def depends_on_micro_batches(self) -> str:
        """It does."""
        return "SogCLR contrasts the images of a micro-batch with one another"

    def contrasted(self, batch: Batch) -> Contrast:
        """Projections of two global views, with the recipe's temperature even if temperatures are learned."""
        return Contrast.of_views(
            batch, lambda x: self.projector(self.backbone(x)), temperature=self.cfg.temperature
        )

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone`` (N, F) and ``projector`` (N, D)."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}

    def after_step(self, step: int) -> None:
        """Keep the learnable temperature above its lower bound."""
        if isinstance(self.rule, LearnableTemperature):
            self.tau.data.clamp_(min=self.rule.tau_min)

    def on_train_epoch_end(self) -> None:
        """Log histograms of the tables if the recipe asks for them."""
        if isinstance(self.cfg.loss, NTXent):
            return
        every = self.cfg.loss.histogram_every_epochs
        if every is not None and self.epoch % every == 0:
            for k, table in enumerate(self.tables):
                assert isinstance(table, EstimatorTable)
                log_histogram(self.trainer, f"method/log_u_{k}", table.known(), step=self.step)

    def _check_ids(self, batch: Batch) -> None:
        """Check the sample ids, only once because it synchronises with the device."""
        if not self._ids_checked:
            largest, size = int(batch.sample_id.max()), self.plan.dataset_size
            require(largest < size, f"sample id {largest} is outside the table of {size} images")
            self._ids_checked = True

    def _embed(self, batch: Batch) -> Tensor:
        """Normalised embeddings (V, b, D)."""
        views = (*batch.global_views, *batch.local_views)
        features, z = forward_crops(self.backbone, self.projector, views, self.cfg.crop_batching)
        self.publish(backbone=features[0], projector=z[0])
        return normalize(torch.stack(z))

    def _temperature(self, table: EstimatorTable, index: Tensor) -> float | Tensor:
        if isinstance(self.rule, IndividualTemperatures):
            return table.read("tau_i", index)
        return self.tau if isinstance(self.rule, LearnableTemperature) else self.cfg.temperature
