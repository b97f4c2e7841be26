"""Numerical functions shared by losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def autocast_off(reference: Tensor) -> torch.autocast:
    """Context with autocast disabled on the device of ``reference``, for similarities and softmax in float32."""
    return torch.autocast(reference.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x: Tensor) -> Tensor:
    """L2-normalise the rows of ``x`` (..., D) in at least float32; norms are clamped to at least 1e-12."""
    with autocast_off(x):
        return torch.nn.functional.normalize(at_least_float32(x), dim=-1, eps=1e-12)


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Context in which float32 matrix products use full float32 precision, whichever torch setting has lowered it.

    TF32, enabled by ``set_float32_matmul_precision("high")`` or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``,
    rounds the inputs of products to 11 bits, which is too coarse for similarities divided by a small temperature. A
    backward pass outside of the context is not covered: see :func:`product`. Compiled code cannot change these
    settings, so the context has no effect on compiled code.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9 there is only a general setting
        general = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(general)
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    lowered = [
        (backend, backend.fp32_precision)
        for backend in backends
        if backend.fp32_precision not in ("none", "ieee")  # both mean full precision
    ]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


def product(a: Tensor, b: Tensor, *, addend: Tensor | None = None) -> Tensor:
    """``a @ b`` without autocast and TF32 in forward and backward pass, thus in the precision of the inputs.

    ``a`` (..., N, K) and ``b`` (..., K, M) must have the same dtype and the same leading dimensions, at most one;
    ``addend`` (N, M) is added to the product of two matrices. Differentiable to any order.
    """
    return _Product.apply(a, b, addend)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """Implements :func:`product`; its backward pass uses :func:`product` again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
        with autocast_off(a), ieee_matmul():
            if addend is not None:
                return torch.addmm(addend, a, b)
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        to_a, to_b, to_addend = ctx.needs_input_grad
        # A transposed matrix gets a transposed gradient, so that results are bit-identical to torch's.
        grad_a = grad_b = None
        if to_a:
            grad_a = product(b, grad.mT).mT if _transposed(a) else product(grad, b.mT)
        if to_b:
            grad_b = product(grad.mT, a).mT if _transposed(b) else product(a.mT, grad)
        return grad_a, grad_b, grad if to_addend else None


def _transposed(x: Tensor) -> bool:
    return x.ndim == 2 and x.stride() == (1, x.shape[0])
