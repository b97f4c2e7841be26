"""Many small tensors in one, which reaches the device in a single copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNED = 8  # bytes, the largest element


class _Place(NamedTuple):
    start: int  # in bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class Layout:
    """The places of tensors in the one that holds them all. Unlike a tuple, it is passed on as a whole by what moves a
    batch's tensors to a device."""

    def __init__(self, values: Any) -> None:
        self._values = values  # nested tuples, with a place for each tensor

    def unbundle(self, bundled: Tensor) -> Any:
        """The values that :func:`bundle` got, as views of ``bundled`` (B,) uint8, on its device."""

        def part(place: _Place) -> Tensor:
            size = torch.Size(place.shape).numel() * place.dtype.itemsize
            return bundled[place.start : place.start + size].view(place.dtype).view(place.shape)

        return _replace(self._values, _Place, part)


def bundle(values: Any) -> tuple[Tensor, Layout]:
    """The tensors in nested tuples ``values`` as one tensor (B,) uint8, and their places in it. Other leaves, such as
    names, stay in the layout."""
    parts: list[Tensor] = []
    length = 0

    def place(tensor: Tensor) -> _Place:
        nonlocal length
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts.extend((flat, flat.new_zeros(-len(flat) % _ALIGNED)))
        start, length = length, length + len(flat) + len(parts[-1])
        return _Place(start, tensor.dtype, tuple(tensor.shape))

    layout = Layout(_replace(values, Tensor, place))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8), layout


def _replace(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """``value`` with each leaf of type ``kind`` in its nested tuples replaced."""
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, tuple):
        parts = [_replace(part, kind, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
