"""The one contract a method fulfils: a config, its modules, and a loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast, EvalBatch
from sslzoo.checks import require
from sslzoo.exits import Diverged
from sslzoo.nn.per_sample import tables_of
from sslzoo.nn.undo import Undo
from sslzoo.optim.optimizers import build_optimizer, set_learning_rate
from sslzoo.optim.schedules import learning_rate
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import MethodConfig, OptimConfig

ConfigT = TypeVar("ConfigT", bound=MethodConfig)
SMALLEST_SCALE = 2.0**-14  # of fp16's scaler, which begins at 2**16 and halves at every overflow


class SSLMethod(LightningModule, Generic[ConfigT]):
    """A backbone, a config and a loss.

    A subclass sets ``Config``, builds heads and state in ``__init__`` and implements :meth:`loss`.
    It may override :meth:`prepare` (state whose size depends on the data, such as a
    :class:`~sslzoo.nn.per_sample.PerSampleTable`), :meth:`after_step` (EMA, queue) with
    :meth:`after_skipped_step`, :meth:`features` (more layers for probes) and :meth:`contrasted` (what analyses look
    at). Everything else is the framework's.
    """

    Config: ClassVar[type[MethodConfig]]
    # Set where the method differentiates twice: fused batch-norm kernels cannot, the framework's own can.
    needs_double_backward: ClassVar[bool] = False

    def __init__(self, cfg: ConfigT, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.plan: TrainingPlan
        self.optim: OptimConfig
        self.seed: int
        self.optimizer_steps = 0  # real optimiser steps finished, skipped ones included; in the checkpoint
        self.step_skipped = False  # whether the last of them was
        self._undo: Undo | None = None  # while a step is in progress that may be skipped
        self.published: dict[str, Tensor] = {}  # this step's features, detached
        self.recorded: dict[str, Tensor] = {}  # this step's measurements, for the meter
        self.settings: dict[str, float] = {}  # and its settings

    # -- what a method implements -------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Scalar pre-training loss of this rank's samples; their mean over ranks is the global loss.

        Must call :meth:`publish` once with the backbone features (N, F) of one online view.
        """

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Called once before training, and before a checkpoint is loaded: the place for state whose
        size depends on the data (``super().prepare(...)`` first)."""
        self.plan, self.optim, self.seed = plan, optim, seed

    def after_step(self, step: int) -> None:
        """Called once after real optimiser step ``step`` (from 0): EMA, queue."""

    def after_skipped_step(self, step: int) -> None:
        """Called instead where an fp16 overflow made the scaler skip step ``step``: drop what waits for
        :meth:`after_step`. Weights, buffers and tables are as before the step."""

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Named representations of a plain view, each (N, F); ``backbone`` is always there."""
        return {"backbone": self.backbone(x)}

    def contrasted(self, batch: Batch) -> Contrast:
        """What the loss compares in ``batch``, for analyses; see :meth:`Contrast.of_views`.

        Called inside :meth:`untouched`: it may change nothing but buffers and random numbers.
        """
        raise ValueError(f"{self.cfg.name} does not say what it compares: give it a method contrasted(batch)")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of ``(name, parameter)`` pairs under ``named``; ``lr_factor`` scales a group's rate."""
        return [{"named": [(n, p) for n, p in self.named_parameters() if p.requires_grad]}]

    # -- what a method calls ------------------------------------------------------------------

    def publish(self, **features: Tensor) -> None:
        """Show this step's features (N, F) to probes, detached: ``publish(backbone=h)``."""
        self.published = {name: value.detach() for name, value in features.items()}

    def record(self, name: str, value: Tensor) -> None:
        """Log a measurement of this step, a scalar, under ``name`` (``method/...``): its mean over an interval is
        reported. Summed on the device, never waited for."""
        if not isinstance(
            value, Tensor
        ):  # only then is the value spelt out, which on a device would wait for it
            raise ValueError(
                f"record takes a tensor, got {name} = {value!r}; a number that is set and not measured goes to setting"
            )
        self.recorded[name] = value.detach()

    def setting(self, name: str, value: float) -> None:
        """Log a setting of this step, such as a momentum, under ``name`` (``method/...``): its last value is
        reported."""
        require(
            not isinstance(value, Tensor),
            f"setting takes a number, got a tensor for {name}; what is measured goes to record",
        )
        self.settings[name] = value

    @property
    def step(self) -> int:
        """The optimiser step in progress, from 0. Schedules are functions of it."""
        return self.optimizer_steps

    @property
    def epoch(self) -> int:
        """The epoch in progress, from 0; derived from the step, so right after a resume."""
        return self.optimizer_steps // self.plan.steps_per_epoch

    # -- the framework's ----------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Backbone features (N, feature_dim): what k-NN and export see."""
        return self.backbone(x)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Nothing inside needs gradients; afterwards buffers and random numbers are what they were."""
        saved = [(buffer, buffer.detach().clone()) for buffer in self.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            try:
                yield
            finally:
                for buffer, value in saved:
                    buffer.copy_(value)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch under automatic optimisation."""
        loss = self.loss(batch)
        self.record("train/loss", loss)
        return loss

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Publish the features of a plain view; callbacks read them."""
        self.publish(**self.features(batch.image))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser over :meth:`parameter_groups`; the rate is set at every step."""
        return build_optimizer(self.parameter_groups(), self.optim)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Set the learning rate of this step, step, then :meth:`after_step`.

        EMA and queue live here and not in a batch-end hook, which runs after a checkpoint may have
        been written.
        """
        lr = learning_rate(self.optimizer_steps, self.optim, self.plan)
        set_learning_rate(optimizer, lr)
        self.setting("opt/lr", lr)
        happened = self.attempt(
            lambda: super(SSLMethod, self).optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        )
        self.finish_step(skipped=not happened)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keep the way back, from a step's first micro-batch on, where a scaler may skip the step."""
        if self._undo is None and self._scaler is not None:
            self._undo = Undo(self)

    def attempt(self, step: Callable[[], Any]) -> bool:
        """Call ``step``, the optimiser's; whether it happened, the same on all ranks. Methods that own their loop
        call it, and then :meth:`finish_step`."""
        before = self._loss_scale()
        step()
        scale = self._loss_scale()
        if scale < SMALLEST_SCALE:
            raise Diverged(f"fp16 overflows at any loss scale, even {scale:g}, by step {self.step}")
        return scale >= before  # an overflowing step is skipped by the scaler, which then lowers its scale

    def finish_step(self, *, skipped: bool = False) -> None:
        """Count a real optimiser step and run :meth:`after_step`; take back all of a ``skipped`` one. Methods that
        own their loop call it."""
        self.step_skipped = skipped
        if skipped and self._undo is not None:
            self._undo.take_back()
        if self._undo is not None:
            self._undo.close()
            self._undo = None
        if skipped:
            self.after_skipped_step(self.optimizer_steps)
        else:
            self.after_step(self.optimizer_steps)
        self.optimizer_steps += 1

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _loss_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step count: Lightning's own counts every ``optimizer.step()`` of manual methods. And say what
        is not weights."""
        checkpoint["optimizer_steps"] = self.optimizer_steps
        checkpoint["per_sample"] = list(tables_of(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step count."""
        self.optimizer_steps = checkpoint["optimizer_steps"]
