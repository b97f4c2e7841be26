"""What an SCE recipe states under ``method:``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_fraction, check_not_negative, check_positive
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe

TargetPositive = Literal["zero_logit", "masked"]
PairWeighting = Literal["flat", "per_online_crop"]


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """From ``start`` to the number whose warm-up it is, over the first ``epochs``."""

    start: float
    epochs: float
    shape: Literal["linear", "cosine"] = "linear"  # cosine: half a period

    def __post_init__(self) -> None:
        check_positive(self, "epochs")


@dataclass(frozen=True, kw_only=True)
class SCELoss:
    """The loss of the paper: both relational terms have the weight 1 - ``contrastive_weight``."""

    name: Literal["sce"] = "sce"
    contrastive_weight: float  # lambda: 1 is InfoNCE, 0 the relational terms (ReSSL + Ceil)
    contrastive_weight_warmup: Warmup | None = None
    target_positive: TargetPositive = "zero_logit"  # official code, queue alone | masked, as in the paper

    def __post_init__(self) -> None:
        check_fraction(self, "contrastive_weight")
        if self.contrastive_weight_warmup is not None:
            start = self.contrastive_weight_warmup.start
            check_field(
                0 <= start <= 1, "contrastive_weight_warmup.start", f"must lie in [0, 1], got {start}"
            )


@dataclass(frozen=True, kw_only=True)
class ReSSLLoss:
    """The relational term alone: the positive is a candidate on neither side."""

    name: Literal["ressl"] = "ressl"


@dataclass(frozen=True, kw_only=True)
class ThreeTermLoss:
    """A free weight for each term, with the positive masked: the loss ablation of the paper."""

    name: Literal["three_terms"] = "three_terms"
    contrastive_weight: float  # lambda, on L_InfoNCE
    relational_weight: float  # mu, on L_ReSSL
    ceil_weight: float  # eta, on L_Ceil

    def __post_init__(self) -> None:
        check_not_negative(self, "contrastive_weight", "relational_weight", "ceil_weight")


@dataclass(frozen=True, kw_only=True)
class SCEConfig(MethodConfig):
    """Numbers that the published recipes vary have no default."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "contrastive_weight": "loss.contrastive_weight",
        "contrastive_weight_warmup": "loss.contrastive_weight_warmup",
        "target_positive": "loss.target_positive",
        "terms": "loss={name: three_terms, ...}",
        "ressl": "loss=ressl",
        "batch_keys": "batch_negatives",
        "crop_pass": "crop_batching",
    }

    loss: SCELoss | ReSSLLoss | ThreeTermLoss
    temperature: float  # tau, of the online prediction
    target_temperature: float  # tau_m, of the momentum branch's target; sharper, hence below temperature
    target_temperature_warmup: Warmup | None = None
    queue_size: int | None  # keys, over all ranks; None: no queue
    batch_negatives: bool = False  # the other images of the global batch are candidates too
    momentum: float  # of the EMA, at step 0
    momentum_schedule: Literal["constant", "cosine", "cosine_epoch"]  # to 1 at the last step or epoch
    momentum_batchnorm: Literal["same", "shuffle", "split"] = "same"  # as online | over ranks | in 8 on each
    symmetric: bool  # false: the first view goes to the momentum branch only, the others online only
    pair_weighting: PairWeighting = "flat"  # over pairs
    crop_batching: CropBatching = "per_crop"  # the others: batch norm sees several crops at once
    projector: HeadConfig
    predictor: HeadConfig | None = None  # online branch only

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "target_temperature")
        check_field(
            self.queue_size is None or self.queue_size > 0,
            "queue_size",
            f"must be positive, or null for no queue; got {self.queue_size}",
        )
        check_fraction(self, "momentum")
        width = self.projector.widths[-1]
        check_field(
            self.predictor is None or self.predictor.widths[-1] == width,
            "predictor.widths",
            f"must end in the width of method.projector, {width}, got {self.predictor and list(self.predictor.widths)}",
        )
        if self.target_temperature_warmup is not None:
            start = self.target_temperature_warmup.start
            check_field(start > 0, "target_temperature_warmup.start", f"must be positive, got {start}")
        check_field(
            self.queue_size is not None or self.batch_negatives,
            "queue_size",
            "must be a number, or there are no negatives; or set method.batch_negatives=true",
        )
        zero_logit = isinstance(self.loss, SCELoss) and self.loss.target_positive == "zero_logit"
        check_field(
            not (zero_logit and self.batch_negatives),
            "loss.target_positive",
            "must be masked with method.batch_negatives=true: zero_logit is defined for the queue alone",
        )

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    def check(self, recipe: Recipe) -> None:
        """The views and the batch norms of ``recipe`` must suit the branches."""
        global_views, crops = recipe.global_crops, recipe.crops
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
        check_field(
            self.crop_batching == "per_crop" or self.symmetric or crops > 2,
            "method.crop_batching",
            "must be per_crop with two views and method.symmetric=false, where each branch sees one",
        )
        check_field(
            self.pair_weighting == "flat" or (self.symmetric and 1 < global_views < crops),
            "method.pair_weighting",
            "must be flat but with method.symmetric=true, two global views and local ones: else all weigh alike",
        )
