"""Speed of data loading and training steps on this machine: ``sslzoo bench``."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from sslzoo.batch import Batch
from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.checks import require
from sslzoo.data.loading import processors
from sslzoo.data.sources import ArraySource, fake_source
from sslzoo.data.views import expand_views
from sslzoo.processes.departure import end_workers
from sslzoo.processes.placement import devices_per_node, world_size_of
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import Experiment, build_experiment
from sslzoo.run.dry_run import known_of_data
from sslzoo.run.trainer import build_trainer, check_device

Part = Literal["data", "model", "step"]
PARTS: tuple[Part, ...] = ("data", "model", "step")
WARM_UP = 3  # steps that are not measured, at least
PREFETCHED = 2  # batches that a worker reads in advance, torch's default
_RESERVE = 1.2  # times the images that the model takes: what the workers should deliver


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured on one device."""

    part: Part
    rate: float  # images per second
    waiting: float = 0.0  # share of the time in which a step waits for its batch


@dataclass(frozen=True, kw_only=True)
class Report:
    """Measurements of a recipe on one device of this machine."""

    speeds: tuple[Speed, ...]
    images: int  # in a micro-batch of the device
    device: str
    workers: int | None  # None: images in memory
    in_workers: bool  # whether the workers finish the views
    processors: int  # for each device of the machine

    def lines(self) -> list[str]:
        """The measurements and what follows from them, in words."""
        what = {
            "data": "reading and views alone",
            "model": "training steps alone, on generated images",
            "step": "training steps with their data",
        }
        data = f"; {self._data()}" if any(s.part != "model" for s in self.speeds) else ""
        lines = [f"{self.images} images in a step on one device, {self.device}{data}"]
        for s in self.speeds:
            waits = f"; {s.waiting:.0%} of the time is waiting for data" if s.part == "step" else ""
            lines.append(f"{s.part:6}{s.rate:10,.1f} images/s  {what[s.part]}{waits}")
        return lines + self._advice()

    def _data(self) -> str:
        if self.workers is None:
            return "images in memory, views on the device"
        by = "by them" if self.in_workers else "on the device"
        return f"data.workers={self.workers}, views {by if self.workers else 'in the main process'}"

    def _advice(self) -> list[str]:
        rate = {s.part: s.rate for s in self.speeds}
        if self.workers is None or not {"data", "model"} <= rate.keys():
            return []
        # Workers beyond the processors share these.
        each = rate["data"] / max(1, min(self.workers, self.processors))
        needed = math.ceil(_RESERVE * rate["model"] / each)
        lines = [
            f"A worker delivers {each:,.1f} images/s, and the device takes {rate['model']:,.1f}: "
            f"data.workers={min(needed, self.processors)} "
            + (
                "is enough"
                if needed <= self.processors
                else f"is what {self.processors} processors per device allow; {needed} would be needed. Packed "
                "by sslzoo pack --raw, images need no decoding"
            )
        ]
        if self.device == "cpu" and not self.in_workers:
            lines.append("On a CPU, data.augment_on=worker is faster")
        return lines


def bench(recipe: Recipe, parts: tuple[Part, ...], steps: int) -> Report:
    """Measure ``parts`` of a training by ``recipe`` over ``steps`` micro-batches, each on one device with its share of
    the batch. Nothing is written.

    ``ValueError`` if the machine lacks the device, or the data have too few images.
    """
    try:
        return _bench(recipe, parts, steps)
    finally:
        end_workers()


def _bench(recipe: Recipe, parts: tuple[Part, ...], steps: int) -> Report:
    device = _device(recipe)
    size, classes = known_of_data(recipe)
    plan = plan_of(recipe, size, world_size_of(recipe))
    images = plan.micro_batch_size
    alone = replace(
        recipe,
        data=replace(recipe.data, global_batch_size=images),
        trainer=_for_one_device(recipe.trainer),
    )
    speeds: list[Speed] = []
    if "model" in parts:
        source = fake_source(images, len(recipe.data.mean), 32, classes)
        built = build_experiment(alone, source=source, plan=plan)
        given = _Given(_generated(recipe, images, classes), WARM_UP + steps)
        speeds.append(_train("model", built, given, WARM_UP, steps))
        del built
    experiment = build_experiment(alone) if parts != ("model",) else None
    in_memory = experiment is None or isinstance(experiment.data.train_source, ArraySource)
    if experiment is not None:
        experiment.data.device = device
        warm_up, steps = (WARM_UP, steps) if in_memory else _in_flight(recipe.data.workers, steps)
        possible = experiment.plan.micro_batches_per_epoch
        require(
            possible >= warm_up + steps,
            f"{recipe.data.dataset} has {possible} batches of {images} images, and {warm_up + steps} are needed; "
            "lower --steps or data.global_batch_size",
        )
        if "data" in parts:
            speeds.append(_load(experiment, device, warm_up, steps))
        if "step" in parts:
            speeds.append(_train("step", experiment, experiment.data, warm_up, steps))
    return Report(
        speeds=tuple(sorted(speeds, key=lambda s: PARTS.index(s.part))),
        images=images,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
        workers=None if in_memory else recipe.data.workers,
        in_workers=experiment is not None and experiment.data.augments_in_workers,
        processors=max(1, processors() // devices_per_node(recipe)),
    )


def _in_flight(workers: int, steps: int) -> tuple[int, int]:
    """The steps to warm up for, and to measure. Once the batches that workers hold in advance are used, as many are in
    flight at the end as at the start. As workers may deliver all at the same time, their rounds are not cut short."""
    return max(WARM_UP, PREFETCHED * workers), steps + -steps % max(1, workers)


def _device(recipe: Recipe) -> torch.device:
    wanted = recipe.trainer.get("accelerator", "auto")
    check_device(recipe.trainer | {"devices": 1})
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require(
        wanted != "mps" and torch.cuda.is_available(),
        "only CUDA devices and CPUs are measured; set trainer.accelerator=cpu",
    )
    return torch.device("cuda")


def _for_one_device(trainer: dict[str, Any]) -> dict[str, Any]:
    """The ``trainer`` section for a single process and one epoch without evaluation."""
    dropped = ("num_nodes", "strategy", "sync_batchnorm", "accumulate_grad_batches")
    kept = {key: value for key, value in trainer.items() if key not in dropped}
    return kept | {"devices": 1, "max_epochs": 1, "limit_val_batches": 0}


def _generated(recipe: Recipe, images: int, classes: int) -> Batch:
    """Random views of ``images`` images."""
    channels = len(recipe.data.mean)
    views: dict[str, list[torch.Tensor]] = {"global": [], "local": []}
    for view in expand_views(recipe.views):
        views[view.role].append(torch.randn(images, channels, view.size, view.size))
    ids = torch.arange(images)
    label = ids % classes if classes else None
    return Batch(tuple(views["global"]), tuple(views["local"]), ids, label)


class _Given(LightningDataModule):
    """The same batch at every step."""

    def __init__(self, batch: Batch, steps: int) -> None:
        super().__init__()
        self.batch, self.steps, self.position = batch, steps, 0

    def train_dataloader(self) -> DataLoader[Any]:
        """References to the batch."""
        given: Any = [self.batch] * self.steps
        return DataLoader(given, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> list[Any]:
        """Nothing is evaluated."""
        return []


def _now(device: torch.device) -> float:
    """The time when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _load(experiment: Experiment, device: torch.device, warm_up: int, steps: int) -> Speed:
    """Read batches and make their views, without a network."""
    data, start, end = experiment.data, 0.0, 0.0
    for k, raw in enumerate(islice(data.train_dataloader(), warm_up + steps), start=1):
        data.finish(raw, device)
        if k == warm_up:
            start = _now(device)
        elif k == warm_up + steps:
            end = _now(device)  # not after the loop, at whose end the workers are waited for
    return Speed(part="data", rate=steps * data.plan.micro_batch_size / (end - start))


class _Clock(Callback):
    """Time of the steps after a warm-up, and of the waits between them."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.count, self.start, self.end, self.waited = 0, 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """The batch has come."""
        if self.count > self.warm_up:
            self.waited += time.perf_counter() - self.end
        elif self.count == self.warm_up:
            self.start = _now(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """The step is over."""
        self.count += 1
        if trainer.is_last_batch:
            self.total = _now(trainer.strategy.root_device) - self.start
        self.end = time.perf_counter()


def _train(part: Part, experiment: Experiment, data: LightningDataModule, warm_up: int, steps: int) -> Speed:
    """Train for an epoch of a few steps."""
    clock, section = _Clock(warm_up), experiment.recipe.trainer | {"limit_train_batches": warm_up + steps}
    with tempfile.TemporaryDirectory(prefix="sslzoo-bench-") as folder:
        callbacks: list[Callback] = [StepSeeding(), BroadcastBatchNormStats(), clock]
        trainer = build_trainer(section, run_dir=Path(folder), callbacks=callbacks)
        trainer.fit(experiment.method, datamodule=data)
    rate = steps * experiment.data.plan.micro_batch_size / clock.total
    return Speed(part=part, rate=rate, waiting=clock.waited / clock.total)
