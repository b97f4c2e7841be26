"""What a SogCLR recipe states under ``method:``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_positive
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe

FirstVisit = Literal["sample", "batch", "none"]
UWrite = Literal["mean", "sum"]
GatherGrad = Literal["full", "local", "full_noreduce"]
BimodalScale = Literal["mean", "official"]


@dataclass(frozen=True, kw_only=True)
class CosineGamma:
    """gamma from 1 in epoch 0 to ``min`` in epoch ``decay_epochs``, where it stays (FastCLIP)."""

    name: Literal["cosine"] = "cosine"
    min: float
    decay_epochs: int | None = None  # half of the training epochs
    interval: Literal["epoch", "step"] = "epoch"  # how often gamma changes

    def __post_init__(self) -> None:
        check_field(0 < self.min <= 1, "min", f"must lie in (0, 1], got {self.min}")
        check_positive(self, "decay_epochs")


@dataclass(frozen=True, kw_only=True)
class ConstantTemperature:
    """Stays what the recipe says."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class IndividualTemperatures:
    """One for each image, which descends along its own gradient (iSogCLR)."""

    name: Literal["individual"] = "individual"
    rho: float  # radius of the robust objective
    eta: float  # step
    beta: float  # weight of the new gradient in its moving average
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
    """One for all images, a parameter of the optimiser (FastCLIP-v3)."""

    name: Literal["global_learnable"] = "global_learnable"
    rho: float  # radius of the robust objective
    tau_min: float
    lr_factor: float  # its learning rate over the other parameters'

    def __post_init__(self) -> None:
        check_positive(self, "rho", "tau_min", "lr_factor")


@dataclass(frozen=True, kw_only=True)
class NTXent:
    """SimCLR's loss, as the authors' baseline writes it."""

    name: Literal["ntxent"] = "ntxent"
    gather_grad: Literal["full", "local"] = "full"  # local: embeddings of other ranks are constants


@dataclass(frozen=True, kw_only=True)
class GlobalContrastive:
    """What both global contrastive losses have, which keep a running estimate for each image."""

    name: str
    gamma: float | CosineGamma  # weight of the new estimate in the moving average
    u_floor: float | None = None  # lower bound of u_hat; the authors' bimodal code: 1e-20
    first_visit: FirstVisit = "sample"  # batch: official PyTorch; none: TPU code
    divide_by_temperature: bool = False  # for learning rates of SimCLR recipes
    histogram_every_epochs: int | None = None  # of the estimates, to TensorBoard and W&B

    @property
    def smallest_gamma(self) -> float:
        """The smallest that gamma becomes."""
        return self.gamma.min if isinstance(self.gamma, CosineGamma) else self.gamma

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, CosineGamma):
            check_field(0 < self.gamma <= 1, "gamma", f"must lie in (0, 1], got {self.gamma}")
        check_positive(self, "u_floor", "histogram_every_epochs")
        check_field(
            self.first_visit == "sample" or self.smallest_gamma < 1,
            "first_visit",
            "must be sample with gamma=1, where every visit counts as the first",
        )


@dataclass(frozen=True, kw_only=True)
class GCL(GlobalContrastive):
    """The global contrastive loss of the paper: each view against all views of all other images."""

    name: Literal["gcl"] = "gcl"
    u_write: UWrite = "mean"  # over the views; sum: the paper's TPU code
    gather_grad: GatherGrad = "full"  # local: official PyTorch
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
    """The two views as two modalities, each with its own estimates, one against the other."""

    name: Literal["gcl_bimodal"] = "gcl_bimodal"
    scale: BimodalScale = "mean"  # official: times the number of negatives
    gather_grad: Literal["full", "local"] = "full"
    temperature_rule: ConstantTemperature | IndividualTemperatures | LearnableTemperature = (
        ConstantTemperature()
    )


@dataclass(frozen=True, kw_only=True)
class SogCLRConfig(MethodConfig):
    """Numbers without a default stand in every recipe; the switches default to what the card follows."""

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

    temperature: float  # where learnt ones start
    loss: GCL | BimodalGCL | NTXent
    projector: HeadConfig
    crop_batching: CropBatching = "joint"

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
        """Refuse views that the loss cannot contrast, and histograms that nothing would show."""
        count = recipe.global_crops
        check_field(count >= 2, "views", f"must hold two global views or more, got {count}; set count: 2")
        check_field(
            not isinstance(self.loss, BimodalGCL) or recipe.crops == 2,
            "views",
            "must hold two global views and nothing else with method.loss gcl_bimodal",
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
