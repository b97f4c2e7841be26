"""Runs that are killed: a training in processes of its own, faults at chosen or random moments, and the
digest of everything it carries at the end.

``run(job, folder, faults=[...])`` starts the job, lets the first fault end it, resumes it, and so on, until
it finishes undisturbed. Its outcome must equal that of ``run(job, folder)``, bit by bit. A job is the tiny
method below, or a bundled recipe with overrides on generated images.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.data.sources import FakeSource
from sslzoo.method import SSLMethod
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.queue import FeatureQueue
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.sections import (
    AdamConfig,
    BackboneConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    MethodConfig,
    ProbeConfig,
    Recipe,
    ViewConfig,
)
from sslzoo.run.build import build_run
from sslzoo.run.directory import Run
from sslzoo.run.placement import place
from tests.ranks import free_port

LIMIT = 30.0  # seconds; no run here takes a third of it


# -- the tiny method: everything that a resume can lose ------------------------------------------


class TinyConfig(MethodConfig):
    """Nothing to set."""


class Tiny(SSLMethod[TinyConfig]):
    """An MLP with batch norm and dropout, an EMA copy, a queue, and one scalar of its own."""

    Config = TinyConfig

    def __init__(self, cfg: TinyConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.head = nn.Sequential(nn.Linear(feature_dim, 8), nn.Dropout(0.2))
        self.target = MomentumEncoder(self.backbone, self.head)
        self.queue = FeatureQueue(40, 8)
        self.keys: Tensor | None = None

    def loss(self, batch: Batch) -> Tensor:
        """InfoNCE against the queue."""
        from sslzoo.distributed import gather_detached

        first, second = batch.global_views
        h = self.backbone(first)
        self.publish(backbone=h)
        online = F.normalize(self.head(h), dim=1)
        keys = F.normalize(self.target(second), dim=1)
        self.keys = gather_detached(keys)
        positive = (online * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, online @ self.queue.features.clone().T], dim=1) / 0.2
        self.record("method/positive", positive.mean())
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    def after_step(self, step: int) -> None:
        """EMA, and the last micro-batch's keys."""
        assert self.keys is not None
        self.target.update(self.backbone, self.head, coefficient=0.9)
        self.queue.push(self.keys)


class TinyBackbone(nn.Sequential):
    """A layer on images of 8 px."""

    num_features = 16

    def __init__(self, in_channels: int) -> None:
        width = self.num_features
        super().__init__(nn.Flatten(), nn.Linear(in_channels * 64, width), nn.BatchNorm1d(width), nn.ReLU())


# -- a job ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on how many processes."""

    recipe: str = ""  # a bundled one; the tiny method otherwise
    overrides: tuple[str, ...] = ()
    world: int = 1
    accumulate: int = 1
    epochs: int = 3
    samples: int = 100
    batch: int = 16
    pause: float = 0.0  # seconds added to each micro-batch, so that a signal can hit the middle


@dataclass(frozen=True)
class Fault:
    """The end of a process by its own hand: SIGKILL where ``where`` says."""

    where: str  # batch (its end), start (of a batch), validation, epoch_end or write
    at: int  # micro-batches finished; for write, the number of the save from 1 on in that session


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves."""

    digest: dict[str, str]  # per part of the last checkpoint
    metrics: str  # metrics.csv
    sessions: int = 1
    codes: list[list[int | None]] = field(default_factory=list)


def _recipe(job: Job) -> Recipe:
    trainer: dict[str, Any] = {"max_epochs": job.epochs, "accelerator": "cpu", "devices": job.world}
    trainer["accumulate_grad_batches"] = job.accumulate
    if job.recipe:
        changes = [f"trainer.{key}={value}" for key, value in trainer.items()]
        batch = f"data.global_batch_size={job.batch}"
        return load_recipe(job.recipe, [*changes, batch, *job.overrides]).recipe
    return Recipe(
        seed=3,
        backbone=BackboneConfig(name="tests.chaos:TinyBackbone", in_channels=1),
        method=TinyConfig(name="tests.chaos:Tiny"),
        data=DataConfig(dataset="fake", global_batch_size=job.batch, mean=(0.5,), std=(0.25,)),
        views=(ViewConfig(size=8, scale=(0.3, 1.0), count=2, flip_p=0.5),),
        optim=AdamConfig(name="adamw", lr=0.01, lr_scaling="none", weight_decay=0.01, warmup_epochs=1),
        probe=ProbeConfig(lrs=(0.1, 1.0)),
        eval=EvalConfig(every_epochs=1, size=8, knn_k=5, knn_temperature=0.1, batch_size=32),
        logging=LoggingConfig(every_steps=4, checkpoint_every_steps=3, keep_epochs=(2,)),
        trainer=trainer,
        name="tiny",
    )


def fit(job: Job, folder: Path, fault: Fault | None) -> None:
    """Train in this process, one of ``job.world``, from the last checkpoint in ``folder``."""
    recipe = _recipe(job)
    source = FakeSource(job.samples, recipe.backbone.in_channels, recipe.eval.size, 4)
    built = build_run(recipe, Run(folder, "chaos"), source=source, placement=place())
    built.trainer.callbacks.append(_Disturbance(fault, job.pause))  # type: ignore[attr-defined]
    built.trainer.fit(built.method, datamodule=built.data, ckpt_path=latest(built.run.checkpoints))


class _Disturbance(Callback):
    """Kills this process at the fault's moment."""

    def __init__(self, fault: Fault | None, pause: float) -> None:
        self.fault, self.pause = fault, pause

    def _at(self, where: str, trainer: Any) -> None:
        if self.fault == Fault(where, trainer.datamodule.position):
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.fault is not None and self.fault.where == "write":
            _die_while_writing(self.fault.at)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._at("start", trainer)
        time.sleep(self.pause)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at("batch", trainer)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._at("validation", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._at("epoch_end", trainer)


def _die_while_writing(number: int) -> None:
    """The ``number``-th ``torch.save`` of this process writes half the file, and the process dies."""
    save, count = torch.save, 0

    def dying(value: Any, file: Any) -> None:
        nonlocal count
        count += 1
        save(value, file)
        if count == number:
            file.flush()
            os.truncate(file.name, file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


# -- processes --------------------------------------------------------------------------------


def _entry(job: Job, folder: Path, fault: Fault | None, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    vars(rank_zero_only)["rank"] = rank  # set when lightning was imported, before the fork
    output = (folder / f"rank{rank}.txt").open("a", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stderr = sys.stdout = output
    torch.set_num_threads(1)
    fit(job, folder, fault)


def start(job: Job, folder: Path, fault: Fault | None = None) -> list[Any]:
    """The job's processes, started. Forked after the imports: a run then takes less than a second."""
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [context.Process(target=_entry, args=(job, folder, fault, r, port)) for r in range(job.world)]
    for process in ranks:
        process.start()
    return ranks


def wait(ranks: Sequence[Any], limit: float = LIMIT) -> list[int | None]:
    """Exit codes; a process that is alive after ``limit`` seconds is killed and has None.

    When one was killed, the others are too, as a launcher does.
    """
    end = time.monotonic() + limit
    while any(p.exitcode is None for p in ranks) and time.monotonic() < end:
        if any(p.exitcode == -signal.SIGKILL for p in ranks):
            for p in ranks:
                p.kill()
        time.sleep(0.01)
    codes = [p.exitcode for p in ranks]
    for p in ranks:
        p.kill()
        p.join()
    return codes


def run(
    job: Job, folder: Path, faults: Sequence[Fault] = (), *, random_kills: int = 0, seed: int = 0
) -> Outcome:
    """Train to the end through all ``faults`` and then ``random_kills`` SIGKILLs at random moments."""
    codes: list[list[int | None]] = []
    for fault in faults:
        codes.append(wait(start(job, folder, fault)))
        assert -signal.SIGKILL in codes[-1], f"{fault} did not happen: {codes[-1]}\n{output(folder)}"
    draw = random.Random(seed)
    for _ in range(random_kills):
        ranks = start(job, folder)
        time.sleep(draw.uniform(0.1, 0.9))
        for p in ranks:
            p.kill()
        codes.append(wait(ranks))
    codes.append(wait(start(job, folder)))
    assert codes[-1] == [0] * job.world, f"{codes[-1]}\n{output(folder)}"
    return Outcome(digest_of(folder), (folder / "metrics.csv").read_text(), len(codes), codes)


def output(folder: Path) -> str:
    """What the processes printed."""
    return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("rank*.txt")))


# -- digests ----------------------------------------------------------------------------------


def digest_of(folder: Path) -> dict[str, str]:
    """A hash of each part of the last checkpoint, except Lightning's own bookkeeping."""
    path = latest(folder / "checkpoints")
    assert path is not None, f"no checkpoint in {folder}\n{output(folder)}"
    content = load_checkpoint(path)
    return {"file": path.name} | {key: digest(part) for key, part in content.items() if key != "loops"}


def digest(value: Any) -> str:
    """SHA-256 of tensors' bits and of plain values, with their types and places."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    state.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            state.update(str(key).encode())
            _feed(state, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())
