"""A short training, observed: the losses, gradients and state of every step, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sslzoo.callbacks.online_probe import OnlineProbe
from sslzoo.exits import Diverged
from sslzoo.method import SSLMethod
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import build_run
from sslzoo.run.directory import Run
from sslzoo.run.placement import ALONE, place
from sslzoo.testing.small import small_images


@dataclass
class Course:
    """What was seen on one process; tensors are copies."""

    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch, of this process's samples
    # Of each call of an optimiser, by parameter: the mean over the processes.
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)  # before each micro-batch, and at the end
    skipped: list[bool] = field(default_factory=list)  # of each optimiser step
    diverged: bool = False


class _Observer(Callback):
    """Fills a course, and spoils one image."""

    def __init__(self, course: Course, spoilt: tuple[int, int] | None) -> None:
        self.course, self.spoilt = course, spoilt

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.course.states.append(carried(trainer, pl_module))
        if self.spoilt == (trainer.datamodule.position, trainer.global_rank):
            batch.global_views[0][0, 0, 0, 0] = torch.inf

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.course.gradients.append(
            {name: p.grad.detach().clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.course.losses.append(pl_module.recorded["train/loss"].clone())
        if pl_module.optimizer_steps > len(self.course.skipped):
            self.course.skipped.append(pl_module.step_skipped)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    steps: int,
    labelled: bool = False,
    fp16: bool = False,
    spoilt: tuple[int, int] | None = None,
    dropout: bool = True,
) -> Course:
    """``steps`` steps of ``recipe`` on generated images, as one process of ``trainer.devices``.

    ``spoilt``: micro-batch and rank in which the first image is not finite. ``fp16`` steps through a loss scaler, as
    ``16-mixed`` does on a GPU. Without ``dropout`` its layers do nothing, since what they draw depends on the number
    of processes. Ends early, with ``diverged``, where the loss is not finite.
    """
    built = build_run(
        replace(recipe, trainer=recipe.trainer | {"limit_val_batches": 0}),
        Run(folder, "course"),
        source=small_images(recipe, steps, labelled=labelled),
        placement=place() if dist.is_initialized() else ALONE,
        brief=True,
    )
    course = Course()
    trainer: Any = built.trainer
    # First, so that it sees what a method has recorded before the meter takes it.
    trainer.callbacks = [_Observer(course, spoilt), *trainer.callbacks]
    if fp16:  # Lightning refuses it on a CPU; at this scale only what is not finite overflows
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    if not dropout:
        _without_dropout(built.method)
    try:
        trainer.fit(built.method, datamodule=built.data)
    except Diverged:
        course.diverged = True
    course.states.append(carried(trainer, built.method))
    return course


def carried(trainer: Any, method: SSLMethod[Any]) -> dict[str, Tensor]:
    """Copies of all tensors of a run that steps move, by name."""
    found = dict(method.state_dict())
    for i, optimizer in enumerate(trainer.optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{p}.{name}": value for name, value in state.items()}
    for probe in (c for c in trainer.callbacks if isinstance(c, OnlineProbe)):
        for layer, state in probe.state_dict().items():
            found |= {f"probe.{layer}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items() if isinstance(value, Tensor)}


def _without_dropout(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
