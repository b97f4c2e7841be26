"""Methods by entry point, recipes by file. Listing them imports no torch."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from sslzoo.checks import closest
from sslzoo.recipe.sections import MethodConfig

GROUP = "sslzoo.methods"


@cache
def methods() -> dict[str, EntryPoint]:
    """Registered methods by name, the framework's own and those of other installed packages."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


@cache
def recipes() -> dict[str, Path]:
    """Bundled recipes by name."""
    folder = files("sslzoo_recipes")
    paths = (Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {path.stem: path for path in sorted(paths)}


def _entry_point(name: str) -> EntryPoint:
    if ":" in name:
        return EntryPoint(name=name, value=name, group=GROUP)
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}{closest(name, list(known))} (known: {', '.join(known)})")
    return known[name]


def method_class(name: str) -> type[Any]:
    """The method's class, an ``SSLMethod``, by registered name or ``module:Class``. Imports torch."""
    point = _entry_point(name)
    if ":" in name and "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working directory may be named directly
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method.name={name!r} cannot be loaded: {error}") from error


def method_config(name: str) -> type[MethodConfig]:
    """The method's config class. Imports no torch where the method's package exposes it as ``Config``."""
    package = _entry_point(name).module.rpartition(".")[0]
    if package and ":" not in name:
        config = getattr(importlib.import_module(package), "Config", None)
        if config is not None:
            return config
    return method_class(name).Config


def name_of(recipe: Path) -> str:
    """What to call the recipe file on the command line: a bundled one's name, or the path."""
    return recipe.stem if recipes().get(recipe.stem) == recipe else str(recipe)


def recipe_path(name: str) -> Path:
    """A recipe's file: the one at that very path, otherwise the bundled one of that name, with or without ``.yaml``.

    The file wins: a copy by ``sslzoo cp`` carries a bundled name, and its owner has changed it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipes()
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known:
        return known[stem]
    raise ValueError(f"no recipe {name!r}: neither a file nor a bundled name{closest(stem, list(known))}")
