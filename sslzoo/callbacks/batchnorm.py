"""One encoder on all ranks while it is evaluated."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from sslzoo.distributed import broadcast_from_zero


class BroadcastBatchNormStats(Callback):
    """Gives every rank rank 0's buffers before validation, so that all evaluate the same encoder.

    Batch-norm running statistics differ between ranks unless batch norm is synchronised: each sees its
    own rows, and buffers are not broadcast at every step.
    """

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Broadcast running statistics; nothing with one process."""
        if trainer.world_size > 1:
            for module in pl_module.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    for buffer in module.buffers(recurse=False):
                        broadcast_from_zero(buffer)
