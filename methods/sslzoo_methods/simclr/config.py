"""What a SimCLR recipe states under ``method:``."""

from dataclasses import dataclass

from sslzoo.checks import require
from sslzoo.recipe.sections import MethodConfig


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    """No defaults: each recipe states them all."""

    temperature: float  # tau
    projector: tuple[int, ...]  # layer widths after the backbone, embedding last

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"method.temperature must be positive, got {self.temperature}")
        require(
            len(self.projector) > 0,
            "method.projector needs at least the embedding width, such as [2048, 128]",
        )
