"""``SSLMethod``, the base class of every method: a config, a backbone with heads, and a loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast, EvalBatch
from sslzoo.checks import require
from sslzoo.exits import Diverged
from sslzoo.nn.compiling import compiled_losses
from sslzoo.nn.per_sample import tables_of
from sslzoo.nn.undo import Undo
from sslzoo.optim.optimizers import build_optimizer, set_learning_rate
from sslzoo.optim.schedules import learning_rate
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Compiler, MethodConfig, OptimConfig

ConfigT = TypeVar("ConfigT", bound=MethodConfig)
SMALLEST_SCALE = (
    2.0**-14
)  # fp16 loss scale below which a run gives up; it starts at 2**16 and halves on overflow


class SSLMethod(LightningModule, Generic[ConfigT]):
    """Base class of self-supervised methods.

    A subclass sets ``Config``, builds heads and state in ``__init__`` and implements :meth:`loss`.
    It may override :meth:`prepare` (state whose size depends on the data, such as a
    :class:`~sslzoo.nn.per_sample.PerSampleTable`), :meth:`after_step` (EMA, queue) together with
    :meth:`after_skipped_step`, :meth:`features` (more layers for probes) and :meth:`contrasted` (pairs for
    analyses). Everything else belongs to the framework.
    """

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, cfg: ConfigT, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.plan: TrainingPlan
        self.optim: OptimConfig
        self.seed: int
        self.optimizer_steps = 0  # finished optimiser steps, including skipped ones; saved in checkpoints
        self.step_skipped = False  # whether the last step was skipped
        self.compiler: Compiler | None = None  # of the recipe's speed.compile
        self._undo: Undo | None = None  # set during a step that the scaler may skip
        # Synchronised batch norms ask for it: torch's fused ones have no second derivatives.
        self.needs_double_backward = cfg.needs_double_backward
        self.published: dict[str, Tensor] = {}  # detached features of this step
        self.recorded: dict[str, Tensor] = {}  # measurements of this step, read by Meter
        self.settings: dict[str, float] = {}  # settings of this step, read by Meter

    # -- what a method implements -------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Scalar pre-training loss of this rank's samples; its mean over ranks is the global loss.

        Must call :meth:`publish` once with the backbone features (N, F) of one online view.
        """

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Called once before training and before a checkpoint is loaded. Create state whose size depends
        on the data here, after ``super().prepare(...)``."""
        self.plan, self.optim, self.seed = plan, optim, seed

    def after_step(self, step: int) -> None:
        """Called once after optimiser step ``step`` (from 0); update EMA weights and queues here."""

    def after_skipped_step(self, step: int) -> None:
        """Called instead of :meth:`after_step` if the fp16 scaler skipped step ``step``: drop anything kept for
        :meth:`after_step`. Weights, buffers and tables are already as before the step."""

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Named features of a plain view ``x`` (N, C, H, W), each (N, F); must include ``backbone``. Those called
        ``projector`` are measured as what the loss sees (docs/representation.md), and tell of a collapse first."""
        return {"backbone": self.backbone(x)}

    def contrasted(self, batch: Batch) -> Contrast:
        """Anchors, positives and temperature of the loss on ``batch``, for analyses; see :meth:`Contrast.of_views`.

        Called inside :meth:`untouched`, which restores buffers and random state; nothing else may change.
        """
        raise ValueError(
            f"{self.cfg.name} has no pairs to analyse: implement {type(self).__name__}.contrasted"
        )

    def depends_on_processes(self) -> str:
        """Why a step's numbers depend on how its images are divided among processes; empty if they do not.

        Decides whether a run may continue with another number of processes. A sentence such as ``"method.gather=false
        contrasts the images of one process"``. Batch norm and random numbers are checked by the framework.
        """
        return f"{type(self).__name__} does not say that it can: override depends_on_processes"

    def depends_on_micro_batches(self) -> str:
        """Why a step's numbers depend on how its images are divided into micro-batches; empty if they do not, because
        the loss is a mean of terms with one image each. Like :meth:`depends_on_processes`, for
        ``trainer.accumulate_grad_batches``."""
        return f"{type(self).__name__} does not say that it can: override depends_on_micro_batches"

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser: each has a list of ``(name, parameter)`` under ``named``, and
        optionally ``lr_factor``, which scales its learning rate."""
        return [{"named": [(n, p) for n, p in self.named_parameters() if p.requires_grad]}]

    # -- what a method calls ------------------------------------------------------------------

    def publish(self, **features: Tensor) -> None:
        """Give this step's features (N, F) to the probes, detached: ``publish(backbone=h)``."""
        self.published = {name: value.detach() for name, value in features.items()}

    def record(self, name: str, value: Tensor) -> None:
        """Log a measured scalar tensor under ``name`` (``method/...``); its mean over the logging interval is
        reported. It is summed on the device, without a host-device synchronisation.

        For a ratio or a standard deviation, which must not depend on how images are divided among processes, ``value``
        is what :func:`~sslzoo.nn.measurements.ratio` or :func:`~sslzoo.nn.measurements.moments` return."""
        if not isinstance(value, Tensor):  # formatting a tensor on a GPU would synchronise
            raise ValueError(
                f"record takes a tensor, got {name} = {value!r}; use setting for numbers that are not measured"
            )
        shape = tuple(value.shape)
        require(
            shape == () or (shape[0] == 2 and len(shape) <= 2),
            f"record takes a scalar, got {name} of shape {shape}; record its mean",
        )
        self.recorded[name] = value.detach()

    def setting(self, name: str, value: float) -> None:
        """Log a setting of this step, such as a momentum, under ``name`` (``method/...``); the last value of the
        logging interval is reported."""
        require(
            not isinstance(value, Tensor),
            f"setting takes a number, got a tensor for {name}; use record for measurements",
        )
        self.settings[name] = value

    @property
    def step(self) -> int:
        """The current optimiser step, from 0. Schedules are functions of it."""
        return self.optimizer_steps

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; derived from the step, so it is correct after a resume."""
        return self.optimizer_steps // self.plan.steps_per_epoch

    # -- the framework's ----------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Backbone features (N, feature_dim) of ``x`` (N, C, H, W), as k-NN and export use them."""
        return self.backbone(x)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Context without gradients that restores buffers and random state on exit."""
        saved = [(buffer, buffer.detach().clone()) for buffer in self.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            try:
                yield
            finally:
                for buffer, value in saved:
                    buffer.copy_(value)

    def step_loss(self, batch: Batch) -> Tensor:
        """:meth:`loss`, compiled if the recipe says so."""
        with compiled_losses(self.compiler):
            return self.loss(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch under automatic optimisation."""
        loss = self.step_loss(batch)
        self.record("train/loss", loss)
        return loss

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Publish the features of a plain view; callbacks read them."""
        self.publish(**self.features(batch.image))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser over :meth:`parameter_groups`; the learning rate is set at every step."""
        return self.build_optimizer()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimiser over :meth:`parameter_groups`, for methods with optimisers of their own too."""
        return build_optimizer(self.parameter_groups(), self.optim, fused=self._may_fuse())

    def _may_fuse(self) -> bool:
        """Whether Adam's fused kernels fit. They unscale gradients themselves, which the loss scaler must do, and
        Lightning refuses to clip gradients with them under mixed precision."""
        if self._trainer is None:
            return True
        clipped = bool(self.trainer.gradient_clip_val)
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self._scaler is None and not (mixed and clipped)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Set the learning rate, take the optimiser step, then call :meth:`after_step`.

        EMA and queue are updated here because a batch-end hook may run after a checkpoint was written.
        """
        lr = learning_rate(self.optimizer_steps, self.optim, self.plan)
        set_learning_rate(optimizer, lr)
        self.setting("opt/lr", lr)
        happened = self.attempt(
            lambda: super(SSLMethod, self).optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        )
        self.finish_step(skipped=not happened)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Save the state at the first micro-batch of a step if a loss scaler may skip the step."""
        if self._undo is None and self._scaler is not None:
            self._undo = Undo(self)

    def attempt(self, step: Callable[[], Any]) -> bool:
        """Call the optimiser's ``step``; returns whether it was taken, equal on all ranks.

        Methods with manual optimisation call this, then :meth:`finish_step`. Raises ``Diverged`` if fp16 overflows even
        at a loss scale below ``SMALLEST_SCALE``.
        """
        scaler = self._scaler
        if scaler is None:
            step()
            return True
        # On overflow the scaler does not call the optimiser, and lowers its scale, which is on the device: reading it
        # at every step would make the host wait.
        taken: list[bool] = []
        hooks = [
            optimizer.register_step_post_hook(lambda *_: taken.append(True))
            for optimizer in self.trainer.optimizers
        ]
        try:
            step()
        finally:
            for hook in hooks:
                hook.remove()
        if not taken and (scale := float(scaler.get_scale())) < SMALLEST_SCALE:
            raise Diverged(f"fp16 overflows at any loss scale, even {scale:g}, by step {self.step}")
        return bool(taken)

    def finish_step(self, *, skipped: bool = False) -> None:
        """Count an optimiser step and call :meth:`after_step`; if it was ``skipped``, undo all its changes instead.
        Methods with manual optimisation call this."""
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step count (Lightning's counts every ``optimizer.step()`` under manual optimisation) and the names
        of the per-sample tables."""
        checkpoint["optimizer_steps"] = self.optimizer_steps
        checkpoint["per_sample"] = list(tables_of(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step count."""
        self.optimizer_steps = checkpoint["optimizer_steps"]
        # Lightning does it after loading, which would round float64 weights to float32.
        self.trainer.precision_plugin.convert_module(self)
