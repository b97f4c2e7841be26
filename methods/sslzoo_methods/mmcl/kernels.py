"""MMCL's kernels on L2-normalised rows, shifted by a constant to be accurate in float32 (arXiv:2112.11450).

The dual problem and the loss depend only on differences of kernel values, so a constant shift has no effect
on them. The functions return k(a, b) - k(u, u) for a unit vector u (``min``: k itself), computed without
cancellation from the cosine gap a.b - 1.

Shapes: M and N rows, D embedding width; sigma is the bandwidth.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslzoo.nn.numerics import autocast_off, ieee_matmul, normalize
from sslzoo_methods.mmcl.config import KernelName, SigmaRule

CDIST_ELEMENTS = 2**22  # bound on rows x N x D, the memory of cdist's backward pass on CUDA, in elements


class Kernel(NamedTuple):
    """A kernel and its bandwidth."""

    name: KernelName
    sigma: float | Tensor | None  # None if the kernel has none


def kernel_shift(kernel: Kernel) -> float | Tensor:
    """The constant that :func:`shifted_kernel` and :func:`shifted_gram` subtract."""
    if kernel.name == "tanh":
        sigma = _sigma(kernel)
        return sigma.tanh() if isinstance(sigma, Tensor) else math.tanh(sigma)
    return {"rbf": 1.0, "linear": 1.0, "poly": 1.5**3, "min": 0.0}[kernel.name]


def shifted_kernel(a: Tensor, b: Tensor, *, kernel: Kernel, centre: Tensor) -> Tensor:
    """k(a_i, b_j) minus :func:`kernel_shift`, (M, N), with gradients to ``a`` (M, D) and ``b`` (N, D).

    ``a`` and ``b`` are L2-normalised; ``centre`` (D,) is any point near them. Nothing is clamped, because
    near-duplicates would lose their gradient. The gradient is only correct tangentially to the sphere,
    which suffices because the normalisation removes its radial part.
    """
    if kernel.name == "min":
        return _overlap(a, b)
    return _of_gap(_cosine_gap(a, b, centre), kernel)


@torch.no_grad()
def shifted_gram(x: Tensor, *, kernel: Kernel) -> Tensor:
    """The Gram matrix of ``x`` (N, D) minus :func:`kernel_shift`, (N, N), detached."""
    if kernel.name == "min":
        return _overlap(x, x)
    gap = _cosine_gap(x, x, x.mean(dim=0)).clamp_(max=0)
    gap.diagonal().copy_(-_shortness(x))
    return _of_gap(gap, kernel)


@torch.no_grad()
def bandwidth(pool: Tensor, *, sigma: float, rule: SigmaRule) -> float | Tensor:
    """The bandwidth: ``sigma`` in the unit given by ``rule`` for ``pool`` (N, D), whose rows are normalised here.

    ``fixed``: 1. ``auto``: 1/D, as in the official code, so that the RBF exponent is -D |a-b|^2 / sigma.
    ``median``: the median squared distance between two rows.
    """
    if rule == "fixed":
        return sigma
    if rule == "auto":
        return sigma / pool.shape[1]
    x = normalize(pool)
    with autocast_off(x):
        gap = _cosine_gap(x, x, x.mean(dim=0))
        rows, columns = torch.triu_indices(len(x), len(x), 1, device=x.device)
        return sigma * (-2 * gap[rows, columns]).median().clamp(min=torch.finfo(x.dtype).eps)


def _cosine_gap(a: Tensor, b: Tensor, centre: Tensor) -> Tensor:
    """a.b - 1 = -(|a-b|^2 + (1-|a|^2) + (1-|b|^2)) / 2, from centred rows, to be accurate for similar features.
    Differentiable once."""
    return _CosineGap.apply(a, b, centre)  # type: ignore[no-any-return]


class _CosineGap(torch.autograd.Function):
    """The derivative by a_i is b_j, less a_i if the norm of that is 1: a multiple of a_i makes no difference then, and
    small differences are accurate."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, centre: Tensor) -> Tensor:
        sides = []
        for x in (a, b):
            centred, short = x - centre, _shortness(x)
            sides.append((centred, (centred * centred).sum(dim=1).add_(short).div_(-2), short))
        (a_c, half_a, short_a), (b_c, half_b, short_b) = sides
        ctx.save_for_backward(a_c, b_c, short_a, short_b, centre)
        with autocast_off(a), ieee_matmul():
            return torch.mm(a_c, b_c.T).add_(half_a[:, None]).add_(half_b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a_c, b_c, short_a, short_b, centre = ctx.saved_tensors
        to_a, to_b, _ = ctx.needs_input_grad
        with autocast_off(grad), ieee_matmul():
            return (
                _to_side(grad, b_c, a_c, short_a, centre) if to_a else None,
                _to_side(grad.T, a_c, b_c, short_b, centre) if to_b else None,
                None,
            )


def _to_side(grad: Tensor, other: Tensor, own: Tensor, short: Tensor, centre: Tensor) -> Tensor:
    """The gradient of one side, ``own`` (M, D), from ``grad`` (M, N) and the ``other`` (N, D), both centred."""
    radial = torch.where((short == 0)[:, None], own, -centre)
    return torch.mm(grad, other).addcmul_(grad.sum(dim=1)[:, None], radial, value=-1)


def _shortness(x: Tensor) -> Tensor:
    """1 - |x|^2 without rounding errors: 0 except for rows whose norm was clamped, such as zero rows."""
    gap = 1 - (x * x).sum(dim=1)
    return torch.where(gap > 64 * torch.finfo(x.dtype).eps, gap, 0.0)


def _sigma(kernel: Kernel) -> float | Tensor:
    assert kernel.sigma is not None, f"{kernel.name} needs a bandwidth"
    return kernel.sigma


def _of_gap(gap: Tensor, kernel: Kernel) -> Tensor:
    if kernel.name == "rbf":
        return _ShiftedRBF.apply(gap, 2 / _sigma(kernel))  # type: ignore[no-any-return]
    if kernel.name == "linear":
        return gap
    if kernel.name == "poly":  # (gap + 1.5)^3 - 1.5^3
        return gap * (6.75 + gap * (4.5 + gap))
    # tanh p - tanh q = tanh(p - q) (1 - tanh p tanh q)
    sigma = _sigma(kernel)
    return torch.tanh(sigma * gap) * (1 - torch.tanh(sigma * (gap + 1)) * kernel_shift(kernel))


class _ShiftedRBF(torch.autograd.Function):
    """exp(rate * gap) - 1. Torch computes the derivative of expm1 as its result + 1, which is inaccurate for small
    kernel values; here it is an exponential of its own. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, rate: float | Tensor) -> Tensor:
        exponent = gap * rate
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(exponent.exp().mul_(rate))
        return exponent.expm1_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """sum_d min(relu a_d, relu b_d) = (sum relu a + sum relu b - |relu a - relu b|_1) / 2.

    Its derivative splits ties in half, as that of an elementwise minimum does.
    """
    a, b = a.relu(), b.relu()
    rows = max(1, CDIST_ELEMENTS // b.numel())
    distance = torch.cat([torch.cdist(part, b, p=1) for part in a.split(rows)])
    return (a.sum(dim=1)[:, None] + b.sum(dim=1) - distance) / 2
