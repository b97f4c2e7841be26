"""Softmax losses over many columns without storing their similarities.

A loss of this kind is a sum over rows i of f_i(L_i), where L_i = log sum_j exp(x_i . y_j / tau). Its gradient by x_i is
w_i sum_j p_ij y_j / tau and by y_j sum_i w_i p_ij x_i / tau, with the softmax p_ij and w_i = f_i'(L_i). :func:`stream`
computes both in one pass over blocks of rows, and :func:`with_gradient` gives them to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslzoo.nn.numerics import autocast_off, ieee_matmul

# Similarities per block: on a CPU as many as its cache holds (8 MiB in float32); elsewhere more, because kernel
# launches are costly.
BLOCK = {"cpu": 2**21}
BLOCK_ELSEWHERE = 2**23
# The largest logit of unit rows, 1 / tau, up to which exponentials need no shift: they and their sums over any number
# of columns, and the reciprocals, are far within the range of float32.
UNSHIFTED = 40.0


class Streamed(NamedTuple):
    """Result of :func:`stream`, without gradients."""

    log_sum: Tensor  # (R,) L
    pull: Tensor  # (R, D) w_i sum_j p_ij y_j; no rows if not asked for
    push: Tensor  # (C, D) sum_i w_i p_ij x_i; no rows if not asked for


def needs_shift(temperature: float | Tensor) -> bool:
    """Whether exponentials of similarities of unit rows, divided by ``temperature``, may leave the range of float32.
    Unknown, hence true, for a tensor: to look at its value, the host would wait for the device."""
    return isinstance(temperature, Tensor) or 1 / temperature > UNSHIFTED


@torch.no_grad()
def stream(
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float | Tensor,
    exclude: Callable[[slice, Tensor], object],
    weights: Tensor | Callable[[slice, Tensor], Tensor] | None,
    pull: bool,
    push: bool,
    block: int | None = None,
) -> Streamed:
    """The softmax of unit ``rows`` (R, D) over unit ``columns`` (C, D), both at least float32.

    ``temperature``: a number, a scalar or one per row (R,). ``exclude(part, logits)`` sets logits (B, C) of the rows
    ``part`` to -inf, in place, where a column does not belong to the sum. ``weights``: w (R,), or a function that
    returns it for the rows ``part`` with their L (B,); None: 1. ``pull`` and ``push`` tell which gradients are needed.
    ``block``: rows at a time; None: as many as suit the device.
    """
    r, c = len(rows), len(columns)
    size = block or max(1, BLOCK.get(rows.device.type, BLOCK_ELSEWHERE) // c)
    with autocast_off(rows), ieee_matmul():
        total = rows.new_empty(r, 1)
        peak = rows.new_empty(r, 1) if needs_shift(temperature) else None
        pulled = rows.new_empty(r if pull else 0, rows.shape[1])
        pushed = columns.new_zeros(c if push else 0, columns.shape[1])
        buffer = rows.new_empty(min(size, r), c)
        for start in range(0, r, size):
            part = slice(start, min(start + size, r))
            x = rows[part]
            e = buffer[: len(x)]
            if isinstance(temperature, Tensor):
                torch.mm(x / temperature.expand(r)[part, None], columns.T, out=e)
            else:
                torch.addmm(e, x, columns.T, beta=0, alpha=1 / temperature, out=e)
            exclude(part, e)
            if peak is not None:
                # Finite, also for a row without any column.
                e.sub_(torch.amax(e, 1, keepdim=True, out=peak[part]).clamp_(min=torch.finfo(e.dtype).min))
            torch.sum(e.exp_(), 1, keepdim=True, out=total[part])
            if pull or push:
                share = total[part].clamp(min=torch.finfo(e.dtype).tiny)
                if weights is None:
                    share.reciprocal_()
                elif isinstance(weights, Tensor):
                    share = weights[part, None] / share
                else:
                    log_sum = _log_sum(total[part], None if peak is None else peak[part])
                    share = weights(part, log_sum)[:, None] / share
                if pull:
                    torch.mm(e, columns, out=pulled[part]).mul_(share)
                if push:
                    pushed.addmm_(e.T, x * share)
    return Streamed(_log_sum(total, peak), pulled, pushed)


def _log_sum(total: Tensor, peak: Tensor | None) -> Tensor:
    return (total.log() if peak is None else total.log().add_(peak)).squeeze(1)


def with_gradient(value: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """The scalar ``value`` with the given gradients. ``parts`` are pairs of a tensor and the gradient by it, which is
    ignored if the tensor needs none. Differentiable once."""
    inputs, gradients = zip(*parts, strict=True)
    return _WithGradient.apply(value.detach(), len(parts), *inputs, *gradients)  # type: ignore[no-any-return]


class _WithGradient(torch.autograd.Function):
    """Keeps the gradients of its inputs, which were computed along with the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        own = [g * grad if need else None for g, need in zip(ctx.saved_tensors, needed, strict=False)]
        return None, None, *own, *(None for _ in own)
