"""The ``method:`` section of MMCL recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe
from sslzoo_methods.mmcl.panels import PANELS

KernelName = Literal["rbf", "linear", "poly", "tanh", "min"]
SigmaRule = Literal["fixed", "auto", "median"]
SelfTerm = Literal["one", "kernel"]
AlphaNormalize = Literal["none", "mean"]
Variant = Literal["nesterov", "vanilla"]
Step = float | Literal["frobenius", "lipschitz"]
Stop = Literal["relative_change", "kkt"]
Init = Literal["gaussian", "zero", "inv"]

# -- kernels -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConstantSigma:
    """sigma is constant."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class StepSigma:
    """sigma is multiplied by ``gamma`` at the start of each epoch in ``milestones``."""

    name: Literal["step"] = "step"
    milestones: tuple[int, ...]  # epochs, counted from 1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        epochs = list(self.milestones)
        check_field(
            len(epochs) > 0 and epochs[0] > 1 and epochs == sorted(set(epochs)),
            "milestones",
            f"must increase and be above 1 (epochs are counted from 1), got {epochs}",
        )
        check_field(0 < self.gamma != 1, "gamma", f"must be positive and not 1, got {self.gamma}")


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Settings common to kernels with a bandwidth."""

    name: str
    sigma: float  # divides the squared distance (rbf) or multiplies the dot product (tanh)
    sigma_rule: SigmaRule = "fixed"  # unit of sigma: 1 | auto: 1 / embedding width | median squared distance
    sigma_schedule: ConstantSigma | StepSigma = ConstantSigma()

    def __post_init__(self) -> None:
        check_positive(self, "sigma")

    def sigma_at(self, epoch: int) -> float:
        """sigma in ``epoch``, counted from 0."""
        if isinstance(self.sigma_schedule, ConstantSigma):
            return self.sigma
        passed = sum(epoch >= m - 1 for m in self.sigma_schedule.milestones)
        return self.sigma * self.sigma_schedule.gamma**passed


@dataclass(frozen=True, kw_only=True)
class RBF(Bandwidth):
    """exp(-|a - b|^2 / sigma)."""

    name: Literal["rbf"] = "rbf"
    self_term: ClassVar[SelfTerm] = "one"  # because k(x, x) = 1


@dataclass(frozen=True, kw_only=True)
class Tanh(Bandwidth):
    """tanh(sigma a.b), which is not positive semi-definite."""

    name: Literal["tanh"] = "tanh"
    self_term: SelfTerm  # s_j: one (official code) | kernel: k(x_j, x_j)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """a.b."""

    name: Literal["linear"] = "linear"
    self_term: ClassVar[SelfTerm] = "one"


@dataclass(frozen=True, kw_only=True)
class PolyOrMin:
    """poly: (a.b + 0.5)^3; min: sum_d min(relu a_d, relu b_d)."""

    name: Literal["poly", "min"]
    self_term: SelfTerm  # as for tanh


# -- solvers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class INV:
    """The unconstrained minimiser, clipped to the constraints."""

    name: Literal["inv"] = "inv"


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent, with the authors' values as defaults."""

    name: Literal["pgd"] = "pgd"
    variant: Variant = "nesterov"
    step: Step = 1e-3  # stable up to 1 / lambda_max (vanilla: twice that); names: 1 / a bound of lambda_max
    max_iter: int = 1000
    stop: Stop = "relative_change"
    tol: float = 0.01
    init: Init = "gaussian"

    def __post_init__(self) -> None:
        check_field(
            isinstance(self.step, str) or self.step > 0,
            "step",
            f"must be positive, frobenius or lipschitz, got {self.step}",
        )
        check_positive(self, "max_iter", "tol")


@dataclass(frozen=True, kw_only=True)
class AdaptivePGD:
    """The optimum, by FISTA with step size and restarts per anchor."""

    name: Literal["pgd_adaptive"] = "pgd_adaptive"
    max_iter: int = 1000
    tol: float | None = (
        1e-3  # largest relative KKT residual; None: always max_iter updates, without host waits
    )

    def __post_init__(self) -> None:
        check_positive(self, "max_iter")
        check_field(
            self.tol is None or self.tol > 0,
            "tol",
            f"must be positive, or null to always do max_iter updates; got {self.tol}",
        )


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The optimum in float64; slow, for debugging."""

    name: Literal["exact"] = "exact"


# -- the method ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MMCLConfig(MethodConfig):
    """Config of MMCL. Values that recipes tune have no default; the others default to the authors' values."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

    RENAMED: ClassVar[Mapping[str, str]] = {
        "sigma": "kernel.sigma",
        "sigma_rule": "kernel.sigma_rule",
        "sigma_milestones": "kernel.sigma_schedule={name: step, milestones: ...}",
        "sigma_gamma": "kernel.sigma_schedule={name: step, milestones: ..., gamma: ...}",
        "self_kernel": "kernel.self_term",
        "pgd": "solver={name: pgd, ...}",
        "adaptive": "solver={name: pgd_adaptive, ...}",
        "projector_norm": "projector.output_norm",
        "crop_pass": "crop_batching",
    }

    kernel: RBF | Linear | PolyOrMin | Tanh
    solver: INV | PGD | AdaptivePGD | Exact
    C: float | None  # upper bound of the dual variables; None: unbounded
    reg: float = 0.1  # ridge regularisation of the dual problem
    symmetric: bool = False  # also use view 2 as anchors and average; costs a second Gram matrix and solve
    negatives: Literal["view1", "both"] = "view1"  # both: the 2N - 2 views of the other images
    alpha_normalize: AlphaNormalize = (
        "none"  # mean: divide the duals by the mean of alpha_x, to suit plain SGD
    )
    gather: bool = True  # use negatives of all ranks; false: only this rank's
    projector: HeadConfig
    crop_batching: CropBatching  # per_crop: CIFAR code; per_resolution: ImageNet code

    @property
    def softmax_temperature(self) -> float | None:
        """sigma / 2 for the rbf kernel with fixed sigma, since on unit vectors it is proportional to
        exp(cos / (sigma / 2)); otherwise None."""
        kernel = self.kernel
        if not isinstance(kernel, RBF) or kernel.sigma_rule != "fixed":
            return None
        return kernel.sigma / 2 if isinstance(kernel.sigma_schedule, ConstantSigma) else None

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_positive(self, "reg")
        check_field(
            self.C is None or self.C > 0, "C", f"must be positive, or null for no bound; got {self.C}"
        )
        check_field(
            self.C is not None or not isinstance(self.kernel, Tanh),
            "C",
            "must be a number with method.kernel tanh, which is not positive semi-definite: the duals are unbounded",
        )
        check_field(
            self.C is not None
            or isinstance(self.solver, INV)
            or not isinstance(self.kernel, PolyOrMin)
            or self.kernel.self_term == "kernel",
            "kernel.self_term",
            f"must be kernel with method.kernel {self.kernel.name}, method.C=null and method.solver "
            f"{self.solver.name}: the problem may have no minimum",
        )

    def check(self, recipe: Recipe) -> None:
        """Require enough views for anchors and queries."""
        global_views, crops = recipe.global_crops, recipe.crops
        needed = 2 if self.symmetric or self.negatives == "both" else 1
        check_field(
            global_views >= needed and crops > 1,
            "views",
            f"must have at least two views, {needed} of them global, with these settings; "
            f"got {crops}, {global_views} of them global",
        )
