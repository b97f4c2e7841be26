"""What a SimCLR recipe states under ``method:``."""

from dataclasses import dataclass

from sslzoo.checks import check_field
from sslzoo.recipe.sections import MethodConfig


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    """No defaults: each recipe states them all."""

    temperature: float  # tau
    projector: tuple[int, ...]  # layer widths after the backbone, embedding last

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector."""
        return ("backbone", "projector")

    def __post_init__(self) -> None:
        check_field(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
        check_field(
            len(self.projector) > 0,
            "projector",
            "needs at least the embedding width, such as [2048, 128]",
        )
