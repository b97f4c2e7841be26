"""A first-in first-out store of past features."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from sslzoo.checks import require
from sslzoo.nn.numerics import normalize

log = logging.getLogger(__name__)


class FeatureQueue(nn.Module):
    """The last ``size`` L2-normalised keys, (K, D), identical on all ranks.

    Starts from normalised Gaussian rows. Buffers, hence in every checkpoint; the write position is a
    tensor so that pushing needs no host synchronisation.
    """

    features: Tensor  # (K, D)
    position: Tensor  # (), int64: the row that the next push writes first

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        require(size > 0, f"a queue needs room for at least one key, got size {size}")
        self.register_buffer("features", normalize(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with ``keys`` (n, D), already gathered and in rank order.

        With n > K the last K stay, each where writing one by one would have left it. A key that is not finite leaves
        the old one in its place.
        """
        size, count = self.features.shape[0], keys.shape[0]
        offset = max(count - size, 0)
        rows = (self.position + offset + torch.arange(count - offset, device=keys.device)) % size
        keys = keys[offset:].to(self.features.dtype)
        sound = keys.isfinite().all(dim=1, keepdim=True)
        self.features.index_copy_(0, rows, torch.where(sound, keys, self.features[rows]))
        self.position.add_(count).remainder_(size)


def warn_of_stale_keys(size: int, keys_per_epoch: int) -> None:
    """Log a warning where a queue of ``size`` spans an epoch: it then holds keys of the very images that
    they are negatives for."""
    if size >= keys_per_epoch:
        log.warning(
            "method.queue_size=%d spans an epoch's %d keys, so that images meet their own old keys as "
            "negatives; lower method.queue_size",
            size,
            keys_per_epoch,
        )
