"""Run an analysis on the checkpoints of a run and write its report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sslzoo.analysis import Analysis, Look
from sslzoo.callbacks.watch import Watch
from sslzoo.checkpoints import checkpoints, load_checkpoint
from sslzoo.checks import require
from sslzoo.export.encoder import SUFFIX, read_export
from sslzoo.recipe.load import LoadedRecipe, load_carried, load_recipe
from sslzoo.run.build import build_experiment

if TYPE_CHECKING:
    from sslzoo.batch import Batch
    from sslzoo.data.module import SSLDataModule
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)


def analyze(
    analysis: Analysis[Any],
    paths: Sequence[Path],
    *,
    samples: int,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
) -> str:
    """Apply ``analysis`` to every checkpoint in ``paths``, with the same training batches, and write its report.

    A run directory stands for all its checkpoints. ``samples`` is rounded up to whole batches of the recipe's size. The
    report goes to ``out``, by default a folder in the run directory named after the analysis. Returns text to print.

    Raises ``ValueError`` if paths, recipe, data or method are invalid.
    """
    require(samples > 0, f"--samples must be positive, got {samples}")
    files = expand(paths)
    folders = {path.resolve().parent for path in files}
    require(len(folders) == 1, f"these are checkpoints of {len(folders)} runs; analyse one run at a time")
    run = folders.pop().parent
    in_a_run = (run / "recipe.yaml").is_file()
    require(
        out is not None or in_a_run,
        f"{files[-1]} is not in a run directory: name a folder for the report with --out",
    )
    folder = out or run / analysis.cfg.name.rpartition(":")[2]
    loaded = _recipe(files[-1], recipe or (str(run / "recipe.yaml") if in_a_run else None), overrides).recipe
    experiment = build_experiment(loaded, start=False)
    batches = first_batches(experiment.data, samples)
    # Training mode, so that batch norm uses batch statistics, as for the loss.
    method = experiment.method.train()
    by_step = {}
    for path in files:
        look = look_at(analysis, method, path, batches)
        by_step[look.step] = look
    folder.mkdir(parents=True, exist_ok=True)
    return analysis.write(
        [by_step[step] for step in sorted(by_step)],
        recipe=loaded,
        sample_id=torch.cat([batch.sample_id for batch in batches]),
        out=folder,
    )


def _recipe(file: Path, named: str | None, overrides: Sequence[str]) -> LoadedRecipe:
    """Load the recipe ``named`` or, if None, the one in ``file``."""
    if named is not None:
        return load_recipe(named, overrides)
    if file.suffix == SUFFIX:
        return load_carried(read_export(file)[0].recipe, file, overrides)
    carried = load_checkpoint(file).get("recipe")
    require(carried is not None, f"{file} contains no recipe: name the recipe of its run with --recipe")
    return load_carried(cast(str, carried), file, overrides)


def expand(paths: Sequence[Path]) -> list[Path]:
    """The checkpoint files in ``paths``; a run directory is replaced by all its checkpoints.

    Raises ``ValueError`` if a path does not exist or contains no checkpoint.
    """
    files: list[Path] = []
    for path in paths:
        require(path.exists(), f"{path}: there is no such checkpoint or run directory")
        if path.is_dir():
            folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            in_folder = checkpoints(folder) + sorted(folder.glob("epoch=*.ckpt"))
            require(len(in_folder) > 0, f"{path}: there is no checkpoint in {folder}")
            files += in_folder
        else:
            files.append(path)
    return files


def first_batches(data: SSLDataModule, samples: int) -> list[Batch]:
    """The first training batches of epoch 0, as the method receives them, with at least ``samples`` images."""
    batches: list[Batch] = []
    for raw in data.train_dataloader():
        batches.append(data.finish(raw))
        if sum(len(batch.sample_id) for batch in batches) >= samples:
            break
    return batches


def _content(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; for an exported backbone only weights and step."""
    if path.suffix != SUFFIX:
        return load_checkpoint(path)
    about, weights = read_export(path)
    return {"state_dict": weights, "optimizer_steps": about.step}


def look_at(analysis: Analysis[Any], method: SSLMethod[Any], path: Path, batches: Sequence[Batch]) -> Look:
    """Load the checkpoint ``path`` into ``method`` and apply ``analysis`` to each batch.

    Raises ``ValueError`` if the checkpoint does not fit the method.
    """
    content, current = _content(path), method.state_dict()
    stored = content["state_dict"]
    if path.suffix == SUFFIX:
        log.warning("%s is an exported encoder; what the method has besides it is as initialised", path)
        stored = {k: v for k, v in current.items() if not k.startswith("backbone.")} | stored
    missing = [name for name in current if name not in stored]
    require(
        not missing, f"{path}: the checkpoint lacks {missing[:3]}; give the recipe of its run with --recipe"
    )
    wrong = [name for name, value in current.items() if stored[name].shape != value.shape]
    require(
        not wrong,
        f"{path}: {wrong[:3]} have different shapes in the recipe; give the recipe of its run with --recipe",
    )
    method.load_state_dict({name: stored[name] for name in current})
    torch.manual_seed(0)  # for dropout
    recorded = content.get("callbacks", {}).get(Watch(analysis).state_key, {"history": []})
    return Look(
        path=path,
        step=int(content["optimizer_steps"]),
        epoch=int(content.get("epoch", 0)),
        seen=[analysis.observe(method, batch) for batch in batches],
        history=recorded["history"],
    )
