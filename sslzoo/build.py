"""From a recipe to the objects of a run. One place builds them, whoever asks: fit, dry run, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sslzoo.backbones import build_backbone
from sslzoo.config import Recipe
from sslzoo.data.datasets import ImageSource, open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.plan import TrainingPlan
from sslzoo.registry import method_class

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod


def build_plan(recipe: Recipe, dataset_size: int, world_size: int) -> TrainingPlan:
    """The lengths of the run."""
    return TrainingPlan(
        dataset_size=dataset_size,
        global_batch_size=recipe.data.global_batch_size,
        max_epochs=recipe.trainer["max_epochs"],
        world_size=world_size,
        accumulate=recipe.trainer.get("accumulate_grad_batches", 1),
    )


def build_method(recipe: Recipe, plan: TrainingPlan) -> SSLMethod[Any]:
    """The method with its backbone, initialised from ``recipe.seed`` alone: equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone, width = build_backbone(recipe.backbone)
        method = method_class(recipe.method.name)(recipe.method, backbone, width)
        method.prepare(plan, recipe.optim, recipe.seed)
    return method


def build_data(recipe: Recipe, plan: TrainingPlan, source: ImageSource | None = None) -> SSLDataModule:
    """The DataModule over ``source``, which is opened where it is not given."""
    source = open_source(recipe.data) if source is None else source
    return SSLDataModule(
        data=recipe.data,
        views=recipe.views,
        eval=recipe.eval,
        probe=recipe.probe,
        plan=plan,
        seed=recipe.seed,
        source=source,
    )
