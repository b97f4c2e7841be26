"""What ``sslzoo eval`` was asked for. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sslzoo.checks import require
from sslzoo.posthoc.options import FORMATS, KEEP
from sslzoo.recipe.load import LoadedRecipe, load_recipe
from sslzoo.recipe.registry import HONEST, check_protocol


@dataclass(frozen=True, kw_only=True)
class Request:
    """An evaluation as typed, checked as far as possible without reading weights or data.

    ``names`` are the evaluations: ``knn``, ``logistic``, or the protocols of ``linear``; ``features`` has none.
    """

    kind: str
    target: str  # a run directory, a checkpoint, an export, a file of weights, or an encoder's name
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    names: tuple[str, ...] = ()
    ks: tuple[int, ...] = ()  # neighbours; empty: eval.knn_k
    temperatures: tuple[float, ...] = ()  # empty: eval.knn_temperature
    format: str = FORMATS[0]  # of the files with features
    keep: float = KEEP  # GiB
    devices: int | None = None  # processes on this machine; None: as the recipe says

    def __post_init__(self) -> None:
        require(
            all(k > 0 for k in self.ks) and all(t > 0 for t in self.temperatures),
            "--k and --temperature take positive numbers",
        )
        require(self.devices is None or self.devices > 0, f"--devices must be positive, got {self.devices}")
        require(self.keep >= 0, f"--keep must not be negative, got {self.keep:g}")

    def load_recipe(self) -> LoadedRecipe:
        """The recipe of the target with the overrides. Torch is imported only to read it from a checkpoint or export.

        Raises ``ValueError`` if the target does not exist or has no recipe, and ``RecipeError`` if it is invalid.
        """
        path = Path(self.target)
        if self.recipe is None and (path / "recipe.yaml").is_file():
            return load_recipe(str(path / "recipe.yaml"), self.overrides)
        if path.exists():
            from sslzoo.posthoc.target import recipe_of_file

            return recipe_of_file(path, self.recipe, self.overrides)
        looks_like_file = "/" in self.target.removeprefix("timm/") or path.suffix in (
            ".ckpt",
            ".safetensors",
            ".pth",
            ".pt",
        )
        require(not looks_like_file, f"{self.target}: there is no such run directory, checkpoint or export")
        require(
            self.recipe is not None,
            f"{self.target} is neither a run directory, a checkpoint nor an export; for an encoder of torchvision or "
            "timm with published weights, give data, size, mean and std by --recipe",
        )
        named = (
            f"backbone.name={self.target}",
            "backbone.weights=pretrained",
            "backbone.stem=imagenet",
            "backbone.options={}",
        )
        return load_recipe(str(self.recipe), (*named, *self.overrides))


def protocol_names(text: str) -> tuple[str, ...]:
    """The protocols in a comma-separated list, each once, with the first one always in front.

    Raises ``ValueError`` for a name that is not installed.
    """
    names = dict.fromkeys([HONEST, *(name.strip() for name in text.split(",") if name.strip())])
    for name in names:
        check_protocol(name)
    return tuple(names)


Number = TypeVar("Number", int, float)


def numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers in a comma-separated list, each once, none without a list; ``ValueError`` names the ``option``."""
    try:
        return tuple(dict.fromkeys(kind(part) for part in (text or "").split(",") if text))
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from None
