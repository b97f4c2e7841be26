"""Where the time of a training step goes, part by part, by torch's profiler on the CPU.

    python benchmarks/profile_step.py RECIPE [KEY=VALUE ...] [--images N] [--steps N]

A real ``Trainer`` trains by the recipe on one thread, with the callbacks that measure and seed. Recipes for image files
read photographs (``photographs.py``) in the main process. Each operation, with those of its backward pass, counts for
the innermost part that called it; the rest of a part is Python.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from photographs import write_photographs
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.data.loading import ViewDataset
from sslzoo.data.module import SSLDataModule
from sslzoo.method import SSLMethod
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.load import load_recipe
from sslzoo.run.build import Experiment, build_experiment
from sslzoo.run.trainer import build_trainer

WARM_UP = 2
CLASSES = 2
FRAMEWORK = "Lightning, callbacks, other"
_BACKWARD = "autograd::engine::evaluate_function: "


def experiment_of(
    name: str, overrides: list[str], folder: Path, images: int | None, steps: int
) -> Experiment:
    """The experiment of a recipe on one device, with photographs in ``folder`` where it reads files."""
    data = load_recipe(name, overrides).recipe.data
    batch = images or data.global_batch_size
    kept = [*overrides, "trainer.devices=1", "trainer.num_nodes=1", "trainer.sync_batchnorm=false"]
    kept += ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    kept += ["data.workers=0", f"data.global_batch_size={batch}"]
    if dataset_info(data.dataset).decoded_by_workers:
        for split in ("train", "test"):
            for k in range(CLASSES):
                (folder / split / str(k)).mkdir(parents=True)
                write_photographs(folder / split / str(k), -(-batch * (WARM_UP + steps) // CLASSES))
        kept += ["data.dataset=imagefolder", f"data.root={folder}", "data.classes=[]"]
        kept += ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"]
    return build_experiment(load_recipe(name, kept).recipe)


def _named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """``function`` as a part of the profile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"part: {part}"):
            return function(*args, **kwargs)

    return call


@contextmanager
def parts_of(method: SSLMethod[Any]) -> Iterator[None]:
    """Names the parts of a step of ``method`` in the profile."""
    for name, child in method.named_children():
        lists = [m for m in child.modules() if isinstance(m, nn.ModuleList)]
        for module in [child, *(item for several in lists for item in several)]:
            if not isinstance(module, nn.ModuleList):
                module.forward = _named(module.forward, f"network: {name}")
    with (
        patch.object(ViewDataset, "__getitems__", _named(ViewDataset.__getitems__, "images and crops")),
        patch.object(SSLDataModule, "_views", _listed(SSLDataModule._views)),
        patch.object(method, "optimizer_step", _apart(method.optimizer_step)),
        patch.object(method, "loss", _named(method.loss, "loss")),
        patch.object(method, "after_step", _named(method.after_step, "state after a step (EMA, queue)")),
    ):
        yield


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    return _named(lambda *args: list(function(*args)), "augmentation of batches")


def _apart(optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
    """``optimizer_step`` with Lightning's closure, which the optimiser calls, as a part of its own."""

    def call(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer_step(epoch, batch_idx, optimizer, _named(closure, FRAMEWORK))

    return call


class Profile(Callback):
    """Runs the profiler over the steps after a warm-up."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count = steps, 0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_end(self, *_: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        self.count += 1
        if self.count == WARM_UP:
            self.profile.start()
        elif self.count == WARM_UP + self.steps:
            self.profile.stop()


def shares(profile: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of each part by operation: own time of its operations, of Python between them, and of their backward
    pass."""
    events = profile.events()
    part: dict[int, str] = {}
    forward: dict[int, str] = {}  # by the number that autograd gave the operation

    def part_of(event: Any) -> str:
        if event.id not in part:
            part[event.id] = _part(event)
        return part[event.id]

    def _part(event: Any) -> str:
        name = event.name
        if name.startswith("part: "):
            return name.removeprefix("part: ")
        if name.startswith("Optimizer.step#"):
            return "optimiser"
        if name.startswith(_BACKWARD):
            return forward.get(event.sequence_nr, "gradients")
        return part_of(event.cpu_parent) if event.cpu_parent is not None else FRAMEWORK

    ordered = sorted(events, key=lambda event: event.time_range.start)
    for event in ordered:
        inside_backward = event
        while inside_backward is not None and not inside_backward.name.startswith(_BACKWARD):
            inside_backward = inside_backward.cpu_parent
        name = part_of(event)
        if event.sequence_nr >= 0 and inside_backward is None:
            forward[event.sequence_nr] = name  # the innermost operation that autograd records comes last
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in ordered:
        name = "Python" if event.name.startswith(("part: ", "Optimizer.", _BACKWARD)) else event.name
        total[part_of(event)][name] += event.self_cpu_time_total / 1e3
    return total


def _largest_first(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def main() -> None:
    """Print the parts of a step, largest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, help="images per step (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--operations", type=int, default=0, help="show so many operations of each part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experiment = experiment_of(
            options.recipe, options.overrides, folder / "images", options.images, options.steps
        )
        watch = Profile(options.steps)
        callbacks: list[Callback] = [StepSeeding(), BroadcastBatchNormStats(), Meter(folder, every_steps=50)]
        trainer_options = {
            **experiment.recipe.trainer,
            "max_epochs": 1,
            "limit_val_batches": 0,
            "limit_train_batches": WARM_UP + options.steps,
        }
        trainer = build_trainer(trainer_options, run_dir=folder, callbacks=[*callbacks, watch])
        with parts_of(experiment.method):
            trainer.fit(experiment.method, datamodule=experiment.data)
    found = shares(watch.profile)
    parts = {part: sum(times.values()) / options.steps for part, times in found.items()}
    whole = sum(parts.values())
    print(f"{options.recipe}, {experiment.plan.micro_batch_size} images: {whole:,.1f} ms a step")
    for part, ms in _largest_first(parts):
        print(f"{ms:10,.2f} ms  {ms / whole:6.1%}  {part}")
        for operation, total in _largest_first(found[part])[: options.operations]:
            print(f"{total / options.steps:25,.2f} ms  {operation}")


if __name__ == "__main__":
    main()
