"""Look up methods, analyses and protocols (entry points) and recipes (files). Listing them does not import torch."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from sslzoo.checks import ConfigError, check_plugin_name, did_you_mean, require
from sslzoo.recipe.sections import AnalysisConfig, MethodConfig

GROUP = "sslzoo.methods"
CONFIGS = "sslzoo.configs"
ANALYSES = "sslzoo.analyses"
PROTOCOLS = "sslzoo.protocols"

HONEST = "honest"  # the protocol of linear evaluation that is always shown first
ON_FEATURES = ("knn", "logistic")  # evaluations of stored features that are no protocols


@cache
def methods() -> dict[str, EntryPoint]:
    """Registered methods by name, from all installed packages."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


@cache
def configs() -> dict[str, EntryPoint]:
    """Config classes by method name, for the methods whose package registers one separately."""
    return {point.name: point for point in entry_points(group=CONFIGS)}


@cache
def analyses() -> dict[str, EntryPoint]:
    """Registered analyses by name."""
    return {point.name: point for point in sorted(entry_points(group=ANALYSES), key=lambda p: p.name)}


@cache
def protocols() -> dict[str, EntryPoint]:
    """Registered protocols of linear evaluation by name."""
    return {point.name: point for point in sorted(entry_points(group=PROTOCOLS), key=lambda p: p.name)}


def check_protocol(name: str) -> None:
    """``ValueError``, with the closest name, unless ``name`` is a registered protocol or ``module:attribute``."""
    _known(name, tuple(protocols()), "protocol")


def check_evaluation(name: str) -> None:
    """The same for what ``eval.after`` may list: a protocol, or an evaluation of stored features."""
    _known(name, (*ON_FEATURES, *protocols()), "evaluation")


def _known(name: str, names: tuple[str, ...], kind: str) -> None:
    require(
        is_plugin(name) or name in names,
        f"unknown {kind} {name!r}{did_you_mean(name, names)} (known: {', '.join(names)})",
    )


@cache
def recipes() -> dict[str, Path]:
    """Bundled recipes by name."""
    folder = files("sslzoo_recipes")
    paths = (Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {path.stem: path for path in sorted(paths)}


def method_class(name: str) -> type[Any]:
    """The method's class, a subclass of ``SSLMethod``, by registered name or ``module:Class``. Imports torch."""
    return _loaded(name, methods(), "method", "method.name")


def method_config(name: str) -> type[MethodConfig]:
    """The method's config class: the one registered under the same name in the group ``sslzoo.configs``, which does
    not import torch; otherwise the ``Config`` attribute of the method's class."""
    if not is_plugin(name):
        _registered(methods(), name, "method")
        if name in configs():
            return configs()[name].load()
    return method_class(name).Config


def analysis_class(name: str) -> type[Any]:
    """The analysis's class, a subclass of ``Analysis``, by registered name or ``module:Class``."""
    return _loaded(name, analyses(), "analysis", "analyses.name")


def analysis_config(name: str) -> type[AnalysisConfig]:
    """The analysis's config class."""
    return analysis_class(name).Config


def protocol(name: str) -> Any:
    """The protocol of linear evaluation, by registered name or ``module:attribute``."""
    return _loaded(name, protocols(), "protocol", "protocol")


def _loaded(name: str, known: dict[str, EntryPoint], kind: str, key: str) -> Any:
    if is_plugin(name):
        return plugin(name, key)
    point = _registered(known, name, kind)
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(key, f"{name!r} cannot be loaded: {error}") from error


def _registered(known: dict[str, EntryPoint], name: str, kind: str) -> EntryPoint:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    return known[name]


def is_plugin(name: str) -> bool:
    """Whether ``name`` has the form ``module:attribute``."""
    return ":" in name


def plugin(name: str, key: str) -> Any:
    """Import ``module:attribute``; the module may be installed, beside the recipe, or in the working directory.

    Raises ``ConfigError`` for the recipe's ``key`` if it cannot be imported.
    """
    check_plugin_name(name, key)
    module, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path += [folder for folder in (*_BESIDE, str(Path.cwd())) if folder not in sys.path]
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # third-party code may raise anything
        known = isinstance(error, ImportError | AttributeError | ValueError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        raise ConfigError(key, f"{name!r} cannot be loaded: {reason}") from error
    finally:
        sys.path[:] = before


_BESIDE: list[str] = []  # folders of the recipes read so far


def look_beside(recipe: Path) -> None:
    """Let :func:`plugin` find modules in the folder of ``recipe``."""
    folder = str(recipe.resolve().parent)
    if folder not in _BESIDE:
        _BESIDE.append(folder)


def name_of(recipe: Path) -> str:
    """How to name the recipe file on the command line: the name of a bundled recipe, otherwise the path."""
    return recipe.stem if recipes().get(recipe.stem) == recipe else str(recipe)


def recipe_path(name: str) -> Path:
    """The file of a recipe: the path ``name`` if it exists, otherwise the bundled recipe ``name`` (``.yaml`` optional).

    A file takes precedence because ``sslzoo cp`` makes editable copies that keep the bundled name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipes()
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known:
        return known[stem]
    if path.is_dir():
        inside = path / "recipe.yaml"  # of a run directory
        fix = f"did you mean {inside}?" if inside.is_file() else "name a file in it"
        raise ValueError(f"no recipe {name!r}: it is a folder; {fix}")
    hint = did_you_mean(stem, known) or "; sslzoo ls recipes lists them"
    raise ValueError(f"no recipe {name!r}: neither a file nor a bundled name{hint}")
