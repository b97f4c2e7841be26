"""The contract of methods, put to the test: a small recipe of any method, and the promises that it keeps or breaks."""

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

# What a method is tried with for which there is no recipe.
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
    """What became of a promise."""

    promise: Promise
    seconds: float
    remark: str = ""
    tried: bool = True
    found: str = ""  # what differed; empty if nothing did
    advice: str = ""

    @property
    def kept(self) -> bool:
        """Whether nothing was found."""
        return not self.found


def small_recipe(name: str, *, recipe: str = "", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of the method ``name``, registered or ``module:Class``, in which all but the method is small.

    ``recipe`` is where its settings come from: a bundled name or a file. Otherwise that is the first bundled recipe of
    the method on embedded images, or else on any, or else its config's defaults. A section that ``overrides`` change
    stays as the recipe has it.

    Raises ``RecipeError``, which says what is missing.
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
            f"{recipe} trains {loaded.method.name}, not {name}; name a recipe with method.name: {name}"
        )
    named = {override.partition("=")[0].partition(".")[0].strip() for override in overrides}
    try:
        return shrunk(loaded, keep=named)
    except ConfigError as error:
        raise RecipeError(
            f"{name} refuses the small recipe: {error}; an override of that section keeps it as its recipe has it"
        ) from None


def _bundled(name: str) -> str:
    """The recipe to take for the method; empty where there is none."""
    found: dict[str, bool] = {}  # and whether its images are embedded
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for recipe, path in registry.recipes().items():
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if values["method"]["name"] == name:
            found[recipe] = not dataset_info(values["data"]["dataset"]).layout
    return next((recipe for recipe, embedded in found.items() if embedded), next(iter(found), ""))


def _by_default(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a method that has none."""
    with tempfile.TemporaryDirectory(prefix="sslzoo-check-") as folder:
        path = Path(folder) / "default.yaml"
        path.write_text(DEFAULT.replace("METHOD", f"'{name}'"))
        try:
            return load_recipe(str(path), overrides).recipe
        except RecipeError as error:
            said = str(error).replace(f"{path}:", "default recipe, line ")
    missing = [
        field
        for field in fields(registry.method_config(name))
        if field.name != "name"
        and field.default is MISSING
        and field.default_factory is MISSING
        and not any(re.match(rf"method(\.{field.name}\b|=)", override) for override in overrides)
    ]
    if not missing or "missing key" not in said:
        raise RecipeError(said)
    needs = ", ".join(f"{field.name} ({getattr(field.type, '__name__', field.type)})" for field in missing)
    example = " ".join(f"method.{field.name}=..." for field in missing)
    raise RecipeError(
        f"{name} has no recipe, and its config no default for {needs}; add {example}, or a recipe by --recipe"
    )


def promised(only: Collection[str] = ()) -> list[Promise]:
    """All promises, or those named in ``only``. Raises ``ValueError`` for one that nobody makes."""
    for name in only:
        require(
            name in PROMISES,
            f"no promise {name!r}{did_you_mean(name, PROMISES)} (there are {', '.join(PROMISES)})",
        )
    return [promise for name, promise in PROMISES.items() if not only or name in only]


def check(promise: Promise, recipe: Recipe) -> Result:
    """Put one promise to the test with a recipe of :func:`small_recipe`. What the method raises breaks it.

    Starts processes by fork, and therefore lets torch use one thread from here on.
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
    """The innermost line of the method, of the framework where there is none of it."""
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].name})" if own else "a check"
