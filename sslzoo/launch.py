"""From the recipe's ``trainer:`` section to a ``lightning.Trainer`` that keeps the framework's promises."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from sslzoo.batchnorm import LayerSync
from sslzoo.callbacks.checkpoint import AtomicCheckpointIO
from sslzoo.config import require

# A rank that hangs ends the run after this, not after torch's 30 minutes; long enough for one rank to
# evaluate or to write a checkpoint while the others wait.
TIMEOUT = timedelta(minutes=10)
# Lightning's advice that does not apply here, and a deprecation in its own use of torch.
_BESIDE_THE_POINT = (
    "isinstance.treespec, LeafSpec",
    "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler starts at its position
    "does not have many workers",  # data in memory needs none
    "You defined a `validation_step` but have no `val_dataloader`",  # data without labels
    "is smaller than the logging interval",  # the meter has its own
)
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


class Unprofiled(PassThroughProfiler):
    """Measures as little as Lightning's default, which opens a generator for each named action of a step.

    :meth:`profile` gives a context and nothing else: no decorator, no value after ``as``.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """A context that does nothing."""
        return self._nothing


def devices_per_node(trainer: Mapping[str, Any]) -> int:
    """Processes on this machine, from ``trainer.devices`` and ``trainer.accelerator``."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([d for d in devices.split(",") if d.strip()])
    if devices in ("auto", -1, "-1"):
        cpu = trainer.get("accelerator", "auto") == "cpu"
        return max(torch.cuda.device_count(), 1) if not cpu and torch.cuda.is_available() else 1
    return int(devices)


def world_size_of(trainer: Mapping[str, Any]) -> int:
    """Processes of the whole run."""
    return devices_per_node(trainer) * int(trainer.get("num_nodes", 1))


def build_strategy(trainer: Mapping[str, Any]) -> DDPStrategy | str:
    """``auto`` for one process, DDP (gloo on CPUs, NCCL on GPUs) for several.

    Buffers are not broadcast at every step: rank 0's queue would be sent to ranks that already have it,
    and batch-norm statistics are shared before validation by ``SameEncoder``.
    """
    name = trainer.get("strategy", "auto")
    require(name in STRATEGIES, f"trainer.strategy must be one of {', '.join(STRATEGIES)}; got {name!r}")
    if world_size_of(trainer) == 1:
        return "auto"
    # Renamed in torch 2.14, where the old name warns.
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDPStrategy(
        **options,
        gradient_as_bucket_view=True,
        find_unused_parameters=name.endswith("_true"),
        timeout=TIMEOUT,
    )


def build_trainer(
    trainer: Mapping[str, Any],
    *,
    run_dir: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] = (),
) -> Trainer:
    """The Trainer of the recipe's ``trainer`` section, with everything of Lightning's off that would break
    exact resume or that the framework does itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its greetings and tips
    for message in _BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message=f".*{message}")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if trainer.get("sync_batchnorm", False):
        plugins.append(LayerSync())
    if SLURMEnvironment.detect():
        # Requeueing is the job script's, on exit code 75; Lightning's saves inside the signal handler.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    options = {
        "profiler": Unprofiled(),
        **trainer,
        "strategy": build_strategy(trainer),
        "plugins": plugins,
        "callbacks": list(callbacks),
        "logger": list(loggers) or False,
        "default_root_dir": str(run_dir),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**options)
