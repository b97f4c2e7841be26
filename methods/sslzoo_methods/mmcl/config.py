"""What an MMCL recipe states under ``method:``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_positive
from sslzoo.recipe.sections import CropBatching, HeadConfig, MethodConfig, Recipe

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
    """Stays what the recipe says."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class StepSigma:
    """Times ``gamma`` at the start of each epoch in ``milestones``."""

    name: Literal["step"] = "step"
    milestones: tuple[int, ...]  # counted from 1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        given = list(self.milestones)
        check_field(
            len(given) > 0 and given[0] > 1 and given == sorted(set(given)),
            "milestones",
            f"must increase and be above 1 (epochs are counted from 1), got {given}",
        )
        check_field(0 < self.gamma != 1, "gamma", f"must be positive and not 1, got {self.gamma}")


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """What kernels with a bandwidth have."""

    name: str
    sigma: float  # rbf divides a squared distance by it, tanh multiplies
    sigma_rule: SigmaRule = "fixed"  # unit of sigma: 1 | auto: 1 / embedding width | median squared distance
    sigma_schedule: ConstantSigma | StepSigma = ConstantSigma()

    def __post_init__(self) -> None:
        check_positive(self, "sigma")

    def sigma_at(self, epoch: int) -> float:
        """sigma of ``epoch``, counted from 0."""
        if isinstance(self.sigma_schedule, ConstantSigma):
            return self.sigma
        passed = sum(epoch >= m - 1 for m in self.sigma_schedule.milestones)
        return self.sigma * self.sigma_schedule.gamma**passed


@dataclass(frozen=True, kw_only=True)
class RBF(Bandwidth):
    """exp(-|a - b|^2 / sigma)."""

    name: Literal["rbf"] = "rbf"
    self_term: ClassVar[SelfTerm] = "one"  # which k(x, x) is


@dataclass(frozen=True, kw_only=True)
class Tanh(Bandwidth):
    """tanh(sigma a.b), which is no valid kernel."""

    name: Literal["tanh"] = "tanh"
    self_term: SelfTerm  # s_j: one (official) | kernel: k(x_j, x_j)


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
    """The unconstrained minimiser, clipped."""

    name: Literal["inv"] = "inv"


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient, with the authors' values."""

    name: Literal["pgd"] = "pgd"
    variant: Variant = "nesterov"
    step: Step = 1e-3  # unstable above 1 / lambda_max (nesterov) or twice that; or 1 / a bound of lambda_max
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
    """The optimum, by FISTA with a step and restarts for each anchor."""

    name: Literal["pgd_adaptive"] = "pgd_adaptive"
    max_iter: int = 1000
    tol: float | None = 1e-3  # worst relative KKT residual; None: max_iter updates, no wait for the device

    def __post_init__(self) -> None:
        check_positive(self, "max_iter")
        check_field(
            self.tol is None or self.tol > 0,
            "tol",
            f"must be positive, or null to make max_iter updates; got {self.tol}",
        )


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The optimum in float64, slow: for debugging."""

    name: Literal["exact"] = "exact"


# -- the method ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MMCLConfig(MethodConfig):
    """What recipes vary has no default; what the authors never varied has theirs."""

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
    C: float | None  # upper bound of the duals; None: none
    reg: float = 0.1  # ridge of the dual problem
    symmetric: bool = False  # average with view 2 as anchors; a second Gram matrix and solve
    negatives: Literal["view1", "both"] = "view1"  # both: the 2N - 2 views of the other images
    alpha_normalize: AlphaNormalize = "none"  # mean: duals over the mean of alpha_x, a scale for plain SGD
    gather: bool = True  # negatives of all ranks; false: of the own
    projector: HeadConfig
    crop_batching: CropBatching  # per_crop: CIFAR code; per_resolution: ImageNet code

    @property
    def softmax_temperature(self) -> float | None:
        """sigma / 2 of the rbf kernel, which on unit vectors is exp(cos / (sigma / 2)) but for a constant; none
        where sigma changes or the kernel is another."""
        kernel = self.kernel
        if not isinstance(kernel, RBF) or kernel.sigma_rule != "fixed":
            return None
        return kernel.sigma / 2 if isinstance(kernel.sigma_schedule, ConstantSigma) else None

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_positive(self, "reg")
        check_field(
            self.C is None or self.C > 0, "C", f"must be positive, or null for no bound; got {self.C}"
        )
        check_field(
            self.C is not None or not isinstance(self.kernel, Tanh),
            "C",
            "must be a number with method.kernel tanh, which is no valid kernel: the duals have no bound",
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
        """There must be anchors and queries."""
        global_views, crops = recipe.global_crops, recipe.crops
        wanted = 2 if self.symmetric or self.negatives == "both" else 1
        check_field(
            global_views >= wanted and crops > 1,
            "views",
            f"must hold two views or more, {wanted} of them global, as MMCL is configured; "
            f"got {global_views} global of {crops}",
        )
