"""Passing crops one by one, by size, and all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslzoo.nn.passes import forward_crops
from sslzoo.recipe.sections import CropBatching

CROPS = [torch.randn(2, 1, s, s) for s in (4, 4, 3)]


class Recorder:
    """Row-wise, so that the passes agree; remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x.flatten(1).sum(1, keepdim=True) * 2


@pytest.mark.parametrize(
    ("crop_batching", "trunk_batches", "head_batches"),
    [("per_crop", [2, 2, 2], [2, 2, 2]), ("per_resolution", [4, 2], [4, 2]), ("joint", [4, 2], [6])],
)
def test_same_rows_in_order_and_which_pass_together(
    crop_batching: CropBatching, trunk_batches: list[int], head_batches: list[int]
) -> None:
    backbone, head = Recorder(), Recorder()
    features, outputs = forward_crops(backbone, head, CROPS, crop_batching)
    for h, z, crop in zip(features, outputs, CROPS, strict=True):
        torch.testing.assert_close(h, Recorder()(crop))
        torch.testing.assert_close(z, 2 * h)
    assert (backbone.batches, head.batches) == (trunk_batches, head_batches)
