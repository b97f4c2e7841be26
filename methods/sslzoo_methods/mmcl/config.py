"""What an MMCL recipe states under ``method:``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sslzoo.checks import check_field, one_of
from sslzoo.recipe.sections import CropBatching, MethodConfig

SOLVERS = ("inv", "pgd", "pgd_adaptive", "exact")
KERNELS = ("rbf", "linear", "poly", "tanh", "min")
SIGMA_RULES = ("fixed", "auto", "median")
SELF_KERNELS = ("one", "true")
ALPHA_NORMALIZE = ("none", "mean")
VARIANTS = ("nesterov", "vanilla")
STEPS = ("fixed", "frobenius", "lipschitz")
STOPS = ("relative_change", "kkt")
INITS = ("gaussian", "zero", "inv")


@dataclass(frozen=True, kw_only=True)
class PGDConfig:
    """``solver: pgd``, with the authors' values."""

    variant: str = "nesterov"
    step: str = "fixed"
    eta: float = 1e-3  # of the fixed step; unstable where it exceeds 1/lambda_max (nesterov) or twice that
    max_iter: int = 1000
    stop: str = "relative_change"
    tol: float = 0.01
    init: str = "gaussian"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, VARIANTS)
        one_of("step", self.step, STEPS)
        one_of("stop", self.stop, STOPS)
        one_of("init", self.init, INITS)
        check_field(self.eta > 0, "eta", f"must be positive, got {self.eta}")
        check_field(self.max_iter > 0, "max_iter", f"must be positive, got {self.max_iter}")
        check_field(self.tol > 0, "tol", f"must be positive, got {self.tol}")


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """``solver: pgd_adaptive``."""

    max_iter: int = 1000
    tol: float = (
        1e-3  # worst relative KKT residual; 0: always max_iter updates, without waiting for the device
    )

    def __post_init__(self) -> None:
        check_field(self.max_iter > 0, "max_iter", f"must be positive, got {self.max_iter}")
        check_field(self.tol >= 0, "tol", f"must not be negative, got {self.tol}")


@dataclass(frozen=True, kw_only=True)
class MMCLConfig(MethodConfig):
    """What recipes vary has no default; what the authors never varied has theirs."""

    RENAMED: ClassVar[Mapping[str, str]] = {"crop_pass": "crop_batching"}

    solver: str  # inv | pgd | pgd_adaptive | exact (float64, slow, for debugging)
    kernel: str  # rbf | linear | poly | tanh | min
    sigma: float  # bandwidth, in the unit of sigma_rule: rbf divides by it, tanh multiplies
    C: float  # upper bound of the duals; -1: none
    self_kernel: str  # s_j: one (official) | true (k(x_j, x_j)); the same for rbf and linear
    projector: tuple[int, ...]  # layer widths after the backbone, embedding last
    projector_norm: Literal["none", "batch_no_shift"]  # with bias (CIFAR code) | BN, no shift (ImageNet code)
    crop_batching: (
        CropBatching  # per_crop: CIFAR code; per_resolution, one batch norm for both views: ImageNet code
    )
    sigma_rule: str = "fixed"  # unit of sigma: 1 | auto: 1 / embedding width | median squared distance
    sigma_milestones: tuple[int, ...] = ()  # epochs, counted from 1, at whose start sigma takes a factor
    sigma_gamma: float = 0.1  # that factor
    reg: float = 0.1  # ridge of the dual problem
    symmetric: bool = False  # average with view 2 as anchors; a second Gram matrix and solve
    negatives: str = "view1"  # or both: the 2N - 2 views of the other images
    alpha_normalize: str = "none"  # mean: duals divided by the mean of alpha_x, a scale for plain SGD
    gather: bool = True  # negatives of all ranks; false: of the own
    pgd: PGDConfig = field(default_factory=PGDConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    @property
    def contrast_temperature(self) -> float | None:
        """sigma / 2 of the rbf kernel, which on unit vectors is exp(cos / (sigma / 2)) but for a constant; none
        where sigma changes or the kernel is another."""
        constant = self.sigma_rule == "fixed" and not self.sigma_milestones
        return self.sigma / 2 if self.kernel == "rbf" and constant else None

    def __post_init__(self) -> None:
        one_of("solver", self.solver, SOLVERS)
        one_of("kernel", self.kernel, KERNELS)
        one_of("self_kernel", self.self_kernel, SELF_KERNELS)
        one_of("sigma_rule", self.sigma_rule, SIGMA_RULES)
        one_of("negatives", self.negatives, ("view1", "both"))
        one_of("alpha_normalize", self.alpha_normalize, ALPHA_NORMALIZE)
        check_field(self.sigma > 0, "sigma", f"must be positive, got {self.sigma}")
        check_field(self.sigma_gamma > 0, "sigma_gamma", f"must be positive, got {self.sigma_gamma}")
        check_field(
            all(m > 1 for m in self.sigma_milestones)
            and list(self.sigma_milestones) == sorted(set(self.sigma_milestones)),
            "sigma_milestones",
            f"must increase and be above 1 (epochs are counted from 1), got {self.sigma_milestones}",
        )
        check_field(self.C == -1 or self.C > 0, "C", f"must be positive, or -1 for no bound, got {self.C}")
        check_field(self.reg > 0, "reg", f"must be positive, got {self.reg}")
        check_field(len(self.projector) > 0, "projector", "needs the embedding width, such as [2048, 128]")
        check_field(
            self.C > 0 or self.kernel != "tanh",
            "C",
            "must be positive with method.kernel=tanh, which is no valid kernel: the duals have no bound",
        )
        check_field(
            self.C > 0
            or self.solver == "inv"
            or self.kernel not in ("poly", "min")
            or self.self_kernel == "true",
            "self_kernel",
            f"must be true with method.kernel={self.kernel}, method.C=-1 and "
            f"method.solver={self.solver}: the problem may have no minimum",
        )
