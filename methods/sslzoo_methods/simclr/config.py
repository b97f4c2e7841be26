"""What a SimCLR recipe states under ``method:``."""

from __future__ import annotations

from dataclasses import dataclass

from sslzoo.checks import check_field, check_positive
from sslzoo.recipe.sections import HeadConfig, MethodConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    """No defaults: each recipe states them all."""

    temperature: float  # tau
    projector: HeadConfig

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def check(self, recipe: Recipe) -> None:
        """Each image needs two views that find each other."""
        count = recipe.global_crops
        check_field(count >= 2, "views", f"must hold two global views or more, got {count}; set count: 2")
