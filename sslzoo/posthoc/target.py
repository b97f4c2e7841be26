"""The encoder to evaluate, whatever it was named by: a run directory, a checkpoint, an export, or weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslzoo.checkpoints import ForeignCheckpoint, load_checkpoint, verify_checkpoint
from sslzoo.checks import listed, require
from sslzoo.evaluate.figures import LAYER
from sslzoo.export.encoder import (
    EXPORTED,
    SUFFIX,
    fit_weights,
    is_export,
    newest_weights,
    part_of,
    read_export,
    recipe_of,
    run_of,
)
from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.weights import fingerprint
from sslzoo.recipe.load import LoadedRecipe, load_carried, load_recipe
from sslzoo.recipe.registry import method_class
from sslzoo.recipe.sections import Recipe

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A trained encoder and what is known of it."""

    name: str  # for tables and files
    recipe: Recipe
    backbone: nn.Module  # (N, C, H, W) -> (N, F)
    method: SSLMethod[Any] | None = None  # with its heads; None: the weights are the backbone's alone
    step: int | None = None  # optimiser steps of its training; None: not known
    run: Path | None = None  # its run directory; None: weights that belong to no run
    folder: Path | None = None  # in that, for results

    @property
    def module(self) -> nn.Module:
        """What computes all :attr:`layers`."""
        return self.backbone if self.method is None else self.method

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers to evaluate: ``probe.layers``, or the backbone alone if there is no method."""
        return (LAYER,) if self.method is None else self.recipe.probe.layers

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features (N, F) of images ``x`` (N, C, H, W) by layer."""
        if self.method is None or self.layers == (LAYER,):
            return {LAYER: self.backbone(x)}
        known = self.method.features(x)
        return {layer: known[layer] for layer in self.layers}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """For each of :attr:`layers`, the SHA-256 of the weights that determine it: equal in a run, its checkpoint and
        its export."""
        of_backbone, of_all = fingerprint(self.backbone), fingerprint(self.module)
        return {layer: of_backbone if layer == LAYER else of_all for layer in self.layers}


# -- reading ------------------------------------------------------------------------------------


def recipe_of_file(path: Path, named: str | None, overrides: Sequence[str]) -> LoadedRecipe:
    """The recipe of a run directory, checkpoint, export or file of weights: ``named``, or the one that it carries.

    Raises ``ValueError`` if there is none, and ``RecipeError`` if it is invalid.
    """
    file = newest_weights(path) if path.is_dir() else path
    if is_weights(file):
        require(
            named is not None,
            f"{file} has only weights; give architecture, data, size, mean and std by --recipe",
        )
        weights = f"backbone.weights={json.dumps(str(file.absolute()))}"
        return load_recipe(str(named), (weights, *overrides))
    if file.suffix == SUFFIX:
        return (
            load_recipe(named, overrides)
            if named
            else load_carried(read_export(file)[0].recipe, file, overrides)
        )
    return recipe_of(file, load_checkpoint(file), named, overrides)


def is_weights(file: Path) -> bool:
    """Whether ``file`` is neither a checkpoint nor an export of sslzoo, but may be a state dict of another program."""
    if file.suffix == SUFFIX:
        return not is_export(file)
    try:
        verify_checkpoint(file)
    except ForeignCheckpoint:
        return file.is_file() and file.suffix in (".pth", ".pt", ".bin", ".tar", ".ckpt")
    return False


def read_target(path_or_name: str, recipe: Recipe) -> Target:
    """Read the encoder that was named, built as ``recipe`` says.

    Raises ``ValueError`` with a one-line message if the weights are missing, damaged, or not those of the recipe's
    encoder; it names the weights that do not match.
    """
    path = Path(path_or_name)
    with torch.random.fork_rng(devices=[]):  # the random initial weights are overwritten
        if not path.exists():
            backbone, _ = build_backbone(recipe.backbone)
            return Target(name=path_or_name, recipe=recipe, backbone=backbone.eval())
        file = newest_weights(path) if path.is_dir() else path
        if is_weights(file):
            backbone, _ = build_backbone(recipe.backbone)
            return Target(name=str(path), recipe=recipe, backbone=backbone.eval())
        if file.suffix == SUFFIX:
            return _from_export(file, path, recipe)
        return _from_checkpoint(file, path, recipe)


def _from_export(file: Path, path: Path, recipe: Recipe) -> Target:
    about, weights = read_export(file)
    backbone, _ = build_backbone(recipe.backbone, start=False)
    fit_weights(backbone, part_of(weights, "backbone"), what=f"the backbone in {file}", cfg=recipe.backbone)
    if recipe.probe.layers != (LAYER,):
        others = listed([layer for layer in recipe.probe.layers if layer != LAYER])
        log.warning("%s is an encoder without heads: %s is not evaluated", file, others)
    run = file.absolute().parent.parent
    in_a_run = file.absolute().parent.name == EXPORTED.parent.name and (run / "recipe.yaml").is_file()
    return Target(
        name=str(path),
        recipe=recipe,
        backbone=backbone.eval(),
        step=about.step,
        run=run if in_a_run else None,
        folder=run / "eval" if in_a_run else None,
    )


def _from_checkpoint(file: Path, path: Path, recipe: Recipe) -> Target:
    content = load_checkpoint(file)
    backbone, features = build_backbone(recipe.backbone, start=False)
    stored: dict[str, Tensor] = content["state_dict"]
    method = method_class(recipe.method.name)(recipe.method, backbone, features)
    backbone = method.backbone  # which may be several
    fit_weights(backbone, part_of(stored, "backbone"), what=f"the backbone in {file}", cfg=recipe.backbone)
    own = method.state_dict()
    wrong = [name for name, value in own.items() if name not in stored or stored[name].shape != value.shape]
    require(
        not wrong,
        f"{file} lacks {listed(wrong)} of {recipe.method.name}, or has other shapes; give the recipe of its run with "
        "--recipe",
    )
    method.load_state_dict({name: stored[name] for name in own})
    run = run_of(file)
    # The results of a run are those of its newest checkpoint; older ones have a folder of their own.
    own_folder = () if path.is_dir() else (file.resolve().stem,)
    return Target(
        name=str(path),
        recipe=recipe,
        backbone=backbone.eval(),
        method=method.eval(),
        step=content["optimizer_steps"],
        run=run,
        folder=None if run is None else (run / "eval").joinpath(*own_folder),
    )
