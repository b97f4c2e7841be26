"""The ``method:`` section of margin recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import pi, radians
from typing import ClassVar, Literal

from sslzoo.checks import ConfigError, check_field, check_fraction, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import HeadConfig, MethodConfig, Recipe
from sslzoo_methods.margin.panels import PANELS

# -- the base framework: what is compared with what ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig:
    """SimCLR: contrasts both views with both views of the batch (NT-Xent, arXiv:2002.05709)."""

    name: Literal["simclr"] = "simclr"
    temperature: float  # tau
    beta: float = 1.0  # weight of the log-partition: 1 is InfoNCE, 0 has no negatives
    chunk_size: int | None = None  # anchors whose similarities are computed at a time; None: all

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "chunk_size")
        check_fraction(self, "beta")


@dataclass(frozen=True, kw_only=True)
class MoCoV2Config:
    """MoCo v2: contrasts queries with their momentum key and a queue of earlier keys (arXiv:2003.04297)."""

    name: Literal["mocov2"] = "mocov2"
    temperature: float  # tau
    beta: float = 1.0  # weight of the log-partition: 1 is InfoNCE, 0 has no negatives
    queue_size: int
    momentum_start: float  # EMA coefficient at step 0
    momentum_end: float = 1.0  # EMA coefficient at the last step, reached by a cosine schedule
    symmetric: bool = (
        True  # all views are queries and keys; false: the second provides the keys for the others
    )
    momentum_batchnorm: Literal["same", "shuffle"] = "same"  # like the online branch, or ShuffleBN over ranks
    chunk_size: int | None = None  # anchors whose similarities are computed at a time; None: all

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "queue_size", "chunk_size")
        check_fraction(self, "beta")
        check_momentum(self)


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config:
    """MoCo v3: contrasts predictions with the momentum keys of the global batch (arXiv:2104.02057)."""

    name: Literal["mocov3"] = "mocov3"
    temperature: float  # tau
    beta: float = 1.0  # weight of the log-partition: 1 is InfoNCE, 0 has no negatives
    predictor: HeadConfig
    momentum_start: float  # EMA coefficient at step 0
    momentum_end: float = 1.0  # EMA coefficient at the last step, reached by a cosine schedule
    loss_scale: float | None = None  # factor of the sum over both orders of the views; None: 2 tau
    chunk_size: int | None = None  # anchors whose similarities are computed at a time; None: all

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "loss_scale", "chunk_size")
        check_fraction(self, "beta")
        check_momentum(self)


@dataclass(frozen=True, kw_only=True)
class BYOLConfig:
    """BYOL: attracts predictions to momentum targets (arXiv:2006.07733), with the loss 2 - 2 cos."""

    name: Literal["byol"] = "byol"
    temperature: ClassVar[float] = 0.5  # -cos / 0.5 + 2 = 2 - 2 cos
    beta: ClassVar[float] = 0.0
    predictor: HeadConfig
    momentum_start: float  # EMA coefficient at step 0
    momentum_end: float = 1.0  # EMA coefficient at the last step, reached by a cosine schedule

    def __post_init__(self) -> None:
        check_momentum(self)


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig:
    """SimSiam: attracts predictions to projections with stop-gradient (arXiv:2011.10566), with the loss -cos."""

    name: Literal["simsiam"] = "simsiam"
    temperature: ClassVar[float] = 1.0  # -cos / 1
    beta: ClassVar[float] = 0.0
    predictor: HeadConfig


BaseConfig = SimCLRConfig | MoCoV2Config | MoCoV3Config | BYOLConfig | SimSiamConfig


def check_momentum(base: MoCoV2Config | MoCoV3Config | BYOLConfig) -> None:
    """Refuse EMA coefficients outside [0, 1] or that decrease."""
    check_fraction(base, "momentum_end")
    check_field(
        0 <= base.momentum_start <= base.momentum_end,
        "momentum_start",
        f"must lie in [0, momentum_end={base.momentum_end}], got {base.momentum_start}",
    )


# -- the family: the margin on the positives -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The margin has its full value from the start."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """The margin grows from 0 over the first ``epochs``."""

    name: Literal["linear", "cosine"]
    epochs: float

    def __post_init__(self) -> None:
        check_positive(self, "epochs")


Schedule = Constant | Ramp


@dataclass(frozen=True, kw_only=True)
class NoMargin:
    """No margin."""

    name: Literal["none"] = "none"
    schedule: ClassVar[Schedule] = Constant()


@dataclass(frozen=True, kw_only=True)
class Angular:
    """Base of the margins with an angle m1."""

    name: str
    angular_margin: float | str  # m1: radians, or text such as 10deg

    def __post_init__(self) -> None:
        check_field(
            -pi < self.radians < pi,
            "angular_margin",
            f"must lie in (-pi, pi) radians, got {self.radians}; write degrees as 10deg",
        )

    @property
    def radians(self) -> float:
        """m1 in radians."""
        if not isinstance(text := self.angular_margin, str):
            return text
        match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*deg\s*", text)
        if match is None:
            raise ConfigError("angular_margin", f"must be radians or text such as 10deg, got {text!r}")
        return radians(float(match[1]))


@dataclass(frozen=True, kw_only=True)
class Combined(Angular):
    """cos(theta + m1) - m2."""

    name: Literal["combined"] = "combined"
    subtractive_margin: float  # m2
    wide_angle: Literal["exact", "arcface", "clamp", "easy"] = (
        "exact"  # for theta + m1 near or above pi; see factors.Margin
    )
    schedule: Schedule = Constant()


@dataclass(frozen=True, kw_only=True)
class ArcFace(Angular):
    """cos(theta + m1), or cos(theta) - m1 sin(m1) for theta above pi - m1 (arXiv:1801.07698)."""

    name: Literal["arcface"] = "arcface"
    schedule: Schedule = Constant()


@dataclass(frozen=True, kw_only=True)
class CosFace:
    """cos(theta) - m2 (arXiv:1801.09414, 1801.05599)."""

    name: Literal["cosface", "am_softmax"] = "cosface"
    subtractive_margin: float  # m2
    schedule: Schedule = Constant()


@dataclass(frozen=True, kw_only=True)
class EqCo:
    """cos(theta) - m2 with m2 = tau ln(alpha / K) for K negatives (arXiv:2010.01929)."""

    name: Literal["eqco"] = "eqco"
    alpha: float = 65536.0
    schedule: Schedule = Constant()

    def __post_init__(self) -> None:
        check_positive(self, "alpha")


@dataclass(frozen=True, kw_only=True)
class SphereFace:
    """(-1)^k cos(m theta) - 2k, k = floor(m theta / pi) (arXiv:1704.08063)."""

    name: Literal["sphereface"] = "sphereface"
    multiplier: int = 4  # m
    schedule: ClassVar[Schedule] = Constant()

    def __post_init__(self) -> None:
        check_field(self.multiplier >= 2, "multiplier", f"must be at least 2, got {self.multiplier}")


@dataclass(frozen=True, kw_only=True)
class MACL:
    """Not a margin: replaces tau by tau (1 + alpha (A - A0)), where A is the positives' mean cosine
    (arXiv:2207.07874)."""

    name: Literal["macl"] = "macl"
    alpha: float = 0.5
    alignment: float = 0.0  # A0
    schedule: ClassVar[Schedule] = Constant()

    def __post_init__(self) -> None:
        check_field(
            -1 <= self.alignment <= 1,
            "alignment",
            f"must be a cosine, in [-1, 1], got {self.alignment}",
        )
        check_field(
            abs(self.alpha) + self.alpha * self.alignment < 1,  # then 1 + alpha (A - A0) > 0 for any cosine A
            "alpha",
            f"must keep the temperature above 0, got {self.alpha}: |alpha| + alpha * alignment must be below 1",
        )


Family = NoMargin | Combined | ArcFace | CosFace | EqCo | SphereFace | MACL


# -- the effects: which parts of the margin's gradient are used ------------------------------------


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The margin as such, with all its effects."""

    name: Literal["whole"] = "whole"


@dataclass(frozen=True, kw_only=True)
class Detached:
    """The margin changes the value of the cosine but not its derivative, as in ArcFace code that computes it without
    gradients. This is the effect ``logit``."""

    name: Literal["detached"] = "detached"


@dataclass(frozen=True, kw_only=True)
class Isolated:
    """The loss without margin, with its gradient scaled by selected factors of the margin's gradient."""

    name: Literal["isolated"] = "isolated"
    emphasis: Literal["batch"] | float | None = (
        None  # factor of the positives: E1 of the global batch, or a constant
    )
    angle: bool = False  # scale each positive by E2, which depends on its angle
    logit: Literal["both", "positive", "negative"] | None = None  # scale positives, negatives or both by E3
    factor_range: tuple[float, float] = (-10.0, 100.0)  # range to which emphasis times angle is clamped
    value_preserving: bool = True  # false: logit also scales the value of the loss

    def __post_init__(self) -> None:
        if self.emphasis != "batch":
            check_positive(self, "emphasis")
        check_field(
            self.emphasis is not None or self.angle or self.logit is not None,
            "name",
            "isolated needs one of emphasis, angle and logit; to train without margin set method.family=none",
        )
        low, high = self.factor_range
        check_field(low <= 1 <= high, "factor_range", f"must contain 1, got {self.factor_range}")
        check_field(
            self.emphasis is not None or self.angle or self.factor_range == Isolated.factor_range,
            "factor_range",
            "has no effect without emphasis or angle: set one of them",
        )
        check_field(
            self.value_preserving or self.logit == "both",
            "value_preserving",
            "can only be false with logit: both, which scales the whole loss",
        )


Effects = Whole | Detached | Isolated

# -- the method ------------------------------------------------------------------------------------


MOVED = {
    "base": "temperature beta predictor momentum_start momentum_end queue_size symmetric momentum_batchnorm "
    "loss_scale chunk_size",
    "family": "angular_margin subtractive_margin wide_angle schedule",
    "effects": "value_preserving factor_range",
}
NO_ANGLE = "without an angular margin other than 0"
NO_NEGATIVES = "without negatives (byol, simsiam, and method.base.beta=0)"


@dataclass(frozen=True, kw_only=True)
class MarginConfig(MethodConfig):
    """Config of the margin method: a base framework and a margin on its positives."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

    RENAMED: ClassVar[dict[str, str]] = {
        **{key: f"{section}.{key}" for section, keys in MOVED.items() for key in keys.split()},
        "schedule_epochs": "family.schedule.epochs",
        "sphere_multiplier": "family.multiplier",
        "eqco_alpha": "family.alpha",
        "macl_alpha": "family.alpha",
        "macl_alignment": "family.alignment",
        "slope": "effects",
        "logit_on": "effects.logit",
        "emphasis_scale": "effects.emphasis",
    }

    base: BaseConfig
    family: Family
    effects: Effects = Whole()
    projector: HeadConfig

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        predictor = getattr(self.base, "predictor", None)
        check_field(
            predictor is None or predictor.widths[-1] == self.projector.widths[-1],
            "base.predictor.widths",
            f"must end in the width of method.projector, {self.projector.widths[-1]}",
        )
        self._check_family()
        self._check_effects()

    def check(self, recipe: Recipe) -> None:
        """Check that the views and batch-norm settings of ``recipe`` suit the base."""
        views = recipe.global_crops
        check_field(views >= 2, "views", f"must have at least two global views, got {views}")
        shuffled = isinstance(self.base, MoCoV2Config) and self.base.momentum_batchnorm == "shuffle"
        check_field(
            not shuffled or not recipe.trainer.get("sync_batchnorm", False),
            "method.base.momentum_batchnorm",
            "must be same with trainer.sync_batchnorm=true, which cancels shuffle",
        )

    def _check_family(self) -> None:
        base, family = self.base, self.family
        check_field(
            not isinstance(family, MACL) or (isinstance(base, SimCLRConfig) and base.beta == 1),
            "family",
            "macl is only defined for SimCLR: set method.base.name=simclr and method.base.beta=1",
        )
        check_field(
            base.beta > 0 or not self._subtracts,
            "family",
            f"must not subtract from the cosine {NO_NEGATIVES}, where that has no gradient; set "
            "method.family.subtractive_margin=0, or another family",
        )

    def _check_effects(self) -> None:
        family, effects = self.family, self.effects
        angular = isinstance(family, SphereFace) or (isinstance(family, Angular) and family.radians != 0)
        check_field(
            isinstance(effects, Whole) or not isinstance(family, NoMargin | MACL),
            "effects",
            f"must be whole for family {family.name}, which has no margin",
        )
        if isinstance(effects, Detached):
            check_field(angular, "effects", f"must not be detached {NO_ANGLE}: it would equal whole")
            check_field(
                self.base.beta > 0, "effects", f"must not be detached {NO_NEGATIVES}: it would have no effect"
            )
        if isinstance(effects, Isolated):
            check_field(angular or not effects.angle, "effects.angle", f"must be false {NO_ANGLE}")
            check_field(
                angular or effects.emphasis != "batch", "effects.emphasis", f"must not be batch {NO_ANGLE}"
            )
            check_field(
                self.base.beta > 0 or effects.logit is None, "effects.logit", f"must be null {NO_NEGATIVES}"
            )
            check_field(
                angular or self._subtracts or effects.logit is None,
                "effects.logit",
                "must be null for a margin of 0",
            )

    @property
    def _subtracts(self) -> bool:
        """Whether the margin has a subtractive part m2."""
        match self.family:
            case Combined() | CosFace():
                return self.family.subtractive_margin != 0
            case _:
                return isinstance(self.family, EqCo)
