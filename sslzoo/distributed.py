"""Collectives for losses and state. With one process they return their input.

Convention: each rank computes its share of a global mean as a local mean (or the whole loss on
gathered rows). The backward pass of these collectives *sums* over ranks, and DDP's mean over the
parameter gradients removes the factor. Never multiply by the world size.
Every function is differentiable to any order unless its name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Rows of all ranks in rank order; backward is this rank's slice of the sum over ranks of the gradients."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _all_gather(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if _reduce_scatter() is not None:
            return _ScatterSum.apply(grad)  # type: ignore[no-any-return]
        return all_reduce_sum(grad)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _ScatterSum(torch.autograd.Function):
    """This rank's rows (N, ...) of the sum over ranks of (W·N, ...): the adjoint of a gather."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        reduce_scatter = _reduce_scatter()
        assert reduce_scatter is not None
        out = x.new_empty((x.shape[0] // world_size(), *x.shape[1:]))
        reduce_scatter(out, x.detach().contiguous())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gather(grad)


def _reduce_scatter() -> Callable[..., Any] | None:
    """The group's reduce-scatter, which sends half of what an all-reduce does; None if it has none."""
    new = getattr(dist, "reduce_scatter_single", None)  # torch 2.14, where gloo has it too
    if new is None and dist.get_backend() == "nccl":
        return dist.reduce_scatter_tensor
    return new


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
