"""What a user does: ``sslzoo`` as a process of its own, with its exit code, its screen and its files.

``shell(...)`` starts a real one, as typed. ``fork(...)`` does the same with an interpreter that has imported
everything, in a tenth of the time: it is a process with its own exit code, streams and signals too. ``group(...)``
starts several of these as torchrun or srun would. Faults are those of a method: a plug-in that is slow, fails, or
returns what is not finite, where the variable ``FAULTS`` says so.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.distributed import gather_detached, rank
from sslzoo.method import SSLMethod
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import MethodConfig, OptimConfig
from sslzoo.testing.ranks import free_port

ROOT = Path(__file__).parents[1]
LIMIT = 60.0  # seconds; no run here takes a third of it, unless something hangs

# -- a small data set, a small recipe, a method with faults ----------------------------------------


def write_images(folder: Path, *, train: int = 96, test: int = 40, seed: int = 0) -> Path:
    """Fashion-MNIST's layout with images of 12 px."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", train), ("t10k", test)):
        images = draw.integers(0, 255, (n, 12, 12), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        head = struct.pack(">IIII", 0x803, n, 12, 12)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())
    return folder


RECIPE = """\
seed: 3
backbone: {name: conv5, in_channels: 1}
method: {name: "tests.command:Faulty"}
data: {dataset: fashion_mnist, root: ROOT, global_batch_size: 16, mean: [0.5], std: [0.25]}
views: [{size: 12, scale: [0.3, 1.0], count: 2, flip_p: 0.5}]
optim: {name: adamw, lr: 0.01, lr_scaling: none, weight_decay: 0.01, warmup_epochs: 1}
probe: {online: true, lrs: [0.1, 1.0]}
eval: {every_epochs: 1, size: 12, knn_k: 5, knn_temperature: 0.1, batch_size: 32}
logging: {every_steps: 4, checkpoint_every_steps: 2}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1}
"""
STEPS = 6  # an epoch of it


def write_recipe(folder: Path) -> Path:
    """``tiny.yaml`` in ``folder``, and its images beside it."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(write_images(folder / "images"))))
    return path


class Faulty(SSLMethod[MethodConfig]):
    """A line between two views, with dropout, and a count of each image's visits.

    The faults that ``FAULTS`` (JSON) names happen to it:

    ``pause`` and ``evaluation_pause``, seconds a forward pass; ``nan_at``, ``memory_at``, a step; ``raise_at``, a
    rank and a step; ``raise_once_at``, the same until torchrun restarts the ranks; ``raise_in_evaluation``,
    ``hang_in_evaluation``, a rank; ``memory_in_evaluation``; ``publishes``, another name than its config's;
    ``saves_code``, in its checkpoints.
    """

    Config = MethodConfig

    def __init__(self, cfg: MethodConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.head = nn.Sequential(nn.Linear(feature_dim, 8), nn.Dropout(0.2))
        self.faults: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
        backbone.register_forward_hook(self._on_evaluation)

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        """Nobody was seen yet."""
        super().prepare(plan, optim, seed)
        self.visits = PerSampleTable(count=torch.zeros(plan.dataset_size))

    def _on_evaluation(self, module: nn.Module, *_: Any) -> None:
        if not module.training:
            time.sleep(self.faults.get("evaluation_pause", 0.0))
            if self.faults.get("memory_in_evaluation"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if self.faults.get("hang_in_evaluation") == rank():
                time.sleep(1000)
            if self.faults.get("raise_in_evaluation") == rank():
                raise RuntimeError("this rank cannot evaluate")

    def loss(self, batch: Batch) -> Tensor:
        """Cosine distance of the two views, and the faults."""
        time.sleep(self.faults.get("pause", 0.0))
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if [rank(), self.step] in (
            self.faults.get("raise_at"),
            None if restarted else self.faults.get("raise_once_at"),
        ):
            raise RuntimeError("this rank cannot train")
        if self.faults.get("memory_at") == self.step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        h = self.backbone(batch.global_views[0])
        self.publish(**{self.faults.get("publishes", "backbone"): h})
        z = [F.normalize(self.head(x), dim=1) for x in (h, self.backbone(batch.global_views[1]))]
        loss = 1 - (z[0] * z[1]).sum(1).mean()
        ids = gather_detached(batch.sample_id)
        self.visits.write(ids, count=self.visits.read("count", ids) + 1)
        return loss * float("nan") if self.faults.get("nan_at") == self.step else loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The framework's, and the fault."""
        super().on_save_checkpoint(checkpoint)
        if self.faults.get("saves_code"):
            checkpoint["faulty"] = Fraction(1, 3)


# -- processes --------------------------------------------------------------------------------------


@dataclass
class Command:
    """A process that was started; its streams go to files."""

    folder: Path
    name: str
    process: Any  # subprocess.Popen or multiprocessing.Process

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    @property
    def out(self) -> str:
        """What it has printed to stdout."""
        return (self.folder / f"{self.name}.out").read_text()

    @property
    def err(self) -> str:
        """What it has printed to stderr."""
        return (self.folder / f"{self.name}.err").read_text()

    @property
    def last(self) -> str:
        """The last line of stderr, or of stdout where that is empty."""
        return ([*self.out.splitlines(), *self.err.splitlines()] or [""])[-1]

    @property
    def ended(self) -> bool:
        """Whether it has."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is not None
        return self.process.exitcode is not None

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code; a process that is alive after ``limit`` seconds is killed and fails the test."""
        if not until(lambda: self.ended, limit):
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"hangs after {limit} s\n{self.said}")
        if isinstance(self.process, subprocess.Popen):
            return self.process.returncode
        self.process.join()
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send ``number`` to this process alone."""
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """Both streams, for a failing assertion."""
        return f"--- {self.name} stdout\n{self.out}\n--- {self.name} stderr\n{self.err}"


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started, in that order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Callable[[], Any], limit: float = LIMIT) -> bool:
    """Wait for ``condition``; whether it came within ``limit`` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _environment(faults: dict[str, Any], more: dict[str, str]) -> dict[str, str]:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FAULTS")
    kept = {
        k: v for k, v in os.environ.items() if k not in launched and not k.startswith(("SLURM_", "SSLZOO"))
    }
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "methods", "recipes"))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "FAULTS": json.dumps(faults)} | more


def shell(
    folder: Path,
    *arguments: object,
    faults: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    name: str = "shell",
    prefix: Sequence[str] = (),
    module: str = "sslzoo",
    **options: Any,
) -> Command:
    """``sslzoo ARGUMENTS``, or another ``module``, typed in ``folder``: a process of its own, in a group of its own."""
    command = [*prefix, sys.executable, "-m", module, *map(str, arguments)]
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(faults or {}, environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            **options,
        )
    return Command(folder, name, process)


def fork(
    folder: Path,
    *arguments: object,
    faults: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    name: str = "fork",
    before: Callable[[], None] | None = None,
    delay: float = 0.0,
) -> Command:
    """``sslzoo ARGUMENTS`` typed in ``folder``, by a fork of this interpreter, in which ``before`` runs first,
    and which starts ``delay`` seconds late."""
    for stream in ("out", "err"):
        (folder / f"{name}.{stream}").write_text("")
    process = multiprocessing.get_context("fork").Process(
        target=_entry,
        args=(
            folder,
            name,
            [str(a) for a in arguments],
            _environment(faults or {}, environment or {}),
            before,
            delay,
        ),
    )
    process.start()
    return Command(folder, name, process)


def _entry(
    folder: Path,
    name: str,
    arguments: list[str],
    environment: dict[str, str],
    before: Callable[[], None] | None,
    delay: float,
) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from sslzoo.cli.main import main

    os.setsid()
    os.environ.clear()
    os.environ |= environment
    vars(rank_zero_only)["rank"] = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    os.chdir(folder)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}.{stream}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["sslzoo", *arguments]
    torch.set_num_threads(1)
    # The small data set is a part of Fashion-MNIST, which is right here and would be said in each test's last lines.
    logging.getLogger("sslzoo").addFilter(lambda record: "is not complete" not in record.getMessage())
    time.sleep(delay)
    if before is not None:
        before()
    sys.exit(main(arguments))


def group(
    folder: Path,
    *arguments: object,
    world: int = 2,
    starter: str = "torchrun",
    environment: dict[str, str] | None = None,
    delays: Sequence[float] = (),
    by_rank: Sequence[dict[str, str]] = (),
    **options: Any,
) -> list[Command]:
    """The ranks of a run as ``torchrun`` or ``srun`` starts them on one machine. By rank: seconds that it comes
    late, and variables that it alone has."""
    port = str(free_port())
    ranks = []
    for r in range(world):
        place = (
            torchrun_variables(r, world, port) if starter == "torchrun" else srun_variables(r, world, port)
        )
        ranks.append(
            fork(
                folder,
                *arguments,
                name=f"rank{r}",
                environment=place | (environment or {}) | (by_rank[r] if by_rank else {}),
                delay=delays[r] if delays else 0.0,
                **options,
            )
        )
    return ranks


def torchrun_variables(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def srun_variables(rank: int, world: int, port: str, *, job: str = "4711") -> dict[str, str]:
    """What srun tells a task."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(world),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": port,
    }


def short_evaluation() -> None:
    """The final evaluation with a tenth of its steps, which change nothing in what is tested of a run."""
    from sslzoo.evaluate import logistic, sgd_probe

    sgd_probe.EPOCHS, sgd_probe.STEPS = 2, 20
    logistic.QUICK = logistic.QUICK._replace(iterations=5)


def codes(ranks: Sequence[Command], limit: float = LIMIT) -> list[int]:
    """Exit codes; when one was killed, the others still have ``limit`` seconds."""
    return [r.wait(limit) for r in ranks]


def manifest(run: Path) -> dict[str, Any]:
    """The manifest of ``run``."""
    return json.loads((run / "manifest.json").read_text())


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints in ``run``."""
    return sorted(int(p.stem.removeprefix("step=")) for p in (run / "checkpoints").glob("step=*.ckpt"))
