"""Bundled tensors come back as they were, from one tensor, also when its batch moves as a whole."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from sslzoo.data.bundling import bundle


class Draws(NamedTuple):
    name: str
    rows: Tensor
    factor: Tensor
    none: Tensor


VALUES: Any = (
    Draws(
        "hue", torch.tensor([3, 1, 2]), torch.tensor([0.5, 1.5, 2.5]), torch.empty((0, 4), dtype=torch.int64)
    ),
    (Draws("blur", torch.tensor([7]), torch.tensor([[0.25], [0.75]]).mT, torch.tensor([True])),),
    (),
)


def same(a: Any, b: Any) -> bool:
    """Whether both have the same types, tensors and leaves."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_values_come_back_as_views_of_one_tensor() -> None:
    bundled, layout = bundle(VALUES)
    assert bundled.dtype == torch.uint8 and bundled.ndim == 1
    got = pickle.loads(pickle.dumps(layout)).unbundle(bundled)  # as from a worker
    assert same(got, VALUES)
    bundled.zero_()
    assert got[0].rows.tolist() == [0, 0, 0]


def test_nothing_to_bundle_is_an_empty_tensor() -> None:
    bundled, layout = bundle((("a",), ()))
    assert len(bundled) == 0
    assert layout.unbundle(bundled) == (("a",), ())


def test_what_moves_a_batch_passes_the_layout_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # there is no GPU
    bundled, layout = bundle(VALUES)
    for moved in (move_data_to_device((bundled, layout), "cpu"), pin_memory((bundled, layout))):
        assert torch.equal(moved[0], bundled) and moved[1] is layout
