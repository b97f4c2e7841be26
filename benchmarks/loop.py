"""Overhead per step of progress, metrics, checkpoint bookkeeping and probe, compared with a bare PyTorch loop.

    python benchmarks/loop.py

The variants run in turn; medians of CPU milliseconds per step, one thread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from measure import Result, keep_freed_memory, report
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sslzoo.batch import Batch
from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.online_probe import OnlineProbe
from sslzoo.callbacks.preemption import Preemption
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.data.module import EvalSet
from sslzoo.method import SSLMethod
from sslzoo.optim.optimizers import build_optimizer, set_learning_rate
from sslzoo.optim.schedules import learning_rate
from sslzoo.processes.departure import Departure
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import AdamConfig, MethodConfig, ProbeConfig
from sslzoo.run.trainer import build_trainer

BATCH, WIDTH, CLASSES = 64, 32, 10
OPTIM = AdamConfig(name="adamw", lr=1e-3, lr_scaling="none", weight_decay=1e-4, warmup_epochs=0)


def backbone() -> nn.Module:
    """A small network, the same for all variants."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))


def loss_of(h: Tensor, other: Tensor) -> Tensor:
    """A one-sided NT-Xent loss."""
    logits = F.normalize(h, dim=1) @ F.normalize(other, dim=1).T / 0.2
    return F.cross_entropy(logits, torch.arange(len(h)))


class Bench(SSLMethod[MethodConfig]):
    """The computation of the bare loop as a method that records four values."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch."""
        first, second = (self.backbone(view) for view in batch.global_views)
        self.publish(backbone=first)
        loss = loss_of(first, second)
        for name in ("a", "b", "c"):
            self.record(f"method/{name}", loss)
        return loss


class Data(LightningDataModule):
    """Yields the same batch at every step, at no cost."""

    waited = 0.0

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.position = steps, 0

    def eval_sets(self) -> list[EvalSet]:
        """Nothing is evaluated."""
        return []

    def train_dataloader(self) -> DataLoader[Any]:
        """A loader over references to one batch."""
        return DataLoader([batch()] * self.steps, batch_size=None)  # type: ignore[arg-type]


def batch() -> Batch:
    """Random input and labels."""
    torch.manual_seed(1)
    views = (torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH))
    return Batch(views, (), torch.arange(BATCH), torch.arange(BATCH) % CLASSES)


class Stopwatch(Callback):
    """CPU time of the training steps after a warm-up, without start-up and teardown."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count, self.begun, self.ms = steps, 0, 0.0, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """Start the clock after a tenth of the steps and stop it at the last."""
        self.count += 1
        warm = self.steps // 10
        if self.count == warm:
            self.begun = time.process_time()
        elif self.count == self.steps:
            self.ms = (time.process_time() - self.begun) * 1e3 / (self.steps - warm)


def bare(steps: int) -> float:
    """CPU ms per step of a hand-written loop."""
    net, plan = backbone(), plan_of(steps)
    optimizer: Any = build_optimizer([{"named": list(net.named_parameters())}], OPTIM, fused=True)
    one, warm, begun = batch(), steps // 10, 0.0
    for step in range(steps):
        if step == warm:
            begun = time.process_time()
        set_learning_rate(optimizer, learning_rate(step, OPTIM, plan))
        loss = loss_of(net(one.global_views[0]), net(one.global_views[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - begun) * 1e3 / (steps - warm)


def plan_of(steps: int) -> TrainingPlan:
    """A plan of one epoch with ``steps`` steps."""
    return TrainingPlan(dataset_size=BATCH * steps, global_batch_size=BATCH, max_epochs=1)


def framework(steps: int, *, companions: bool, probe: bool) -> float:
    """CPU ms per step under the Trainer, with or without our callbacks and the probe."""
    method = Bench(MethodConfig(name="bench"), backbone(), WIDTH)
    method.prepare(plan_of(steps), OPTIM, seed=0)
    watch = Stopwatch(steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        callbacks: list[Callback] = []
        if companions:
            checkpoint = ExactCheckpoint(
                folder / "checkpoints", recipe="", every_steps=10 * steps, evaluate_every_epochs=1
            )
            callbacks = [
                StepSeeding(),
                BroadcastBatchNormStats(),
                checkpoint,
                Preemption(checkpoint, Departure()),
            ]
            if probe:
                callbacks.append(OnlineProbe(ProbeConfig(lrs=(0.1, 0.3, 1.0)), classes=CLASSES, seed=0))
            callbacks += [Meter(folder, every_steps=50), ProgressDisplay()]
        trainer = build_trainer(
            {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0},
            run_dir=folder,
            callbacks=[*callbacks, watch],
        )
        trainer.fit(method, datamodule=Data(steps))
    return watch.ms


def measure(rounds: int = 5, steps: int = 400) -> list[Result]:
    """Milliseconds per step in addition to those of the bare loop."""
    torch.set_num_threads(1)
    variants = {
        "bare": lambda: bare(steps),
        "Lightning, nothing on": lambda: framework(steps, companions=False, probe=False),
        "metrics, progress, checkpoint, signals": lambda: framework(steps, companions=True, probe=False),
        "the same and a probe of three rates": lambda: framework(steps, companions=True, probe=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    keep_freed_memory()
    for k in range(rounds + 1):
        for name, run in variants.items():
            ms = run()
            if k:  # the first round warms up
                times[name].append(ms)
    bounds = {"the same and a probe of three rates": 1.3}
    return [
        Result(
            work=f"loop: {name}",
            baseline="bare loop",
            value=statistics.median(a - b for a, b in zip(values, times["bare"], strict=True)),
            unit="ms a step more",
            at_most=bounds.get(name),
        )
        for name, values in times.items()
        if name != "bare"
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
