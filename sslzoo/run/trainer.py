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

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from sslzoo.checkpoints import AtomicCheckpointIO
from sslzoo.nn.batchnorm import LayerSync
from sslzoo.run.placement import ALONE, Placement

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
    "across ranks is zero",  # data without labels has nothing to validate on
)


class NoProfiler(PassThroughProfiler):
    """Measures as little as Lightning's default, which opens a generator for each named action of a step.

    :meth:`profile` gives a context and nothing else: no decorator, no value after ``as``.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """A context that does nothing."""
        return self._nothing


class PlacedEnvironment(ClusterEnvironment):
    """Tells Lightning what :mod:`sslzoo.run.placement` has found, so that it does not guess by itself."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self._placement = placement

    @property
    def creates_processes_externally(self) -> bool:
        """Every rank was started before this one asked."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 runs."""
        return self._placement.address

    @property
    def main_port(self) -> int:
        """Where the ranks meet."""
        return self._placement.port

    @staticmethod
    def detect() -> bool:
        """Given explicitly, never detected."""
        return False

    def world_size(self) -> int:
        """Processes of the run."""
        return self._placement.world_size

    def set_world_size(self, size: int) -> None:
        """The recipe's number was compared with the real one before."""
        assert size == self._placement.world_size

    def global_rank(self) -> int:
        """This process among all."""
        return self._placement.rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning derives it once more, from node and local rank."""

    def local_rank(self) -> int:
        """This process on its machine."""
        return self._placement.local_rank

    def node_rank(self) -> int:
        """This machine."""
        return self._placement.node_rank


def build_strategy(trainer: Mapping[str, Any], world_size: int) -> DDPStrategy | str:
    """``auto`` for one process, DDP (gloo on CPUs, NCCL on GPUs) for several.

    Buffers are not broadcast at every step: rank 0's queue would be sent to ranks that already have it,
    and batch-norm statistics are shared before validation by ``BroadcastBatchNormStats``.
    """
    name = trainer.get("strategy", "auto")
    if world_size == 1:
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
    placement: Placement = ALONE,
) -> Trainer:
    """The Trainer of the recipe's ``trainer`` section, with everything of Lightning's off that would break
    exact resume or that the framework does itself.

    Raises ``ValueError`` where this machine has not what the section asks for.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its greetings and tips
    for message in _BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message=f".*{message}")
    plugins: list[Any] = [AtomicCheckpointIO(), PlacedEnvironment(placement)]
    if trainer.get("sync_batchnorm", False):
        plugins.append(LayerSync())
    options = {
        "profiler": NoProfiler(),
        **trainer,
        "strategy": build_strategy(trainer, placement.world_size),
        "plugins": plugins,
        "callbacks": list(callbacks),
        "logger": False,  # set once the run directory is there
        "default_root_dir": str(run_dir),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    try:
        return Trainer(**options)
    except MisconfigurationException as error:
        raise ValueError(
            f"{error} Check trainer.accelerator={trainer.get('accelerator', 'auto')} and "
            f"trainer.devices={trainer.get('devices', 'auto')}; sslzoo doctor shows what this machine has"
        ) from error
