"""Make batch-norm statistics equal on all ranks before evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sslzoo.distributed import broadcast_from_zero


class BroadcastBatchNormStats(Callback):
    """Broadcasts rank 0's batch-norm running statistics before validation, so that all ranks evaluate the
    same encoder.

    Unless batch norm is synchronised, the statistics differ between ranks, because each rank sees its own
    samples and buffers are not broadcast at every step.
    """

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Broadcast the running statistics if there are several processes."""
        if trainer.world_size > 1:
            for module in pl_module.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    for buffer in module.buffers(recurse=False):
                        broadcast_from_zero(buffer)
