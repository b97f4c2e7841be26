"""Reading a trained encoder from a run directory, a checkpoint or an export."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslzoo.checkpoints import checkpoints, load_checkpoint, newest_sound
from sslzoo.checks import listed, require
from sslzoo.exits import ExitCode
from sslzoo.export.about import KEY, About
from sslzoo.nn.backbones import build_backbone
from sslzoo.recipe.load import LoadedRecipe, load_carried, load_recipe
from sslzoo.recipe.registry import is_plugin, method_class
from sslzoo.recipe.sections import BackboneConfig

SUFFIX = ".safetensors"
EXPORTED = Path("exported") / "backbone.safetensors"  # in the directory of a finished run


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder and its description."""

    about: About
    backbone: nn.Module  # (N, C, H, W) -> (N, F)
    projector: nn.Sequential | None = None  # (N, F) -> (N, last width), if it is exported too

    @property
    def module(self) -> nn.Module:
        """The backbone, or backbone and projector in sequence, in evaluation mode."""
        if self.projector is None:
            return self.backbone.eval()
        return nn.Sequential(OrderedDict(backbone=self.backbone, projector=self.projector)).eval()


def read_encoder(path: Path, *, recipe: str | None = None, with_projector: bool = False) -> Encoder:
    """Read the encoder from ``path``. For a run directory, that of the newest checkpoint, or else the exported one.

    It is built from ``recipe``, or the recipe of the run directory, or the one in the file.

    Raises ``ValueError`` with a one-line message if path, recipe or weights are invalid.
    """
    require(path.exists(), f"{path}: there is no such run directory, checkpoint or export")
    file = newest_weights(path) if path.is_dir() else path
    with torch.random.fork_rng(devices=[]):  # the random initial weights are overwritten
        if file.suffix == SUFFIX:
            return _from_export(file, recipe, with_projector=with_projector)
        return _from_checkpoint(file, recipe, with_projector=with_projector)


def newest_weights(run: Path) -> Path:
    """The newest intact checkpoint of a run directory or its ``checkpoints`` folder, or else its exported encoder.

    Raises ``ValueError`` if there is neither, and :class:`sslzoo.checkpoints.CheckpointError` if all are damaged.
    """
    folder = run if run.name == "checkpoints" else run / "checkpoints"
    newest = newest_sound(folder)
    if newest is None and (run / EXPORTED).is_file():
        return run / EXPORTED
    require(newest is not None, f"{run}: there is no checkpoint in {folder}")
    return cast(Path, newest)


# -- checkpoints --------------------------------------------------------------------------------


def recipe_of(
    file: Path, content: Mapping[str, Any], named: str | None, overrides: Sequence[str] = ()
) -> LoadedRecipe:
    """Load the recipe of the checkpoint ``file`` with this ``content``: ``named``, or the recipe of its run directory,
    or the one in the checkpoint; with ``overrides``.

    Raises ``ValueError`` if there is none, and ``RecipeError`` if it is invalid.
    """
    run = run_of(file)
    if named is not None:
        return load_recipe(named, overrides)
    if run is not None:
        return load_recipe(str(run / "recipe.yaml"), overrides)
    require(
        isinstance(content.get("recipe"), str),
        f"{file} contains no recipe; give the recipe of its run with --recipe",
    )
    return load_carried(content["recipe"], file, overrides)


def run_of(file: Path) -> Path | None:
    """The run directory that contains the checkpoint ``file``; None if it was moved out."""
    folder = file.absolute().parent
    return (
        folder.parent if folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file() else None
    )


def _from_checkpoint(file: Path, named: str | None, *, with_projector: bool) -> Encoder:
    content = load_checkpoint(file)
    recipe = recipe_of(file, content, named).recipe
    backbone, features = build_backbone(recipe.backbone, start=False)
    projector = None
    if with_projector:
        method = method_class(recipe.method.name)(recipe.method, backbone, features)
        projector = getattr(method, "projector", None)
        require(
            isinstance(projector, nn.Sequential),
            f"--with-projector: {recipe.method.name} has no single projector here; leave it out",
        )
    stored: dict[str, Tensor] = content["state_dict"]
    parts = {"backbone": backbone, "projector": projector}
    for name, part in parts.items():
        if part is not None:
            fit_weights(part, part_of(stored, name), what=f"the {name} in {file}", cfg=recipe.backbone)
    about = About.of(
        recipe,
        features=features,
        step=content["optimizer_steps"],
        projector=() if projector is None else _widths(projector),
        manifest=content.get("manifest"),
        results=_results(file),
    )
    return Encoder(about=about, backbone=backbone, projector=projector)


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of the submodule ``name``, by their names in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _widths(projector: nn.Sequential) -> tuple[int, ...]:
    return tuple(layer.out_features for layer in projector if isinstance(layer, nn.Linear))


def _results(file: Path) -> dict[str, Any]:
    """The results of the run's evaluation if ``file`` is the last checkpoint of a finished run; otherwise empty."""
    run = run_of(file)
    if run is None:
        return {}
    newest = checkpoints(file.absolute().parent)[-1:]
    try:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        if manifest["exit_code"] != ExitCode.DONE or [p.resolve() for p in newest] != [file.resolve()]:
            return {}
        return json.loads((run / "eval" / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def fit_weights(part: nn.Module, state: Mapping[str, Tensor], *, what: str, cfg: BackboneConfig) -> None:
    """Load ``state`` into ``part``; ``ValueError`` names the weights that do not match."""
    own = part.state_dict()
    faults = {
        "it lacks": [name for name in own if name not in state],
        f"{cfg.name} has no": [name for name in state if name not in own],
        "other shapes have": [
            f"{name} ({'x'.join(map(str, state[name].shape))} instead of {'x'.join(map(str, own[name].shape))})"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ],
    }
    found = [f"{fault} {listed(names)}" for fault, names in faults.items() if names]
    require(
        not found,
        f"{what} is not that of {cfg.name} with stem {cfg.stem}: {'; '.join(found)}; give the recipe of its run with "
        "--recipe",
    )
    part.load_state_dict(dict(state))


# -- exports ------------------------------------------------------------------------------------


def is_export(file: Path) -> bool:
    """Whether the safetensors ``file`` is an export of sslzoo; a damaged file counts as one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return KEY in (opened.metadata() or {})
    except SafetensorError:
        return True


def read_export(file: Path) -> tuple[About, dict[str, Tensor]]:
    """Read the description and the weights of the export ``file``. Names start with ``backbone.`` or ``projector.``.

    Raises ``ValueError`` if the file is damaged or not a safetensors export of sslzoo.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            carried = (opened.metadata() or {}).get(KEY)
            require(
                carried is not None,
                f"{file} is not a safetensors export of sslzoo; give the backbone.safetensors that fit or export wrote",
            )
            about = About.from_json(cast(str, carried))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or no safetensors file: {' '.join(str(error).split())}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
    return about, weights if about.projector else {
        f"backbone.{name}": value for name, value in weights.items()
    }


def _from_export(file: Path, named: str | None, *, with_projector: bool) -> Encoder:
    about, weights = read_export(file)
    require(not with_projector, f"--with-projector: {file} is an export; name the run, or a checkpoint of it")
    cfg = about.backbone
    if named is not None:
        cfg = load_recipe(named).recipe.backbone
    require(
        named is not None or not is_plugin(cfg.name),
        f"{file}: {cfg.name} is code that this file names; if you trust it, give its recipe by --recipe",
    )
    backbone, _ = build_backbone(cfg, start=False)
    fit_weights(backbone, part_of(weights, "backbone"), what=f"the backbone in {file}", cfg=cfg)
    return Encoder(about=replace(about, backbone=cfg, projector=()), backbone=backbone)
