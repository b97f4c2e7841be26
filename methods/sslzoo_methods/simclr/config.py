"""What a SimCLR recipe states under ``method:``."""

from dataclasses import dataclass

from sslzoo.checks import check_positive
from sslzoo.recipe.sections import HeadConfig, MethodConfig


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
