"""From a recipe to the objects of a run. One place builds them, whoever asks: fit, dry run, evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback

from sslzoo.analysis import Analysis
from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.cadence import EvaluationCadence
from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.knn import KNN
from sslzoo.callbacks.linear_probe import LinearProbe
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.callbacks.watch import Watch
from sslzoo.checkpoints import load_checkpoint, newest_sound
from sslzoo.checks import require
from sslzoo.data.datasets import ImageSource, open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.per_sample import tables_of
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import analysis_class, method_class
from sslzoo.recipe.sections import Recipe
from sslzoo.run.departure import Departure
from sslzoo.run.directory import Run
from sslzoo.run.preemption import Preemption

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)

TRIAL = 8  # images


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


def build_analyses(recipe: Recipe) -> list[Analysis[Any]]:
    """What looks at the method while it trains."""
    return [analysis_class(cfg.name)(cfg) for cfg in recipe.analyses]


def try_analyses(recipe: Recipe, method: SSLMethod[Any], data: SSLDataModule) -> None:
    """Let the recipe's analyses look at a few images, which raises what they have against method or views."""
    analyses = build_analyses(recipe)
    if analyses:
        batch = data.example_batch(min(TRIAL, method.plan.dataset_size))
        for analysis in analyses:
            analysis.describe([analysis.observe(method, batch)])


def build_callbacks(
    recipe: Recipe, run: Run, data: SSLDataModule, departure: Departure | None = None
) -> dict[str, Callback]:
    """The run's callbacks in the order in which they must stand."""
    checkpoint = ExactCheckpoint(
        run.checkpoints,
        every_steps=recipe.logging.checkpoint_every_steps,
        evaluate_every_epochs=recipe.eval.every_epochs,
        keep_epochs=recipe.logging.keep_epochs,
    )
    callbacks: dict[str, Callback] = {
        "seeding": StepSeeding(),
        "batch_norm": BroadcastBatchNormStats(),
        "checkpoint": checkpoint,
        "preemption": Preemption(checkpoint, departure or Departure()),
        "cadence": EvaluationCadence(recipe.eval.every_epochs),
    }
    if data.eval_sets():
        callbacks |= {"probe": LinearProbe(recipe.probe, seed=recipe.seed), "knn": KNN(recipe.eval)}
    callbacks |= {f"analysis {a.cfg.name}": Watch(a) for a in build_analyses(recipe)}
    meter = Meter(run.path, every_steps=recipe.logging.every_steps)
    return callbacks | {"meter": meter, "progress": ProgressDisplay()}


def load_weights(method: SSLMethod[Any], path: Path) -> None:
    """Weights and buffers of the checkpoint ``path``, or of the newest in that run directory; of its backbone alone
    if another method wrote it.

    Tables per training sample are left out: they belong to the images of that checkpoint.

    Raises ``ValueError`` where not even the backbone fits.
    """
    if path.is_dir():
        found = newest_sound(path / "checkpoints")
        require(found is not None, f"--init-from {path}: there is no checkpoint in {path / 'checkpoints'}")
        path = cast(Path, found)
    content = load_checkpoint(path)
    # Of either: a table may be there by one recipe and not by the other.
    names = dict.fromkeys([*content.get("per_sample", ()), *tables_of(method)])
    per_sample = tuple(f"{name}." for name in names)
    stored = {k: v for k, v in content["state_dict"].items() if not k.startswith(per_sample)}
    own = method.state_dict()
    if names:
        log.warning(
            "--init-from %s: %s left out, which belongs to the images of that run", path, ", ".join(names)
        )
    if _same_shapes(stored, {k: v for k, v in own.items() if not k.startswith(per_sample)}):
        method.load_state_dict(own | stored)
        return
    prefix = "backbone."
    backbone = {k: v for k, v in stored.items() if k.startswith(prefix)}
    require(
        _same_shapes(backbone, {k: v for k, v in own.items() if k.startswith(prefix)}),
        f"--init-from {path}: its backbone is not this recipe's; set the backbone section as in the run that wrote it",
    )
    method.backbone.load_state_dict({k.removeprefix(prefix): v for k, v in backbone.items()})
    log.warning("--init-from %s: heads and state are another method's; took the backbone alone", path)


def _same_shapes(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return {k: tuple(v.shape) for k, v in a.items()} == {k: tuple(v.shape) for k, v in b.items()}
