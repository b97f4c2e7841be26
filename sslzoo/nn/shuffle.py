"""ShuffleBN: batch norm over other images than the ones compared (MoCo, arXiv:1911.05722, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached, rank
from sslzoo.randomness import SHUFFLE, hash64, key


def shuffled_order(rows: int, *, seed: int, step: int, micro_batch: int = 0, device: torch.device) -> Tensor:
    """A permutation of all ranks' ``rows`` (M,), int64: a function of its arguments, so equal on all
    ranks without a broadcast."""
    counter = torch.arange(rows, device=device)
    return hash64(key(SHUFFLE, seed, step, micro_batch), counter).argsort(stable=True)


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    """This rank's share (N, ...) of all ranks' rows of ``x`` (N, ...) in the order ``order`` (W·N,).

    Without gradient. Gathers whole images: the price of ShuffleBN.
    """
    share = x.shape[0]
    return gather_detached(x)[order[rank() * share : (rank() + 1) * share]]


def unshuffle(gathered: Tensor, order: Tensor) -> Tensor:
    """All ranks' rows (W·N, ...), computed from shuffled inputs and gathered, in their own order again."""
    out = torch.empty_like(gathered)
    out[order] = gathered
    return out
