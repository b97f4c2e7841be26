"""Build the objects of a run from a recipe. Fit, dry run, analyses and tests all build them here."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor, nn

from sslzoo.analysis import Analysis
from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.cadence import EvaluationCadence
from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.evaluation import KNN, FeatureEvaluation, Judge, LinearProbe
from sslzoo.callbacks.health import Health
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.online_probe import OnlineProbe
from sslzoo.callbacks.page import PageRefresh
from sslzoo.callbacks.pictures import Pictures
from sslzoo.callbacks.preemption import Preemption
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.callbacks.representation import Representation
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.callbacks.watch import Watch
from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.checks import require
from sslzoo.data.datasets import ImageSource, open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import ArraySource
from sslzoo.evaluate.figures import Measured
from sslzoo.export.encoder import SUFFIX, newest_weights, read_export
from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.compiling import compile_encoders
from sslzoo.nn.per_sample import tables_of
from sslzoo.nn.speed import speed_up
from sslzoo.posthoc.evaluations import check_suits
from sslzoo.processes.departure import Departure
from sslzoo.processes.placement import ALONE, Placement
from sslzoo.recipe.load import to_yaml
from sslzoo.recipe.plan import TrainingPlan, plan_of
from sslzoo.recipe.registry import analysis_class, method_class
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.records.page import write_page
from sslzoo.run.trainer import build_trainer

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)

TRIAL = 8  # images on which analyses are tried before a run


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Method and data of a recipe; :func:`equip` turns them into a run."""

    recipe: Recipe
    plan: TrainingPlan  # the plan that the method was prepared with
    data: SSLDataModule
    method: SSLMethod[Any]

    def initial_backbone(self) -> nn.Module:
        """A new copy of the encoder as it was before training."""
        return _build_method(self.recipe, self.plan).backbone


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks of a run, in the order in which Lightning calls them. The order matters."""

    seeding: StepSeeding  # first, before anything draws random numbers
    batch_norm: BroadcastBatchNormStats
    checkpoint: ExactCheckpoint  # before anything changes for the next micro-batch
    preemption: Preemption  # after checkpoint, so that it does not save the same step again
    cadence: EvaluationCadence
    online_probe: OnlineProbe | None  # None unless probe.online asks for it
    evaluation: FeatureEvaluation
    analyses: tuple[Watch, ...]
    meter: Meter  # after everything that records metrics
    pictures: Pictures  # after evaluation and analyses, whose results it draws
    page: PageRefresh  # after meter, whose files it reads
    health: Health  # after Meter, whose file it reads, and page, which shows a run that it stops
    progress: ProgressDisplay  # last, because it shows what Meter reported

    def __iter__(self) -> Iterator[Callback]:
        """All callbacks that are not None, in order."""
        yield from (self.seeding, self.batch_norm, self.checkpoint, self.preemption, self.cadence)
        if self.online_probe is not None:
            yield self.online_probe
        yield self.evaluation
        yield from self.analyses
        yield from (self.meter, self.pictures, self.page, self.health, self.progress)


@dataclass(frozen=True, kw_only=True)
class BuiltRun(Experiment):
    """A run that is ready to start: everything is built and checked, and nothing has been written."""

    run: Run
    callbacks: Callbacks
    trainer: Trainer

    @property
    def last_measured(self) -> Measured | None:
        """What the last validation found, of this start or of the one that it continues; None without one."""
        return self.callbacks.evaluation.latest

    def initial_backbone(self) -> nn.Module:
        """Like the base class's, but with the run's copy of the initial weights if they were not random."""
        if not self.run.start.exists():
            return super().initial_backbone()
        backbone = _build_method(self.recipe, self.plan, start=False).backbone
        backbone.load_state_dict(torch.load(self.run.start, map_location="cpu", weights_only=True))
        return backbone

    def keep_start(self, checkpoint: Path | None) -> None:
        """Save the encoder's initial weights in the run directory unless they are random, so that later starts do not
        need the file again. A run that continues another run's ``checkpoint`` copies that run's file."""
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
    """Build the run of ``recipe`` in the directory of ``run``: :func:`build_experiment`, then :func:`equip`."""
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
    """Build data and method of ``recipe``. ``source`` provides the images; by default the recipe's data set is opened.

    ``plan`` prepares the method for another data set size than that of ``source``: a dry run feeds a few images to a
    method whose queues and tables are as large as in the real run. With ``start=False``, ``backbone.weights`` is not
    read, because a checkpoint will provide the weights.
    """
    if source is None:
        source = open_source(recipe.data)
        require(
            recipe.data.augment_on != "worker" or not isinstance(source, ArraySource),
            f"data.augment_on must be device or left out: {recipe.data.dataset} is in memory and needs no workers",
        )
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
    """Build the method and its backbone, initialised only from ``recipe.seed`` and ``backbone.weights`` and thus equal
    on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        kind = method_class(recipe.method.name)
        backbone, width = build_backbone(recipe.backbone, start=start)
        speed_up(backbone, recipe.speed, name=recipe.backbone.name)
        method = kind(recipe.method, backbone, width)
        method.prepare(plan, recipe.optim, recipe.seed)
    if recipe.speed.compile is not None:
        method.compiler = recipe.speed.compile
        compile_encoders(method, backbone, recipe.speed.compile)
    return method


def try_analyses(experiment: Experiment) -> None:
    """Run the recipe's analyses on a few images; raises ``ValueError`` if one cannot handle the method or views."""
    analyses = _build_analyses(experiment.recipe)
    if analyses:
        batch = experiment.data.example_batch(min(TRIAL, experiment.plan.dataset_size))
        for analysis in analyses:
            analysis.describe([analysis.observe(experiment.method, batch)])


def _build_analyses(recipe: Recipe) -> list[Analysis[Any]]:
    """The analyses that run during training."""
    return [analysis_class(cfg.name)(cfg) for cfg in recipe.analyses]


def equip(
    experiment: Experiment,
    run: Run,
    *,
    placement: Placement = ALONE,
    departure: Departure | None = None,
    brief: bool = False,
) -> BuiltRun:
    """Add callbacks and trainer to ``experiment``, for the directory of ``run``. With ``brief``, for dry runs, no
    progress is shown and evaluations train for one step only.

    Raises ``ValueError`` if evaluation data are missing, or this machine lacks what ``trainer`` asks for.
    """
    recipe, data = experiment.recipe, experiment.data
    check_suits(recipe.eval.after, experiment.method.backbone, experiment.method)
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
        recipe=to_yaml(recipe),
        every_steps=recipe.logging.checkpoint_every_steps,
        evaluate_every_epochs=recipe.eval.every_epochs,
        keep_epochs=recipe.logging.keep_epochs,
    )
    online = _online_probe(recipe, data)
    analyses = tuple(Watch(analysis) for analysis in _build_analyses(recipe))
    quiet = Console(quiet=True, force_terminal=False)
    return Callbacks(
        seeding=StepSeeding(),
        batch_norm=BroadcastBatchNormStats(),
        checkpoint=checkpoint,
        preemption=Preemption(checkpoint, departure),
        cadence=EvaluationCadence(recipe.eval.every_epochs),
        online_probe=online,
        evaluation=_evaluation(recipe, run, data, online, brief=brief),
        analyses=analyses,
        meter=Meter(run.path, every_steps=recipe.logging.every_steps),
        pictures=Pictures(run.path, run.gallery, analyses),
        page=PageRefresh(lambda: write_page(run.path)),
        # The few images of a dry run always look collapsed.
        health=Health(run.metrics, stop=recipe.eval.stop_on_collapse and not brief, silent=brief),
        progress=ProgressDisplay(out=quiet, err=quiet)
        if brief
        else ProgressDisplay(lines=recipe.logging.lines),
    )


def _online_probe(recipe: Recipe, data: SSLDataModule) -> OnlineProbe | None:
    if not recipe.probe.online:
        return None
    require(
        data.num_classes > 0,
        f"probe.online=true needs labels of the training images, and {recipe.data.dataset} has none; leave it out",
    )
    return OnlineProbe(recipe.probe, classes=data.num_classes, seed=recipe.seed)


def _evaluation(
    recipe: Recipe, run: Run, data: SSLDataModule, online: OnlineProbe | None, *, brief: bool
) -> FeatureEvaluation:
    data.validation_sets()  # refuses images that are too small
    judges: list[Judge] = []
    if data.eval_sets():
        judges += [LinearProbe(recipe.probe, brief=brief), KNN(recipe.eval)]
    else:
        require(
            not recipe.eval.after,
            f"eval.after needs labels, and {recipe.data.dataset} has none: name labelled data in probe.data, or leave "
            "it out",
        )
    judges += [online] if online is not None else []
    representation = Representation(run.path, seed=recipe.seed)
    return FeatureEvaluation(
        judges, representation, recipe.probe, recipe.eval, seed=recipe.seed, pictures=run.gallery
    )


def load_weights(method: SSLMethod[Any], path: Path) -> None:
    """Load weights and buffers from the checkpoint ``path``, or from the newest one of a run directory. If another
    method wrote it, or ``path`` is an exported safetensors file, only the backbone is loaded.

    Per-sample tables are not loaded, because they belong to the images of that run.

    Raises ``ValueError`` if the backbone does not match.
    """
    require(
        path.exists() or latest(path.parent) is not None,
        f"--init-from {path}: no such file or folder; give a run directory, a checkpoint such as "
        "RUN/checkpoints/last.ckpt, or an exported backbone.safetensors",
    )
    if path.is_dir():
        path = newest_weights(path)
    if path.suffix == SUFFIX:
        _load_backbone(method, read_export(path)[1], path)
        return
    content = load_checkpoint(path)
    # Tables of both: the two recipes may have different ones.
    names = dict.fromkeys([*content.get("per_sample", ()), *tables_of(method)])
    per_sample = tuple(f"{name}." for name in names)
    stored = {k: v for k, v in content["state_dict"].items() if not k.startswith(per_sample)}
    current = method.state_dict()
    if names:
        log.warning(
            "--init-from %s: not loading %s, which belongs to the images of that run", path, ", ".join(names)
        )
    if _same_shapes(stored, {k: v for k, v in current.items() if not k.startswith(per_sample)}):
        method.load_state_dict(current | stored)
        return
    _load_backbone(method, stored, path)
    log.warning("--init-from %s: heads and state are from another method; loaded only the backbone", path)


def _load_backbone(method: SSLMethod[Any], stored: Mapping[str, Tensor], path: Path) -> None:
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    require(
        _same_shapes(backbone, method.backbone.state_dict()),
        f"--init-from {path}: its backbone differs from this recipe's; set the backbone section as in that run",
    )
    method.backbone.load_state_dict(backbone)


def _same_shapes(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return {k: tuple(v.shape) for k, v in a.items()} == {k: tuple(v.shape) for k, v in b.items()}
