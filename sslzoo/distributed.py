"""Collectives for losses and state. With one process they return their input.

Convention: each rank computes its share of a global mean as a local mean (or the whole loss on
gathered rows). The backward pass of these collectives *sums* over ranks, and DDP's mean over the
parameter gradients removes the factor. Never multiply by the world size.
Every function is differentiable to any order unless its name says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllReduceSum(torch.autograd.Function):
    """y = sum over ranks of x. The operation is self-adjoint, hence differentiable to any order."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over all ranks, available on each; gradients are summed over ranks too."""
    return _AllReduceSum.apply(x) if world_size() > 1 else x  # type: ignore[no-any-return]


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over all ranks, available on each."""
    return all_reduce_sum(x) / world_size() if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    """Rows of all ranks in rank order; backward sums the gradients over ranks and returns this rank's slice."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _all_gather(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def _all_gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    # Renamed in torch 2.14; the old name warns there.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(out, x)
    return out


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows (N, ...) of all ranks in rank order, (W·N, ...), with gradients.

    All ranks must have the same number of rows.
    """
    return _Gather.apply(x) if world_size() > 1 else x  # type: ignore[no-any-return]


@torch.no_grad()
def gather_detached(x: Tensor) -> Tensor:
    """Like :func:`gather`, but without gradients."""
    return _all_gather(x.detach()) if world_size() > 1 else x.detach()


@torch.no_grad()
def broadcast_from_zero(x: Tensor) -> Tensor:
    """Overwrite ``x`` in place with rank 0's value, and return it."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x
