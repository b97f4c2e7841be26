"""The section ``margins`` under ``analyses:`` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from sslzoo.checks import check_field, check_positive
from sslzoo.recipe.sections import AnalysisConfig


@dataclass(frozen=True, kw_only=True)
class MarginsConfig(AnalysisConfig):
    """The margins to evaluate, and the temperature."""

    # Pairs of an angular margin in degrees and a subtractive margin; the first pair is shown in detail.
    margins: tuple[tuple[float, float], ...] = field(
        default=((10.0, 0.0), (0.0, 0.1), (10.0, 0.1), (20.0, 0.0)),
        metadata={
            "option": "--margin",
            "metavar": "DEGREES,M2",
            "help": "angular margin in degrees and subtractive margin; repeatable, the first is shown in detail; write "
            "negative angles as --margin=-5,0.1",
        },
    )
    temperature: float | None = field(default=None, metadata={"help": "default: the method's own"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(len(self.margins) > 0, "margins", "must list margins, such as [[10.0, 0.0]]")
        for m1, m2 in self.margins:
            check_field(
                abs(m1) < 180 and isfinite(m2),
                "margins",
                f"must be pairs of an angle in (-180, 180) degrees and a finite number, got [{m1}, {m2}]",
            )
        check_field(len(set(self.margins)) == len(self.margins), "margins", "must not list a margin twice")
        check_positive(self, "temperature")


def margin_name(degrees: float, subtractive: float) -> str:
    """The name of a margin, such as ``m1=10deg,m2=0.1``."""
    return f"m1={degrees:g}deg,m2={subtractive:g}"
