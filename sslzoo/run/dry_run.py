"""``fit --dry-run``: build the run as ``fit`` does, and run each stage once on a few generated images."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table

from sslzoo.checkpoints import latest
from sslzoo.dashboards.loggers import require_packages
from sslzoo.data.datasets import open_source
from sslzoo.data.module import check_knn
from sslzoo.data.sources import fake_source
from sslzoo.evaluate.final import final_evaluation
from sslzoo.exits import ExitCode
from sslzoo.export.write import write_at_end
from sslzoo.processes.departure import Departure
from sslzoo.processes.explain import REFUSED, explain, one_line
from sslzoo.processes.placement import devices_per_node, world_size_of
from sslzoo.randomness import is_holdout
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.sections import Recipe
from sslzoo.recipe.trainer_keys import FP16, check_precision
from sslzoo.records.directory import Run
from sslzoo.run.build import BuiltRun, build_run
from sslzoo.run.evaluate import evaluate_at_end
from sslzoo.run.memory import DeviceMemory, device_memory, shared_memory
from sslzoo.run.summary import human_bytes, run_summary, state_memory
from sslzoo.terminal import OUT

LARGE = 100  # pixels; above this size fewer images are used
EVALUATED = 2  # images per evaluation set
UNKNOWN_CLASSES = 10  # assumed number of classes if labelled images are not available


def dry_run(recipe: Recipe) -> int:
    """Try the run of ``recipe`` on a few generated images on the CPU, print a summary, and return the exit code.

    The data need not be available: sizes come from the catalogue. Files go to a temporary folder that is removed.
    """
    departure = Departure()
    departure.install()  # signals raise an exception, so that the folder is removed
    stage = ""
    try:
        with tempfile.TemporaryDirectory(prefix="sslzoo-dry-run-") as folder:
            require_packages(recipe.logging)
            if recipe.trainer.get("accelerator") == "cpu":
                check_precision(recipe.trainer)
            built, other = (
                build_rehearsal(recipe, Path(folder, str(images)), departure, images=images)
                for images in few_images(recipe)
            )
            other.trainer.limit_val_batches = 0  # only the memory of its step matters
            stage = "training"
            memory = device_memory(built, other, train)
            stage = "reading its checkpoint"
            size = read_back(built)
            stage = "evaluating at the end"
            evaluate(built)
    except BaseException as error:
        return _failed(error, departure.phase if stage == "training" else stage)
    finally:
        departure.restore()
    OUT.print(
        Group(run_summary(recipe, built.plan, built.method, "none: dry run"), _details(recipe, built, memory))
    )
    OUT.print(
        f"{_done(recipe, built)}, a checkpoint of {human_bytes(size)} written and read: passed",
        soft_wrap=True,
    )
    return ExitCode.DONE


def build_rehearsal(
    recipe: Recipe, folder: Path, departure: Departure | None = None, *, images: int | None = None
) -> BuiltRun:
    """Build the run in ``folder`` with a full-size method, a few generated ``images`` in a micro-batch (default: the
    first of :func:`few_images`), and a single step."""
    size, classes = known_of_data(recipe)
    images = few_images(recipe)[0] if images is None else images
    pixels = _pixels(recipe)
    return build_run(
        _miniature(recipe, images),
        Run(folder, "dry-run"),
        source=fake_source(images * recipe.accumulate, len(recipe.data.mean), pixels, classes),
        plan=plan_of(recipe, size, world_size_of(recipe)),
        departure=departure,
        brief=True,
    )


def few_images(recipe: Recipe) -> tuple[int, int]:
    """The numbers of images in the micro-batches of a rehearsal, and of another to compare it with."""
    return (4, 2) if _pixels(recipe) > LARGE else (8, 16)


def _pixels(recipe: Recipe) -> int:
    return max(recipe.eval.size, *(view.size for view in recipe.views))


def known_of_data(recipe: Recipe) -> tuple[int, int]:
    """Number of images and of classes (0: no labels) in the training split: from the catalogue, otherwise from the
    folder, and if that does not exist, a guess. ``ValueError`` if the folder has too few for k-NN."""
    data, info = recipe.data, dataset_info(recipe.data.dataset)
    classes = (
        (len(data.class_names) or info.num_classes or UNKNOWN_CLASSES) if info.has_labels(data.split) else 0
    )
    size = info.nominal_size(data.split, data.classes)
    if size is not None:
        return size, classes
    try:
        source = open_source(data)
    except ValueError:
        return info.sizes.get(data.split, data.global_batch_size), classes
    if source.num_classes:
        check_knn(recipe.eval, len(source), source.name)
    return len(source), source.num_classes


def _miniature(recipe: Recipe, images: int) -> Recipe:
    """``recipe`` changed to one step with ``images`` per micro-batch and one batch per evaluation set, in one process
    on the CPU."""
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "precision": _precision_here(recipe),
        "limit_val_batches": 1,
    }
    # A fraction for which some, but not all, of the evaluated images are held out.
    holdout = next(
        fraction
        for fraction in (i / 1000 for i in range(1, 1000))
        if is_holdout(torch.arange(EVALUATED), fraction, recipe.seed).any()
    )
    return replace(
        recipe,
        data=replace(recipe.data, global_batch_size=images * recipe.accumulate, workers=0),
        probe=replace(recipe.probe, holdout=holdout, train_size=None),
        eval=replace(
            recipe.eval,
            every_epochs=1,
            batch_size=EVALUATED,
            bank_size=None,
            knn_k=min(recipe.eval.knn_k, EVALUATED),
        ),
        trainer=recipe.trainer | trainer,
        speed=replace(recipe.speed, compile=None),  # which takes longer than the dry run
    )


def _precision_here(recipe: Recipe) -> str:
    """The precision of ``recipe``, or bf16 instead of fp16, which needs a GPU."""
    precision = str(recipe.trainer.get("precision") or "32-true")
    return "bf16-mixed" if precision in FP16 else precision


def train(built: BuiltRun) -> None:
    """Run one optimiser step and an evaluation, and write a checkpoint."""
    built.trainer.fit(built.method, datamodule=built.data)
    steps = built.method.optimizer_steps
    if steps != 1:
        raise RuntimeError(f"{built.recipe.method.name} took {steps} optimiser steps instead of one")


def read_back(built: BuiltRun) -> int:
    """Resume from the checkpoint, which is at the last step, and return its size in bytes."""
    path = latest(built.run.checkpoints)
    assert path is not None
    built.trainer.fit(built.method, datamodule=built.data, ckpt_path=path)
    return path.stat().st_size


def evaluate(built: BuiltRun) -> None:
    """Run the final evaluation, and export the encoder."""
    results = final_evaluation(
        built.method,
        built.data,
        built.recipe,
        last=built.last_measured,
        initial=built.initial_backbone,
        folder=built.run.evaluation,
        seconds=0.0,
        brief=True,
    )
    results = evaluate_at_end(
        built.method,
        built.data,
        built.recipe,
        built.run.evaluation,
        device=torch.device("cpu"),
        summary=results,
        brief=True,
    )
    write_at_end(built.method, built.recipe, built.run.path, manifest={}, results=results)


def _failed(error: BaseException, stage: str) -> int:
    """Report the error on stderr and return the exit code."""
    if isinstance(error, REFUSED):
        code, message, traceback = ExitCode.USAGE, one_line(error), ""
    else:
        ending = explain(error, rank=0, phase=stage or "starting", begun=True)
        code, message = ending.code, ending.message
        traceback = "" if ending.expected else ending.traceback
    if stage and code not in (ExitCode.PREEMPTED, ExitCode.INTERRUPT):
        message = f"the dry run failed while {stage}: {message}"
    sys.stderr.write(f"{traceback}sslzoo fit: {message}\n")
    return code


def _done(recipe: Recipe, built: BuiltRun) -> str:
    samples = built.recipe.data.global_batch_size
    done = f"one training step on {samples} generated images"
    if recipe.trainer.get("precision") in FP16:
        done += f" (in {_precision_here(recipe)}, since fp16 needs a GPU)"
    if not built.data.eval_sets():
        return f"{done} without labels, one validation batch, representation"
    baselines = ", the final table" if built.recipe.eval.baselines else ""
    after = "".join(f", {name}" for name in built.recipe.eval.after)
    return f"{done}, one validation batch, probe and k-NN{baselines}{after}"


def _details(recipe: Recipe, built: BuiltRun, memory: DeviceMemory) -> Table:
    """Sizes of views and state, and the memory that they need."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("view", style="bold cyan")
    table.add_column("one image, float32")
    for view in recipe.views:
        size = view.size * view.size * len(recipe.data.mean) * 4
        table.add_row(f"{view.count} x {view.size} px {view.role}", human_bytes(size))
    for name, size in state_memory(built.method):
        table.add_row(f"state: {name}", human_bytes(size))
    table.add_row(
        "memory of a device",
        f"{human_bytes(memory.total)} for tensors with {memory.images} image{'s' * (memory.images > 1)}, "
        f"{human_bytes(memory.per_image)} an image",
    )
    shared = shared_memory(recipe, memory.images, devices_per_node(recipe))
    if shared:
        table.add_row("shared memory", f"{human_bytes(shared)} a machine, for batches of data workers")
    return table
