"""ShuffleBN: shuffle images over ranks before batch norm (MoCo, arXiv:1911.05722, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached, rank
from sslzoo.randomness import SHUFFLE, hash64, key


def shuffled_order(rows: int, *, seed: int, step: int, micro_batch: int = 0, device: torch.device) -> Tensor:
    """A permutation (M,), int64, of the ``rows`` of all ranks. It depends only on the arguments, so it is
    equal on all ranks without a broadcast."""
    counter = torch.arange(rows, device=device)
    return hash64(key(SHUFFLE, seed, step, micro_batch), counter).argsort(stable=True)


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    """Gather ``x`` (N, ...) from all ranks, permute the rows by ``order`` (W·N,), and return this rank's
    share (N, ...). Without gradient; gathers whole images, which is the cost of ShuffleBN.
    """
    share = x.shape[0]
    return gather_detached(x)[order[rank() * share : (rank() + 1) * share]]


def unshuffle(gathered: Tensor, order: Tensor) -> Tensor:
    """Undo the permutation ``order`` on gathered rows (W·N, ...) computed from shuffled inputs."""
    out = torch.empty_like(gathered)
    out[order] = gathered
    return out
