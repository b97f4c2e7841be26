"""The life of a run: build, summarise, train, evaluate, report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console

from sslzoo.build import build_data, build_method, build_plan
from sslzoo.callbacks.cadence import EvaluationCadence
from sslzoo.callbacks.checkpoint import ExactCheckpoint, latest, load_checkpoint
from sslzoo.callbacks.knn import KNN
from sslzoo.callbacks.linear_probe import LinearProbe
from sslzoo.callbacks.margin_analysis import MarginAnalysis
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.position import Position, SameEncoder
from sslzoo.callbacks.preemption import Preemption
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.config import Recipe, require
from sslzoo.data.datasets import open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.evaluate.final import final_evaluation
from sslzoo.exits import ExitCode
from sslzoo.launch import build_trainer, world_size_of
from sslzoo.loggers import build_loggers
from sslzoo.plan import TrainingPlan
from sslzoo.recipe import LoadedRecipe, plain
from sslzoo.report import plot_curves, plot_views, results_table
from sslzoo.run import Run, is_leader, log_to, open_run
from sslzoo.summary import run_summary

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)

EXAMPLES = 6  # images in views.png


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run that is ready to start: everything is built, checked and on disk."""

    loaded: LoadedRecipe
    run: Run
    plan: TrainingPlan
    data: SSLDataModule
    method: SSLMethod[Any]
    trainer: Trainer
    callbacks: dict[str, Callback]
    checkpoint: Path | None  # to resume from
    console: Console


def prepare(
    loaded: LoadedRecipe, *, out: Path | None = None, resume: str | None = None, init_from: Path | None = None
) -> Session:
    """Build the run that ``loaded`` describes; nothing is trained yet.

    ``resume`` is ``auto`` (the newest checkpoint of ``out``, or of the recipe's newest run; a new run where
    there is none) or the path of a checkpoint or run directory. ``init_from`` takes weights only.

    Raises:
        ValueError: whatever is wrong with recipe, data, checkpoint or directory, before training starts.
    """
    recipe = loaded.recipe
    require(
        not (resume and init_from), "--resume restores everything, --init-from weights only: give one of them"
    )
    source = open_source(recipe.data)
    plan = build_plan(recipe, len(source), world_size_of(recipe.trainer))
    data = build_data(recipe, plan, source)
    method = build_method(recipe, plan)
    if init_from is not None:
        load_weights(method, init_from)
    checkpoint, out = _checkpoint_to_resume(resume, out)
    run = open_run(loaded, world_size=plan.world_size, out=out, resume=resume is not None)
    if resume == "auto":
        checkpoint = latest(run.checkpoints)
    if is_leader():
        log_to(run.log)
        run.update_manifest(data_fingerprint=data.fingerprint)
    console = Console(stderr=False, quiet=not is_leader())
    callbacks = build_callbacks(recipe, run, data)
    loggers = build_loggers(recipe.logging, run.path, run.run_id, recipe=plain(recipe)) if is_leader() else []
    return Session(
        loaded=loaded,
        run=run,
        plan=plan,
        data=data,
        method=method,
        trainer=build_trainer(
            recipe.trainer, run_dir=run.path, callbacks=list(callbacks.values()), loggers=loggers
        ),
        callbacks=callbacks,
        checkpoint=checkpoint,
        console=console,
    )


def build_callbacks(recipe: Recipe, run: Run, data: SSLDataModule) -> dict[str, Callback]:
    """The run's callbacks in the order in which they must stand."""
    checkpoint = ExactCheckpoint(
        run.checkpoints,
        every_steps=recipe.logging.checkpoint_every_steps,
        keep_epochs=recipe.logging.keep_epochs,
    )
    callbacks: dict[str, Callback] = {
        "position": Position(),
        "same_encoder": SameEncoder(),
        "checkpoint": checkpoint,
        "preemption": Preemption(checkpoint),
        "cadence": EvaluationCadence(recipe.eval.every_epochs),
    }
    if data.eval_sets():
        callbacks |= {"probe": LinearProbe(recipe.probe, seed=recipe.seed), "knn": KNN(recipe.eval)}
    if (margins := recipe.logging.margins) is not None:
        callbacks["margins"] = MarginAnalysis(
            margins.margins, every_steps=margins.every_steps, temperature=margins.temperature
        )
    meter = Meter(run.path, every_steps=recipe.logging.every_steps)
    return callbacks | {"meter": meter, "progress": ProgressDisplay()}


def train(session: Session) -> int:
    """Train, evaluate and report. Returns the exit code; what went wrong at run time is raised."""
    run, console = session.run, session.console
    if is_leader():
        console.print(run_summary(session.loaded.recipe, session.plan, session.method, str(run.path)))
        if session.checkpoint is not None:
            console.print(f"continuing from {session.checkpoint}")
        example = session.data.example_batch(EXAMPLES)
        data = session.loaded.recipe.data
        plot_views(example, run.path / "views.png", mean=data.mean, std=data.std, images=EXAMPLES)
    started = time.perf_counter()
    code = ExitCode.FAILURE
    try:
        session.trainer.fit(session.method, datamodule=session.data, ckpt_path=session.checkpoint)
        _report(session, time.perf_counter() - started)
        code = ExitCode.DONE
    except SystemExit as leaving:
        if session.trainer.interrupted:
            code = ExitCode.INTERRUPT
        else:
            code = ExitCode(leaving.code) if isinstance(leaving.code, int) else ExitCode.FAILURE
    finally:
        if is_leader():
            run.finish(code)
    return code


def _report(session: Session, seconds: float) -> None:
    """The final evaluation, its table and the pictures. Collective; rank 0 writes and prints."""
    recipe, run, trainer = session.loaded.recipe, session.run, session.trainer
    session.method.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when it is done
    meter = session.callbacks["meter"]
    assert isinstance(meter, Meter)
    summary = final_evaluation(
        session.method,
        session.data,
        recipe,
        online=meter.latest,
        initial=lambda: build_method(recipe, session.plan).backbone,
        folder=run.evaluation,
        seconds=seconds,
    )
    if is_leader():
        plot_curves(run.metrics, run.path / "curves.png")
        session.console.print(results_table(summary))
        session.console.print(f"run directory: {run.path}", soft_wrap=True)


def load_weights(method: SSLMethod[Any], path: Path) -> None:
    """Weights and buffers of the checkpoint ``path``; of its backbone alone if another method wrote it.

    State per training sample stays empty: it belongs to the data of that checkpoint.

    Raises ``ValueError`` where not even the backbone fits.
    """
    per_sample = tuple(f"{name}." for name in method.per_sample_state)
    everything = load_checkpoint(path)["state_dict"]
    stored = {k: v for k, v in everything.items() if not k.startswith(per_sample)}
    own = method.state_dict()
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


def _checkpoint_to_resume(resume: str | None, out: Path | None) -> tuple[Path | None, Path | None]:
    """The checkpoint that ``--resume PATH`` names and the run directory it belongs to."""
    if resume is None or resume == "auto":
        return None, out
    path = Path(resume)
    if path.is_dir():
        checkpoint = latest(path / "checkpoints")
        require(checkpoint is not None, f"--resume {path}: no checkpoint in {path / 'checkpoints'}")
        return checkpoint, out or path
    load_checkpoint(path)  # a damaged file is refused here, with the one to take instead
    return path.resolve(), out or path.resolve().parent.parent
