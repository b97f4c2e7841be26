"""Everything built, one optimiser step on fake data: what ``fit --dry-run`` does."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.callbacks.watch import Watch
from sslzoo.data.sources import fake_source
from sslzoo.method import SSLMethod
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import build_analyses, build_data, build_method, build_plan
from sslzoo.run.loggers import require_packages
from sslzoo.run.placement import world_size_of
from sslzoo.run.summary import human_bytes, run_summary, state_memory
from sslzoo.run.trainer import build_trainer

LARGE = 100  # pixels: views above this are tried with fewer images


def dry_run(recipe: Recipe, console: Console) -> None:
    """Build ``recipe``'s run, pass one optimiser step on a few fake images on the CPU, and print the summary.

    The data need not be there: the catalogue's size stands in. Raises what the real run would raise.
    """
    require_packages(recipe.logging)
    size = dataset_size(recipe)
    plan = build_plan(recipe, size, world_size_of(recipe))
    method = build_method(recipe, plan)
    samples = one_step(recipe, method)
    console.print(Group(run_summary(recipe, plan, method, "none: dry run"), _details(recipe, method)))
    console.print(f"one step on {samples} fake images passed")


def dataset_size(recipe: Recipe) -> int:
    """Images of the training split by the catalogue, or by the folder itself where that has no entry."""
    info = dataset_info(recipe.data.dataset)
    known = info.nominal_size(recipe.data.split, recipe.data.classes)
    if known is not None:
        return known
    from sslzoo.data.datasets import open_source

    try:
        return len(open_source(recipe.data))
    except ValueError:
        return info.sizes.get(recipe.data.split, recipe.data.global_batch_size)


def one_step(recipe: Recipe, method: SSLMethod[Any]) -> int:
    """One optimiser step of ``method`` on fake images, on the CPU. Returns how many there were."""
    accumulate = recipe.accumulate
    samples = (4 if max(view.size for view in recipe.views) > LARGE else 8) * accumulate
    small = replace(recipe, data=replace(recipe.data, global_batch_size=samples, workers=0))
    plan = TrainingPlan(dataset_size=samples, global_batch_size=samples, max_epochs=1, accumulate=accumulate)
    classes = dataset_info(recipe.data.dataset).num_classes
    source = fake_source(samples, len(recipe.data.mean), max(view.size for view in recipe.views), classes)
    precision = str(recipe.trainer.get("precision", "32-true"))
    precision = "bf16-mixed" if precision in ("16-mixed", "16") else precision  # fp16 is for GPUs
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": accumulate,
        "limit_val_batches": 0,
        "precision": precision,
        "gradient_clip_val": recipe.trainer.get("gradient_clip_val"),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            options, run_dir=Path(folder), callbacks=[StepSeeding(), *map(Watch, build_analyses(recipe))]
        )
        trainer.fit(method, datamodule=build_data(small, plan, source))
    if method.optimizer_steps != 1:
        raise RuntimeError(
            f"{recipe.method.name} made {method.optimizer_steps} optimiser steps instead of one"
        )
    return samples


def _details(recipe: Recipe, method: SSLMethod[Any]) -> Table:
    """Sizes that matter when a run does not fit."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("view", style="bold cyan")
    table.add_column("one image, float32")
    for view in recipe.views:
        size = view.size * view.size * len(recipe.data.mean) * 4
        table.add_row(f"{view.count} x {view.size} px {view.role}", human_bytes(size))
    for name, size in state_memory(method):
        table.add_row(f"state: {name}", human_bytes(size))
    return table
