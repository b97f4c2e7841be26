"""Kill and resume trainings: separate processes, kills at chosen or random moments, and digests of the final
state.

``run(job, folder, faults=[...])`` starts the job, lets the first fault kill it, resumes it, and so on, until
it finishes undisturbed. The outcome must equal that of ``run(job, folder)`` bit by bit.
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
from lightning.pytorch import Callback
from torch import Tensor

from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.data.sources import FakeSource
from sslzoo.processes.placement import place
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.run.build import build_run
from sslzoo.testing.ranks import free_port

LIMIT = 60.0  # seconds, more than three times as long as any run here takes


class Failed(RuntimeError):
    """A session did not end as expected; the message has the output of its processes."""

    def __init__(self, what: str, folder: Path) -> None:
        printed = output(folder)
        super().__init__(f"{what}\n{printed}")
        self.reason = f"{what}: {(printed.splitlines() or ['no output'])[-1]}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training on generated images, with ``trainer.devices`` processes on this machine."""

    recipe: Recipe
    samples: int
    classes: int = 4
    pause: float = 0.0  # seconds added to each micro-batch, so that a signal can arrive during the run

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.recipe.devices or 1


@dataclass(frozen=True)
class Fault:
    """The moment at which a process kills itself with SIGKILL."""

    where: str  # batch (at its end), start (of a batch), validation, epoch_end or write
    at: int  # finished micro-batches; for write, the number of the save in that session, from 1


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run."""

    digest: dict[str, str]  # hash of each part of the last checkpoint
    metrics: str  # content of metrics.csv
    sessions: int = 1
    codes: list[list[int | None]] = field(default_factory=list)


def fit(job: Job, folder: Path, fault: Fault | None) -> None:
    """Train in this process, one of ``job.world``, starting from the last checkpoint in ``folder``."""
    recipe = job.recipe
    source = FakeSource(job.samples, recipe.backbone.in_channels, recipe.eval.size, job.classes)
    built = build_run(recipe, Run(folder, "killed"), source=source, placement=place())
    built.trainer.callbacks.append(_Disturbance(fault, job.pause))  # type: ignore[attr-defined]
    built.trainer.fit(built.method, datamodule=built.data, ckpt_path=latest(built.run.checkpoints))


class _Disturbance(Callback):
    """Kills this process at the moment given by the fault."""

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
    """Make the ``number``-th ``torch.save`` of this process write half the file and kill the process."""
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
    """Start the job's processes. They are forked after the imports, so that a run takes less than a second."""
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [context.Process(target=_entry, args=(job, folder, fault, r, port)) for r in range(job.world)]
    for process in ranks:
        process.start()
    return ranks


def wait(ranks: Sequence[Any], limit: float = LIMIT) -> list[int | None]:
    """Wait and return the exit codes; None for a process that is still alive after ``limit`` seconds, which is killed.

    When one process was killed, the others are killed too, as a launcher would do.
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
    """Train to the end, with all ``faults`` and then ``random_kills`` SIGKILLs at random moments in between.

    Raises :class:`Failed` if a fault does not happen or the last session fails.
    """
    codes: list[list[int | None]] = []
    for fault in faults:
        codes.append(wait(start(job, folder, fault)))
        if -signal.SIGKILL not in codes[-1]:
            raise Failed(f"{fault} did not happen: exit codes {codes[-1]}", folder)
    draw = random.Random(seed)
    for _ in range(random_kills):
        ranks = start(job, folder)
        time.sleep(draw.uniform(0.1, 0.9))
        for p in ranks:
            p.kill()
        codes.append(wait(ranks))
    return finish(job, folder, start(job, folder), codes)


def finish(job: Job, folder: Path, ranks: Sequence[Any], codes: Sequence[list[int | None]] = ()) -> Outcome:
    """Wait for the last session, of the processes ``ranks``. ``codes`` are the exit codes of earlier sessions."""
    last = wait(ranks)
    if last != [0] * job.world:
        raise Failed(f"the last session ended with exit codes {last}", folder)
    every = [*codes, last]
    return Outcome(digest_of(folder), (folder / "metrics.csv").read_text(), len(every), every)


def output(folder: Path) -> str:
    """The output of the processes."""
    return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("rank*.txt")))


# -- digests ----------------------------------------------------------------------------------


# In a checkpoint: Lightning's counts of its loops, and what describes the start: its recipe, which names machines and
# devices, its times and commands.
OF_THE_START = ("loops", "recipe", "manifest")


def digest_of(folder: Path) -> dict[str, str]:
    """A hash of each part of the last checkpoint, with one per tensor of the method, except what differs between
    starts."""
    path = latest(folder / "checkpoints")
    if path is None:
        raise Failed(f"no checkpoint in {folder}", folder)
    content = load_checkpoint(path)
    parts = {**content.pop("state_dict"), **content}
    return {"file": path.name} | {key: digest(part) for key, part in parts.items() if key not in OF_THE_START}


def digest(value: Any) -> str:
    """SHA-256 (16 digits) of nested tensors and plain values, including types and order."""
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
