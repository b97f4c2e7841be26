"""The ``method:`` section of SimCLR recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sslzoo.checks import check_field, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import HeadConfig, MethodConfig, Recipe
from sslzoo_methods.simclr.panels import PANELS


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    """Config of SimCLR; every recipe must set all fields."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

    temperature: float  # tau
    projector: HeadConfig

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def check(self, recipe: Recipe) -> None:
        """Require two global views per image."""
        count = recipe.global_crops
        check_field(count >= 2, "views", f"must have at least two global views, got {count}; set count: 2")
