"""Run a short training and record losses, gradients and state of every step, for comparisons."""

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
from sslzoo.processes.placement import ALONE, place
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.run.build import build_run
from sslzoo.testing.small import small_images


@dataclass
class Course:
    """Records of one process; tensors are copies."""

    # Per micro-batch, for this process's samples; among them the loss, train/loss.
    measured: list[dict[str, Tensor]] = field(default_factory=list)
    # Gradients by parameter, averaged over processes, for each call of an optimiser.
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)  # before each micro-batch, and at the end
    skipped: list[bool] = field(default_factory=list)  # for each optimiser step, whether it was skipped
    diverged: bool = False

    @property
    def losses(self) -> list[Tensor]:
        """The loss of each micro-batch, for this process's samples."""
        return [measured["train/loss"] for measured in self.measured]


class _Observer(Callback):
    """Records to a course, and makes one image non-finite."""

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
        self.course.measured.append({name: value.clone() for name, value in pl_module.recorded.items()})
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
    """Train ``steps`` steps of ``recipe`` on generated images, as one of ``trainer.devices`` processes.

    ``spoilt``: micro-batch and rank whose first image is made non-finite. ``fp16`` uses a loss scaler, as ``16-mixed``
    does on a GPU. ``dropout=False`` disables dropout, whose random numbers depend on the number of processes. If the
    loss is not finite, the training ends early, with ``diverged`` set.
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
    # First in the list, so that it reads what the method has recorded before Meter clears it.
    trainer.callbacks = [_Observer(course, spoilt), *trainer.callbacks]
    if fp16:  # Lightning refuses 16-mixed on a CPU; with this scale only non-finite values overflow
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
    """Copies of all tensors of a run that training steps change, by name."""
    tensors = dict(method.state_dict())
    for i, optimizer in enumerate(trainer.optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{p}.{name}": value for name, value in state.items()}
    for probe in (c for c in trainer.callbacks if isinstance(c, OnlineProbe)):
        for layer, state in probe.state_dict().items():
            tensors |= {f"probe.{layer}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}


def _without_dropout(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
