"""Small numerical pieces that losses share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Float32 products in full float32 while inside: ``set_float32_matmul_precision("high")``, which
    Lightning suggests, rounds their inputs to 11 bits, too few for similarities over a small temperature."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
