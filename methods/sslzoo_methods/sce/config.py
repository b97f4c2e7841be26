"""What an SCE recipe states under ``method:``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sslzoo.checks import check_field, check_not_negative, one_of
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """From ``start`` to the option's own value over the first ``epochs``."""

    start: float
    epochs: float
    shape: str = "linear"  # or cosine, half a period

    def __post_init__(self) -> None:
        check_field(self.epochs > 0, "epochs", f"must be positive, got {self.epochs}")
        one_of("shape", self.shape, ("linear", "cosine"))


@dataclass(frozen=True, kw_only=True)
class TermsConfig:
    """Free weights of the two relational terms: the loss ablation of the paper."""

    relational: float  # mu, on L_ReSSL
    ceil: float  # eta, on L_Ceil

    def __post_init__(self) -> None:
        check_not_negative(self, "relational", "ceil")


@dataclass(frozen=True, kw_only=True)
class SCEConfig(MethodConfig):
    """Numbers that the published recipes vary have no default."""

    RENAMED: ClassVar[Mapping[str, str]] = {"crop_pass": "crop_batching"}

    temperature: float  # tau, of the online prediction
    target_temperature: float  # tau_m, of the momentum branch's target; sharper, hence below temperature
    contrastive_weight: float  # lambda: 1 is InfoNCE, 0 the relational loss (ReSSL + Ceil)
    queue_size: int  # keys, over all ranks; 0: no queue
    momentum: float  # of the EMA, at step 0
    momentum_schedule: str  # constant | cosine | cosine_epoch, to 1 at the last step or epoch
    symmetric: bool  # false: the first view goes to the momentum branch only, the others online only
    projector: HeadConfig
    predictor: HeadConfig | None = None  # online branch only
    momentum_batchnorm: str = "same"  # as the online branch | shuffle over ranks | split in 8 on each
    batch_keys: bool = False  # the other images of the global batch are candidates too
    target_positive: str = "zero_logit"  # official code, queue alone | masked, as in the paper
    pair_weighting: str = "flat"  # over pairs | per_online_crop
    crop_batching: CropBatching = "per_crop"  # the others: batch norm sees several crops at once
    target_temperature_warmup: WarmupConfig | None = None
    contrastive_weight_warmup: WarmupConfig | None = None
    terms: TermsConfig | None = None  # None: both 1 - contrastive_weight, which is SCE
    ressl: bool = False  # the positive is a candidate on neither side: L_ReSSL alone

    def __post_init__(self) -> None:
        for key in ("temperature", "target_temperature"):
            check_field(getattr(self, key) > 0, key, f"must be positive, got {getattr(self, key)}")
        for key in ("contrastive_weight", "momentum"):
            check_field(0 <= getattr(self, key) <= 1, key, f"must lie in [0, 1], got {getattr(self, key)}")
        check_field(self.queue_size >= 0, "queue_size", f"must not be negative, got {self.queue_size}")
        one_of("momentum_schedule", self.momentum_schedule, ("constant", "cosine", "cosine_epoch"))
        one_of("momentum_batchnorm", self.momentum_batchnorm, ("same", "shuffle", "split"))
        one_of("target_positive", self.target_positive, ("zero_logit", "masked"))
        one_of("pair_weighting", self.pair_weighting, ("flat", "per_online_crop"))
        masked = self.target_positive == "masked"
        check_field(
            self.queue_size > 0 or self.batch_keys,
            "queue_size",
            "must be positive, or there are no negatives; or set method.batch_keys=true",
        )
        check_field(
            masked or not self.batch_keys,
            "target_positive",
            "must be masked with method.batch_keys=true: zero_logit is defined for the queue alone",
        )
        check_field(
            masked or not (self.terms or self.ressl),
            "target_positive",
            "must be masked with method.terms and with method.ressl",
        )
        check_field(
            not (self.ressl and (self.terms or self.contrastive_weight or self.contrastive_weight_warmup)),
            "ressl",
            "true is the relational term alone: set method.contrastive_weight=0, "
            "without method.terms and method.contrastive_weight_warmup",
        )
        warmup = self.target_temperature_warmup
        check_field(warmup is None or warmup.start > 0, "target_temperature_warmup.start", "must be positive")
        warmup = self.contrastive_weight_warmup
        check_field(
            warmup is None or 0 <= warmup.start <= 1,
            "contrastive_weight_warmup.start",
            "must lie in [0, 1]",
        )

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    def check(self, recipe: Recipe) -> None:
        """The views and the batch norms of ``recipe`` must suit the branches."""
        global_views = sum(view.count for view in recipe.views if view.role == "global")
        crops = sum(view.count for view in recipe.views)
        check_field(
            global_views > 0 and crops > 1,
            "views",
            f"must hold what SCE needs: a global view and a further one, got {global_views} global of {crops}",
        )
        check_field(
            self.momentum_batchnorm == "same" or not recipe.trainer.get("sync_batchnorm", False),
            "method.momentum_batchnorm",
            f"{self.momentum_batchnorm} and trainer.sync_batchnorm=true undo one another: keep one of the two",
        )

    def relational_weights(self, contrastive_weight: float) -> tuple[float, float]:
        """(mu, eta) beside a lambda of ``contrastive_weight``."""
        if self.ressl:
            return 1.0, 0.0
        if self.terms is not None:
            return self.terms.relational, self.terms.ceil
        return 1 - contrastive_weight, 1 - contrastive_weight
