"""A first-in-first-out queue of past features."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from sslzoo.checks import require
from sslzoo.nn.numerics import normalize

log = logging.getLogger(__name__)


class FeatureQueue(nn.Module):
    """The last ``size`` L2-normalised keys, (K, D), identical on all ranks.

    Initialised with normalised Gaussian rows. The state is in buffers and thus in checkpoints; the write
    position is a tensor so that pushing needs no host-device synchronisation.
    """

    features: Tensor  # (K, D)
    position: Tensor  # (), int64: row at which the next push starts

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        require(size > 0, f"the size of a queue must be at least 1, got {size}")
        self.register_buffer("features", normalize(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with ``keys`` (n, D), already gathered and in rank order.

        If n > K, the last K are kept, at the same positions as after pushing one by one. Keys that are not finite are
        skipped, and the old key stays in their place.
        """
        size, count = self.features.shape[0], keys.shape[0]
        offset = max(count - size, 0)
        rows = (self.position + offset + torch.arange(count - offset, device=keys.device)) % size
        keys = keys[offset:].to(self.features.dtype)
        finite = keys.isfinite().all(dim=1, keepdim=True)
        self.features.index_copy_(0, rows, torch.where(finite, keys, self.features[rows]))
        self.position.add_(count).remainder_(size)


def warn_of_stale_keys(size: int, keys_per_epoch: int) -> None:
    """Warn if a queue of ``size`` keys spans an epoch, because it then contains older keys of the current
    images, which are used as negatives for the same images."""
    if size >= keys_per_epoch:
        log.warning(
            "method.queue_size=%d spans an epoch (%d keys), so that images get their own old keys as "
            "negatives; lower method.queue_size",
            size,
            keys_per_epoch,
        )
