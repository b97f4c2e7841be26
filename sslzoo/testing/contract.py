"""Test the contract of methods: build a small recipe for any method, and check each promise with it."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import yaml

from sslzoo.checks import ConfigError, did_you_mean, require
from sslzoo.method import SSLMethod
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.sections import Recipe
from sslzoo.testing.promises import PROMISES, Broken, NotTried, Promise
from sslzoo.testing.small import shrunk

# The recipe used for methods without one.
DEFAULT = """\
seed: 0
backbone: {name: conv5, in_channels: 3}
method: {name: METHOD}
data: {dataset: cifar10, global_batch_size: 24}
views: [{size: 8, count: 2, scale: [0.3, 1.0], flip_p: 0.5}]
optim: {name: sgd, lr: 0.05, lr_scaling: none, weight_decay: 0.0, warmup_epochs: 0}
eval: {every_epochs: 1, size: 8, knn_k: 3, knn_temperature: 0.1}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1}
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of checking a promise."""

    promise: Promise
    seconds: float
    remark: str = ""
    tried: bool = True
    found: str = ""  # what differed; empty if nothing did
    advice: str = ""

    @property
    def kept(self) -> bool:
        """Whether the check found no difference."""
        return not self.found


def small_recipe(name: str, *, recipe: str = "", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe for the method ``name``, registered or ``module:Class``, with everything small except the method.

    ``recipe`` (bundled name or file) provides the method's settings; by default the first bundled recipe of the method
    on embedded images, otherwise its first bundled recipe, otherwise its config's defaults. Sections changed by
    ``overrides`` are not shrunk.

    Raises ``RecipeError`` if the recipe is invalid or values are missing.
    """
    try:
        cls = registry.method_class(name)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not (isinstance(cls, type) and issubclass(cls, SSLMethod)):
        raise RecipeError(f"{name} is {cls!r}, not a subclass of sslzoo.method.SSLMethod")
    recipe = recipe or _bundled(name)
    loaded = load_recipe(recipe, overrides).recipe if recipe else _by_default(name, overrides)
    if loaded.method.name != name:
        raise RecipeError(
            f"{recipe} trains {loaded.method.name}, not {name}; give a recipe with method.name: {name}"
        )
    named = {override.partition("=")[0].partition(".")[0].strip() for override in overrides}
    try:
        return shrunk(loaded, keep=named)
    except ConfigError as error:
        raise RecipeError(
            f"{name} refuses the small recipe: {error}; overriding a key of that section keeps it unshrunk"
        ) from None


def _bundled(name: str) -> str:
    """The bundled recipe to use for the method; empty if there is none."""
    embedded_images: dict[str, bool] = {}  # for each recipe of the method
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for recipe, path in registry.recipes().items():
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if values["method"]["name"] == name:
            embedded_images[recipe] = not dataset_info(values["data"]["dataset"]).layout
    first = next(iter(embedded_images), "")
    return next((recipe for recipe, embedded in embedded_images.items() if embedded), first)


def _by_default(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe for a method without bundled recipes."""
    with tempfile.TemporaryDirectory(prefix="sslzoo-check-") as folder:
        path = Path(folder) / "default.yaml"
        path.write_text(DEFAULT.replace("METHOD", f"'{name}'"))
        try:
            return load_recipe(str(path), overrides).recipe
        except RecipeError as error:
            message = str(error).replace(f"{path}:", "default recipe, line ")
    missing = [
        field
        for field in fields(registry.method_config(name))
        if field.name != "name"
        and field.default is MISSING
        and field.default_factory is MISSING
        and not any(re.match(rf"method(\.{field.name}\b|=)", override) for override in overrides)
    ]
    if not missing or "missing key" not in message:
        raise RecipeError(message)
    needs = ", ".join(f"{field.name} ({getattr(field.type, '__name__', field.type)})" for field in missing)
    example = " ".join(f"method.{field.name}=..." for field in missing)
    raise RecipeError(
        f"{name} has no recipe, and its config has no default for {needs}; add {example}, or a recipe with --recipe"
    )


def promised(only: Collection[str] = ()) -> list[Promise]:
    """All promises, or those named in ``only``. Raises ``ValueError`` for an unknown one."""
    for name in only:
        require(
            name in PROMISES,
            f"unknown promise {name!r}{did_you_mean(name, PROMISES)} (known: {', '.join(PROMISES)})",
        )
    return [promise for name, promise in PROMISES.items() if not only or name in only]


def check(promise: Promise, recipe: Recipe) -> Result:
    """Check one promise with a recipe from :func:`small_recipe`. An exception from the method counts as broken.

    Forks processes, and therefore sets torch to a single thread for the rest of this process.
    """
    torch.set_num_threads(1)
    start = time.monotonic()
    remark, found, advice, tried = "", "", "", True
    with tempfile.TemporaryDirectory(prefix="sslzoo-check-") as folder:
        try:
            remark = promise.check(recipe, Path(folder))
        except NotTried as reason:
            remark, tried = str(reason), False
        except Broken as broken:
            found, advice = broken.found, broken.advice
        except Exception as error:
            found = f"{type(error).__name__} in {_place(error)}: {' '.join(str(error).split())}"
            advice = "the method must get through this without an error"
    seconds = time.monotonic() - start
    return Result(promise=promise, seconds=seconds, remark=remark, tried=tried, found=found, advice=advice)


def _place(error: Exception) -> str:
    """Where ``error`` was raised: the innermost line outside of installed packages, if there is one."""
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    frames = [f for f in frames if "site-packages" not in f.filename] or frames
    return (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].name})" if frames else "a check"
    )
