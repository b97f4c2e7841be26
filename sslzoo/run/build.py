"""From a recipe to the objects of a run. One place builds them, whoever asks: fit, dry run, analyses, tests."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import nn

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
from sslzoo.recipe.plan import TrainingPlan, plan_of
from sslzoo.recipe.registry import analysis_class, method_class
from sslzoo.recipe.sections import Recipe
from sslzoo.run.departure import Departure
from sslzoo.run.directory import Run
from sslzoo.run.placement import ALONE, Placement
from sslzoo.run.preemption import Preemption
from sslzoo.run.trainer import build_trainer

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)

TRIAL = 8  # images


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a recipe trains, and on what; :func:`equip` makes a run of it."""

    recipe: Recipe
    plan: TrainingPlan  # what the method was prepared for
    data: SSLDataModule
    method: SSLMethod[Any]

    def initial_backbone(self) -> nn.Module:
        """The encoder as it was before training, built once more."""
        return _build_method(self.recipe, self.plan).backbone


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What accompanies a run, in the order in which Lightning calls it. The order is part of what a run does."""

    seeding: StepSeeding  # first: whatever draws random numbers in a step comes after
    batch_norm: BroadcastBatchNormStats
    checkpoint: ExactCheckpoint  # before anything that belongs to the micro-batch that begins
    preemption: Preemption  # after the checkpoint: what has just been saved is not saved again
    cadence: EvaluationCadence
    probe: LinearProbe | None  # this and the next where there are labels
    knn: KNN | None
    analyses: tuple[Watch, ...]
    meter: Meter  # after all that record: it takes what they did
    progress: ProgressDisplay  # last: it shows what the meter reported

    def __iter__(self) -> Iterator[Callback]:
        """Those that there are."""
        yield from (self.seeding, self.batch_norm, self.checkpoint, self.preemption, self.cadence)
        yield from (callback for callback in (self.probe, self.knn) if callback is not None)
        yield from self.analyses
        yield from (self.meter, self.progress)


@dataclass(frozen=True, kw_only=True)
class BuiltRun(Experiment):
    """A run that is ready to start: everything is built and checked, nothing is written."""

    run: Run
    callbacks: Callbacks
    trainer: Trainer

    def initial_backbone(self) -> nn.Module:
        """As above; one that did not start at random from the run's own copy of what it started from."""
        if not self.run.start.exists():
            return super().initial_backbone()
        backbone = _build_method(self.recipe, self.plan, start=False).backbone
        backbone.load_state_dict(torch.load(self.run.start, map_location="cpu", weights_only=True))
        return backbone

    def keep_start(self, checkpoint: Path | None) -> None:
        """Copy what the encoder starts from into the run directory, where that is not random: no later start of the
        run needs the file again. Of a run that continues another one's ``checkpoint``, that one's copy."""
        start = self.run.start
        if self.recipe.backbone.weights is None or start.exists():
            return
        before = None if checkpoint is None else checkpoint.absolute().parent.parent / start.name
        part = start.with_name(start.name + ".part")
        if before is None:
            torch.save(self.method.backbone.state_dict(), part)
        elif before.exists():
            shutil.copyfile(before, part)
        else:
            return
        part.replace(start)


def build_run(
    recipe: Recipe,
    run: Run,
    *,
    source: ImageSource | None = None,
    plan: TrainingPlan | None = None,
    placement: Placement = ALONE,
    departure: Departure | None = None,
    brief: bool = False,
) -> BuiltRun:
    """The run of ``recipe`` in the directory of ``run``: :func:`build_experiment`, then :func:`equip`."""
    experiment = build_experiment(recipe, source=source, world_size=placement.world_size, plan=plan)
    return equip(experiment, run, placement=placement, departure=departure, brief=brief)


def build_experiment(
    recipe: Recipe,
    *,
    source: ImageSource | None = None,
    world_size: int = 1,
    plan: TrainingPlan | None = None,
    start: bool = True,
) -> Experiment:
    """Data and method of ``recipe``. ``source`` are the images, which are opened where they are not given.

    ``plan`` prepares the method for other lengths than those of ``source``: a dry run shows a few images to a method
    whose queues and tables are as large as in the real run. ``start`` of False does not read ``backbone.weights``: a
    checkpoint is going to bring the weights.
    """
    source = open_source(recipe.data) if source is None else source
    of_source = plan_of(recipe, len(source), world_size)
    data = SSLDataModule(
        data=recipe.data,
        views=recipe.views,
        eval=recipe.eval,
        probe=recipe.probe,
        plan=of_source,
        seed=recipe.seed,
        source=source,
    )
    plan = of_source if plan is None else plan
    return Experiment(recipe=recipe, plan=plan, data=data, method=_build_method(recipe, plan, start=start))


def _build_method(recipe: Recipe, plan: TrainingPlan, *, start: bool = True) -> SSLMethod[Any]:
    """The method with its backbone, initialised from ``recipe.seed`` and ``backbone.weights`` alone: equal on all
    ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone, width = build_backbone(recipe.backbone, start=start)
        method = method_class(recipe.method.name)(recipe.method, backbone, width)
        method.prepare(plan, recipe.optim, recipe.seed)
    return method


def try_analyses(experiment: Experiment) -> None:
    """Let the recipe's analyses look at a few images, which raises what they have against method or views."""
    analyses = _build_analyses(experiment.recipe)
    if analyses:
        batch = experiment.data.example_batch(min(TRIAL, experiment.plan.dataset_size))
        for analysis in analyses:
            analysis.describe([analysis.observe(experiment.method, batch)])


def _build_analyses(recipe: Recipe) -> list[Analysis[Any]]:
    """What looks at the method while it trains."""
    return [analysis_class(cfg.name)(cfg) for cfg in recipe.analyses]


def equip(
    experiment: Experiment,
    run: Run,
    *,
    placement: Placement = ALONE,
    departure: Departure | None = None,
    brief: bool = False,
) -> BuiltRun:
    """``experiment`` with callbacks and trainer, in the directory of ``run``. ``brief`` shows no progress and lets
    evaluations learn for one step only: a dry run.

    Raises ``ValueError`` where there is not what evaluation needs, or this machine has not what ``trainer`` asks for.
    """
    recipe, data = experiment.recipe, experiment.data
    callbacks = _build_callbacks(recipe, run, data, departure or Departure(), brief=brief)
    trainer = build_trainer(recipe.trainer, run_dir=run.path, callbacks=list(callbacks), placement=placement)
    return BuiltRun(
        recipe=recipe,
        plan=experiment.plan,
        data=data,
        method=experiment.method,
        run=run,
        callbacks=callbacks,
        trainer=trainer,
    )


def _build_callbacks(
    recipe: Recipe, run: Run, data: SSLDataModule, departure: Departure, *, brief: bool
) -> Callbacks:
    checkpoint = ExactCheckpoint(
        run.checkpoints,
        every_steps=recipe.logging.checkpoint_every_steps,
        evaluate_every_epochs=recipe.eval.every_epochs,
        keep_epochs=recipe.logging.keep_epochs,
    )
    labelled = len(data.eval_sets()) > 0
    quiet = Console(quiet=True, force_terminal=False)
    return Callbacks(
        seeding=StepSeeding(),
        batch_norm=BroadcastBatchNormStats(),
        checkpoint=checkpoint,
        preemption=Preemption(checkpoint, departure),
        cadence=EvaluationCadence(recipe.eval.every_epochs),
        probe=LinearProbe(recipe.probe, seed=recipe.seed, brief=brief) if labelled else None,
        knn=KNN(recipe.eval) if labelled else None,
        analyses=tuple(Watch(analysis) for analysis in _build_analyses(recipe)),
        meter=Meter(run.path, every_steps=recipe.logging.every_steps),
        progress=ProgressDisplay(out=quiet, err=quiet) if brief else ProgressDisplay(),
    )


def load_weights(method: SSLMethod[Any], path: Path) -> None:
    """Weights and buffers of the checkpoint ``path``, or of the newest in that run directory; of its backbone alone
    if another method wrote it.

    Tables per training sample are left out: they belong to the images of that checkpoint.

    Raises ``ValueError`` where not even the backbone fits.
    """
    if path.is_dir():
        folder = path if path.name == "checkpoints" else path / "checkpoints"
        found = newest_sound(folder)
        require(found is not None, f"--init-from {path}: there is no checkpoint in {folder}")
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
