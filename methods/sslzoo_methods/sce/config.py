"""The ``method:`` section of SCE recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_fraction, check_not_negative, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe
from sslzoo_methods.sce.panels import PANELS

TargetPositive = Literal["zero_logit", "masked"]
PairWeighting = Literal["flat", "per_online_crop"]


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Ramp of a parameter from ``start`` to its value over the first ``epochs``."""

    start: float
    epochs: float
    shape: Literal["linear", "cosine"] = "linear"  # cosine: half a period

    def __post_init__(self) -> None:
        check_positive(self, "epochs")


@dataclass(frozen=True, kw_only=True)
class SCELoss:
    """The loss of the paper; both relational terms have the weight 1 - ``contrastive_weight``."""

    name: Literal["sce"] = "sce"
    contrastive_weight: float  # lambda: 1 is InfoNCE, 0 only the relational terms (ReSSL + Ceil)
    contrastive_weight_warmup: Warmup | None = None
    target_positive: TargetPositive = (
        "zero_logit"  # as in the official code, queue only; masked: as in the paper
    )

    def __post_init__(self) -> None:
        check_fraction(self, "contrastive_weight")
        if self.contrastive_weight_warmup is not None:
            start = self.contrastive_weight_warmup.start
            check_field(
                0 <= start <= 1, "contrastive_weight_warmup.start", f"must lie in [0, 1], got {start}"
            )


@dataclass(frozen=True, kw_only=True)
class ReSSLLoss:
    """Only the relational term, in which the positive is not among the candidates."""

    name: Literal["ressl"] = "ressl"


@dataclass(frozen=True, kw_only=True)
class ThreeTermLoss:
    """Independent weights for the three terms, with the positive masked, as in the paper's ablation."""

    name: Literal["three_terms"] = "three_terms"
    contrastive_weight: float  # lambda, on L_InfoNCE
    relational_weight: float  # mu, on L_ReSSL
    ceil_weight: float  # eta, on L_Ceil

    def __post_init__(self) -> None:
        check_not_negative(self, "contrastive_weight", "relational_weight", "ceil_weight")


@dataclass(frozen=True, kw_only=True)
class SCEConfig(MethodConfig):
    """Config of SCE; values that published recipes tune have no default."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

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
    temperature: float  # tau, for the online prediction
    target_temperature: (
        float  # tau_m, for the target of the momentum branch; lower than temperature, so sharper
    )
    target_temperature_warmup: Warmup | None = None
    queue_size: int | None  # keys, over all ranks; None: no queue
    batch_negatives: bool = False  # use the other images of the global batch as candidates too
    momentum: float  # EMA coefficient at step 0
    momentum_schedule: Literal[
        "constant", "cosine", "cosine_epoch"
    ]  # cosine: to 1 at the last step (or epoch)
    # same: like the online branch; shuffle: ShuffleBN over ranks; split: in 8 groups on each device
    momentum_batchnorm: Literal["same", "shuffle", "split"] = "same"
    symmetric: (
        bool  # false: only the first view goes to the momentum branch, and only the others to the online one
    )
    pair_weighting: PairWeighting = "flat"  # see loss.crop_pairs
    crop_batching: CropBatching = "per_crop"  # otherwise batch norm uses joint statistics of several crops
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
            "must be a number unless method.batch_negatives=true: otherwise there are no negatives",
        )
        zero_logit = isinstance(self.loss, SCELoss) and self.loss.target_positive == "zero_logit"
        check_field(
            not (zero_logit and self.batch_negatives),
            "loss.target_positive",
            "must be masked with method.batch_negatives=true: zero_logit is only defined for the queue",
        )

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector."""
        return ("backbone", "projector")

    def check(self, recipe: Recipe) -> None:
        """Check the views and batch-norm settings of ``recipe``."""
        global_views, crops = recipe.global_crops, recipe.crops
        check_field(
            global_views > 0 and crops > 1,
            "views",
            f"must have at least two views, one of them global; got {crops}, {global_views} of them global",
        )
        check_field(
            self.momentum_batchnorm == "same" or not recipe.trainer.get("sync_batchnorm", False),
            "method.momentum_batchnorm",
            f"must be same with trainer.sync_batchnorm=true, which cancels {self.momentum_batchnorm}",
        )
        check_field(
            self.crop_batching == "per_crop" or self.symmetric or crops > 2,
            "method.crop_batching",
            "must be per_crop with two views and method.symmetric=false, because each branch sees one view",
        )
        check_field(
            self.pair_weighting == "flat" or (self.symmetric and 1 < global_views < crops),
            "method.pair_weighting",
            "must be flat unless method.symmetric=true with two global views and local views: otherwise all pairs "
            "have equal weights anyway",
        )
