"""The ``method:`` section of SogCLR recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe
from sslzoo_methods.sogclr.panels import PANELS

FirstVisit = Literal["sample", "batch", "none"]
UWrite = Literal["mean", "sum"]
GatherGrad = Literal["full", "local", "full_noreduce"]
BimodalScale = Literal["mean", "official"]


@dataclass(frozen=True, kw_only=True)
class CosineGamma:
    """gamma decays from 1 in epoch 0 to ``min`` in epoch ``decay_epochs`` and stays there (FastCLIP)."""

    name: Literal["cosine"] = "cosine"
    min: float
    decay_epochs: int | None = None  # None: half of the training epochs
    interval: Literal["epoch", "step"] = "epoch"  # how often gamma changes

    def __post_init__(self) -> None:
        check_field(0 < self.min <= 1, "min", f"must lie in (0, 1], got {self.min}")
        check_positive(self, "decay_epochs")


@dataclass(frozen=True, kw_only=True)
class ConstantTemperature:
    """The temperature is constant."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class IndividualTemperatures:
    """One temperature per image, updated by gradient descent (iSogCLR)."""

    name: Literal["individual"] = "individual"
    rho: float  # radius of the robust objective
    eta: float  # step size
    beta: float  # weight of the new gradient in the moving average
    tau_min: float
    tau_max: float

    def __post_init__(self) -> None:
        check_positive(self, "rho", "eta", "beta", "tau_min")
        check_field(self.beta <= 1, "beta", f"must be at most 1, got {self.beta}")
        check_field(
            self.tau_min <= self.tau_max,
            "tau_max",
            f"must be at least tau_min={self.tau_min}, got {self.tau_max}",
        )


@dataclass(frozen=True, kw_only=True)
class LearnableTemperature:
    """One temperature for all images, trained by the optimiser (FastCLIP-v3)."""

    name: Literal["global_learnable"] = "global_learnable"
    rho: float  # radius of the robust objective
    tau_min: float
    lr_factor: float  # its learning rate relative to the other parameters'

    def __post_init__(self) -> None:
        check_positive(self, "rho", "tau_min", "lr_factor")


@dataclass(frozen=True, kw_only=True)
class NTXent:
    """SimCLR's loss, as in the authors' baseline."""

    name: Literal["ntxent"] = "ntxent"
    gather_grad: Literal["full", "local"] = "full"  # local: no gradient through embeddings of other ranks


@dataclass(frozen=True, kw_only=True)
class GlobalContrastive:
    """Settings common to the global contrastive losses, which keep a running estimate per image."""

    name: str
    gamma: float | CosineGamma  # weight of the new estimate in the moving average
    u_floor: float | None = None  # lower bound of u_hat; the authors' bimodal code uses 1e-20
    first_visit: FirstVisit = "sample"  # batch: official PyTorch code; none: TPU code
    divide_by_temperature: bool = False  # makes learning rates comparable with SimCLR recipes
    histogram_every_epochs: int | None = None  # log histograms of the estimates to TensorBoard and W&B

    @property
    def smallest_gamma(self) -> float:
        """The smallest value of gamma during training."""
        return self.gamma.min if isinstance(self.gamma, CosineGamma) else self.gamma

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, CosineGamma):
            check_field(0 < self.gamma <= 1, "gamma", f"must lie in (0, 1], got {self.gamma}")
        check_positive(self, "u_floor", "histogram_every_epochs")
        check_field(
            self.first_visit == "sample" or self.smallest_gamma < 1,
            "first_visit",
            "must be sample with gamma=1, which treats every visit as the first",
        )


@dataclass(frozen=True, kw_only=True)
class GCL(GlobalContrastive):
    """The global contrastive loss of the paper, which contrasts each view with all views of all other images."""

    name: Literal["gcl"] = "gcl"
    u_write: UWrite = "mean"  # mean over views; sum: as in the paper's TPU code
    gather_grad: GatherGrad = "full"  # local: official PyTorch code; see gathering.py
    temperature_rule: ConstantTemperature | IndividualTemperatures = ConstantTemperature()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            self.u_write == "mean" or 0.5 < self.smallest_gamma < 1,
            "u_write",
            f"must be mean with gamma={self.smallest_gamma}: sum diverges for gamma <= 0.5 and has no effect for 1",
        )


@dataclass(frozen=True, kw_only=True)
class BimodalGCL(GlobalContrastive):
    """Treats the two views as two modalities that are contrasted with each other and have separate estimates."""

    name: Literal["gcl_bimodal"] = "gcl_bimodal"
    scale: BimodalScale = "mean"  # official: multiplied by the number of negatives
    gather_grad: Literal["full", "local"] = "full"
    temperature_rule: ConstantTemperature | IndividualTemperatures | LearnableTemperature = (
        ConstantTemperature()
    )


@dataclass(frozen=True, kw_only=True)
class SogCLRConfig(MethodConfig):
    """Config of SogCLR. Every recipe must set the fields without a default; options default to the card's choice."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

    RENAMED: ClassVar[dict[str, str]] = {
        "tau": "temperature",
        "gamma": "loss.gamma",
        "gamma_schedule": "loss.gamma={name: cosine, min: ...}",
        "gamma_min": "loss.gamma={name: cosine, min: ...}",
        "gamma_decay_epochs": "loss.gamma={name: cosine, min: ..., decay_epochs: ...}",
        "u_floor": "loss.u_floor",
        "first_visit": "loss.first_visit",
        "u_write": "loss.u_write",
        "gather_grad": "loss.gather_grad",
        "loss_scale": "loss.divide_by_temperature",
        "bimodal_scale": "loss.scale",
        "histogram_every_epochs": "loss.histogram_every_epochs",
        "rho": "loss.temperature_rule.rho",
        "eta": "loss.temperature_rule.eta",
        "beta": "loss.temperature_rule.beta",
        "tau_min": "loss.temperature_rule.tau_min",
        "tau_max": "loss.temperature_rule.tau_max",
        "tau_lr_factor": "loss.temperature_rule.lr_factor",
        "separate_views": "crop_batching",
        "projector_norm": "projector.output_norm",
    }

    temperature: float  # the initial value if temperatures are learned
    loss: GCL | BimodalGCL | NTXent
    projector: HeadConfig
    crop_batching: CropBatching = "joint"

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        rule = None if isinstance(self.loss, NTXent) else self.loss.temperature_rule
        if isinstance(rule, IndividualTemperatures | LearnableTemperature):
            check_field(
                self.temperature >= rule.tau_min,
                "temperature",
                f"must be at least method.loss.temperature_rule.tau_min={rule.tau_min}, got {self.temperature}",
            )
        if isinstance(rule, IndividualTemperatures):
            check_field(
                self.temperature <= rule.tau_max,
                "temperature",
                f"must be at most method.loss.temperature_rule.tau_max={rule.tau_max}, got {self.temperature}",
            )

    def check(self, recipe: Recipe) -> None:
        """Check that the views suit the loss, and that a logger for the histograms is enabled."""
        count = recipe.global_crops
        check_field(count >= 2, "views", f"must have at least two global views, got {count}; set count: 2")
        check_field(
            not isinstance(self.loss, BimodalGCL) or recipe.crops == 2,
            "views",
            "must be exactly two global views with method.loss gcl_bimodal",
        )
        log = recipe.logging
        check_field(
            isinstance(self.loss, NTXent)
            or self.loss.histogram_every_epochs is None
            or log.tensorboard
            or log.wandb is not None,
            "method.loss.histogram_every_epochs",
            "needs TensorBoard or W&B: set logging.tensorboard=true or logging.wandb={}",
        )
