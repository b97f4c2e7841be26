"""What a margin recipe states under ``method:``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, isfinite, log, pi, radians

from sslzoo.checks import check_field, one_of
from sslzoo.recipe.sections import MethodConfig, refuse_idle

BASES = ("simclr", "mocov2", "mocov3", "byol", "simsiam")
NEGATIVE_FREE = ("byol", "simsiam")
WITH_TARGET = ("mocov2", "mocov3", "byol")  # a momentum encoder makes the keys
WITH_PREDICTOR = ("mocov3", "byol", "simsiam")
SUBTRACTIVE = ("cosface", "am_softmax", "eqco")  # no angular margin
FAMILIES = ("none", "cosface", "am_softmax", "arcface", "combined", "sphereface", "eqco", "macl")
EFFECTS = ("emphasis", "angle", "logit")
WIDE_ANGLES = ("exact", "arcface", "clamp", "easy")


def angle(value: float | str) -> float:
    """Radians of ``0.1745`` or ``10deg``."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*deg\s*", value)
    check_field(match is not None, "angular_margin", f"must be radians or text such as 10deg; got {value!r}")
    return radians(float(match[1])) if match else 0.0


@dataclass(frozen=True, kw_only=True)
class MarginConfig(MethodConfig):
    """A base framework and the margin on its positives. ``family`` names the kind of margin and is held
    to the numbers beside it."""

    base: str  # whose loss it is: simclr, mocov2, mocov3, byol, simsiam
    family: str  # none, cosface (= am_softmax), arcface, combined, sphereface, eqco, macl
    temperature: float  # tau; byol has 0.5 and simsiam 1, which are their losses
    angular_margin: float | str  # m1 in radians, or "10deg"
    subtractive_margin: float  # m2, of the cosine
    beta: float  # weight of the log-partition: 1 InfoNCE, 0 without negatives (byol, simsiam)
    effects: tuple[str, ...]  # of emphasis, angle, logit; all three are the margin itself, none the base
    projector: tuple[int, ...]  # widths after the backbone, embedding last
    predictor: tuple[int, ...] = ()  # widths after the projector; mocov3, byol, simsiam
    momentum_start: float = 0.0  # EMA coefficient at step 0; mocov2, mocov3, byol
    momentum_end: float = 1.0  # a cosine takes it there
    queue_size: int = 0  # mocov2
    symmetric: bool = True  # mocov2: both views query
    momentum_batchnorm: str = "same"  # mocov2: or shuffle over ranks, where batch norm is not synchronised
    wide_angle: str = "exact"  # or arcface, clamp, easy: what becomes of psi near and beyond pi
    slope: str = "full"  # logit_only: the margin changes the cosine's value and not its slope
    logit_on: str = "both"  # or positive, negative: what the effect logit alone scales
    emphasis_scale: float = 0.0  # a constant in place of E1; 0 takes E1 from the batch
    value_preserving: bool = True  # isolated effects report the base's loss, not A times it
    factor_range: tuple[float, float] = (-10.0, 100.0)  # of a positive's isolated factor
    schedule: str = "constant"  # or linear, cosine: the margins' ramp from 0
    schedule_epochs: float = 0.0  # its length
    loss_scale: float = 0.0  # 0 takes the base's own: 2 tau for mocov3, else 1
    chunk_size: int = 0  # anchors whose similarities are held at a time; 0 holds all
    sphere_multiplier: int = 4  # sphereface
    eqco_alpha: float = 65536.0  # eqco: m2 = tau ln(alpha / negatives), in place of subtractive_margin
    macl_alpha: float = 0.5  # macl: tau (1 + alpha (A - A0)), A the mean cosine of the positives
    macl_alignment: float = 0.0  # macl: A0

    def __post_init__(self) -> None:
        one_of("base", self.base, BASES)
        one_of("family", self.family, FAMILIES)
        one_of("wide_angle", self.wide_angle, WIDE_ANGLES)
        one_of("slope", self.slope, ("full", "logit_only"))
        one_of("logit_on", self.logit_on, ("both", "positive", "negative"))
        one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        self._check_margin()
        self._check_base()
        self._check_effects()
        self._check_idle()

    @property
    def radians(self) -> float:
        """m1, whatever unit the recipe has it in."""
        return angle(self.angular_margin)

    @property
    def own_scale(self) -> float:
        """The factor on the loss of one pair of views."""
        return self.loss_scale or (2 * self.temperature if self.base == "mocov3" else 1.0)

    @property
    def isolated(self) -> bool:
        """Whether a part of the margin's effects acts, or all with a change, rather than the margin."""
        whole = set(self.effects) == set(EFFECTS)
        return bool(self.effects) and not (whole and self.logit_on == "both" and not self.emphasis_scale)

    def eqco_margin(self, negatives: int) -> float:
        """tau ln(alpha / K) for K negatives an anchor (arXiv:2010.01929)."""
        return self.temperature * log(self.eqco_alpha / negatives)

    def _check_margin(self) -> None:
        m1, m2, family = self.radians, self.subtractive_margin, self.family
        check_field(
            -pi < m1 < pi,
            "angular_margin",
            f"must lie within (-pi, pi) radians; got {m1} (10deg is text)",
        )
        check_field(isfinite(m2), "subtractive_margin", f"must be finite, got {m2}")
        check_field(
            m1 == 0 or family in ("arcface", "combined"),
            "angular_margin",
            f"must be 0 for family {family}, got {self.angular_margin}; set method.family=combined",
        )
        check_field(
            m2 == 0 or family in ("cosface", "am_softmax", "combined"),
            "subtractive_margin",
            f"must be 0 for family {family}, got {m2}; set method.family=combined",
        )
        check_field(
            family != "arcface" or self.wide_angle == "arcface",
            "wide_angle",
            "must be arcface for family arcface; for the others set method.family=combined",
        )
        check_field(self.sphere_multiplier >= 2, "sphere_multiplier", "must be at least 2")
        check_field(
            0 < self.eqco_alpha < inf, "eqco_alpha", f"must be positive and finite, got {self.eqco_alpha}"
        )
        alpha, initial = self.macl_alpha, self.macl_alignment
        check_field(-1 <= initial <= 1, "macl_alignment", f"must be a cosine, in [-1, 1]; got {initial}")
        check_field(
            abs(alpha) + alpha * initial < 1,  # the least of 1 + alpha (A - A0) over A in [-1, 1] is positive
            "macl_alpha",
            f"must keep the temperature above 0, got {alpha}: |macl_alpha| + macl_alpha * "
            "macl_alignment must be below 1",
        )
        check_field(
            (self.schedule == "constant") == (self.schedule_epochs == 0) and 0 <= self.schedule_epochs < inf,
            "schedule_epochs",
            "must be positive with a linear or cosine method.schedule, and 0 without",
        )
        check_field(
            self.schedule == "constant" or family not in ("sphereface", "macl", "none"),
            "schedule",
            f"must be constant for family {family}: it has no margin to scale",
        )

    def _check_base(self) -> None:
        base, free = self.base, self.base in NEGATIVE_FREE
        check_field(
            0 < self.temperature < inf,
            "temperature",
            f"must be positive and finite, got {self.temperature}",
        )
        fixed = {"byol": 0.5, "simsiam": 1.0}.get(base, self.temperature)
        check_field(
            self.temperature == fixed,
            "temperature",
            f"must be {fixed} for base {base}: its loss is the margin loss at it",
        )
        check_field(0 <= self.beta <= 1, "beta", f"must lie in [0, 1], got {self.beta}")
        check_field(not free or self.beta == 0, "beta", f"must be 0 for base {base}: it has no negatives")
        check_field(
            not free or self.family not in ("eqco", "macl"),
            "family",
            f"must not be {self.family} for base {base}: it has no negatives",
        )
        check_field(
            self.family != "macl" or (base == "simclr" and self.beta == 1),
            "family",
            "macl is a SimCLR loss: set method.base=simclr and method.beta=1",
        )
        check_field(len(self.projector) > 0, "projector", "needs at least the embedding width")
        check_field(
            bool(self.predictor) == (base in WITH_PREDICTOR),
            "predictor",
            f"is for bases {', '.join(WITH_PREDICTOR)}, which need it; got base {base}",
        )
        check_field(
            not self.predictor or self.predictor[-1] == self.projector[-1],
            "predictor",
            "must end in the width of method.projector",
        )
        check_field(
            0 <= self.momentum_start <= self.momentum_end <= 1,
            "momentum_start",
            f"must lie in [0, method.momentum_end], got {self.momentum_start}",
        )
        check_field(
            (self.momentum_start > 0) == (base in WITH_TARGET),
            "momentum_start",
            f"is for bases {', '.join(WITH_TARGET)}, which need it; got base {base}",
        )
        check_field(
            (self.queue_size > 0) == (base == "mocov2"),
            "queue_size",
            f"is for base mocov2, which needs it; got {self.queue_size} with {base}",
        )
        one_of("momentum_batchnorm", self.momentum_batchnorm, ("same", "shuffle"))
        check_field(
            0 <= self.loss_scale < inf,
            "loss_scale",
            f"must be finite and not negative, got {self.loss_scale}",
        )
        check_field(self.chunk_size >= 0, "chunk_size", f"must not be negative, got {self.chunk_size}")

    def _check_effects(self) -> None:
        for effect in self.effects:
            one_of("effects", effect, EFFECTS)
        check_field(
            len(set(self.effects)) == len(self.effects), "effects", f"names one twice: {self.effects}"
        )
        check_field(
            self.family not in ("none", "macl") or not self.effects,
            "effects",
            f"must be [] for family {self.family}, which has no margin",
        )
        check_field(
            self.slope == "full" or (len(self.effects) == len(EFFECTS) and not self.isolated),
            "slope",
            "logit_only is a form of the whole margin: set method.effects to all three, "
            "method.logit_on=both and method.emphasis_scale=0",
        )
        check_field(
            self.logit_on == "both" or "logit" in self.effects,
            "logit_on",
            "needs logit in method.effects",
        )
        check_field(
            self.emphasis_scale == 0 or (0 < self.emphasis_scale < inf and "emphasis" in self.effects),
            "emphasis_scale",
            "must be positive and finite, and needs emphasis in method.effects",
        )
        check_field(
            self.value_preserving
            or (self.isolated and "logit" in self.effects and self.logit_on == "both" and self.beta == 1),
            "value_preserving",
            "can be off only for isolated effects with logit on both and method.beta=1",
        )
        check_field(
            self.factor_range[0] <= 1 <= self.factor_range[1],
            "factor_range",
            f"must contain 1, got {self.factor_range}",
        )

    def _check_idle(self) -> None:
        """Refuse what would change nothing, but for points of a sweep over effects or margins: ``factor_range``
        with the whole margin, a margin of 0, and m2 without negatives."""
        base, family, beta = self.base, self.family, self.beta
        heeded = {
            "symmetric": (base == "mocov2", "base mocov2"),
            "momentum_batchnorm": (base == "mocov2", "base mocov2"),
            "momentum_end": (base in WITH_TARGET, f"bases {', '.join(WITH_TARGET)}"),
            "chunk_size": (base not in NEGATIVE_FREE, "bases with negatives"),
            "wide_angle": (family in ("arcface", "combined"), "families arcface and combined"),
            "slope": (family not in SUBTRACTIVE and beta > 0, "an angular margin and method.beta above 0"),
            "logit_on": (beta > 0, "method.beta above 0"),
            "schedule": (bool(self.effects), "method.effects that are not []"),
            "sphere_multiplier": (family == "sphereface", "family sphereface"),
            "eqco_alpha": (family == "eqco", "family eqco"),
            "macl_alpha": (family == "macl", "family macl"),
            "macl_alignment": (family == "macl", "family macl"),
        }
        refuse_idle(self, heeded)
        check_field(
            beta > 0 or family not in SUBTRACTIVE or (family != "eqco" and self.subtractive_margin == 0),
            "family",
            f"must not be {family} with method.beta=0: a subtractive margin has no gradient without "
            "negatives; set method.family=combined and method.angular_margin",
        )
        turns = self.radians != 0 or family == "sphereface"  # else the slope factor B is 1
        shifts = turns or self.subtractive_margin != 0 or family == "eqco"
        logit = "logit" in self.effects and beta > 0 and shifts
        pull = self.emphasis_scale > 0 or (turns and set(self.effects) != {"logit"})
        check_field(
            not self.isolated or logit or pull,
            "effects",
            f"must hold one that acts, got {list(self.effects)}: logit needs a margin and "
            "method.beta above 0, emphasis and angle need method.angular_margin other than 0",
        )
