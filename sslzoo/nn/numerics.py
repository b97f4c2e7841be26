"""Small numerical pieces that losses share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def autocast_off(reference: Tensor) -> torch.autocast:
    """Autocast disabled on the device of ``reference``: similarities and softmax belong in float32."""
    return torch.autocast(reference.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x: Tensor) -> Tensor:
    """L2-normalised rows (..., D), in at least float32; a norm below 1e-12 counts as 1e-12."""
    with autocast_off(x):
        return torch.nn.functional.normalize(at_least_float32(x), dim=-1, eps=1e-12)


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Float32 products in full float32 while inside, whichever of torch's two settings has lowered them.

    TF32, which ``set_float32_matmul_precision("high")`` and ``torch.backends.cuda.matmul.fp32_precision = "tf32"``
    switch on, rounds the inputs of products to 11 bits, too few for similarities over a small temperature. A
    backward pass that runs outside is not covered: see :func:`product`. ``torch.compile`` cannot trace the settings:
    what it compiles is computed as they stand.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9 has one setting for all
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
        if backend.fp32_precision not in ("none", "ieee")  # none: nothing is lowered
    ]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


def product(a: Tensor, b: Tensor, *, addend: Tensor | None = None) -> Tensor:
    """``a @ b``, forwards and backwards in the precision of its inputs: without autocast and TF32.

    ``a`` (..., N, K) and ``b`` (..., K, M) of one dtype and the same leading dimensions, at most one;
    ``addend`` (N, M) is added to a product of two matrices. Differentiable to any order.
    """
    return _Product.apply(a, b, addend)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The products of the backward pass are products of this kind again."""

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
        # A transposed matrix gets a transposed gradient: the products are torch's own, to the bit.
        grad_a = grad_b = None
        if to_a:
            grad_a = product(b, grad.mT).mT if _transposed(a) else product(grad, b.mT)
        if to_b:
            grad_b = product(grad.mT, a).mT if _transposed(b) else product(a.mT, grad)
        return grad_a, grad_b, grad if to_addend else None


def _transposed(x: Tensor) -> bool:
    return x.ndim == 2 and x.stride() == (1, x.shape[0])
