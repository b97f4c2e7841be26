"""Several crops through a backbone and a head, each alone or several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sslzoo.recipe.sections import CropBatching


def forward_crops(
    backbone: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    crops: Sequence[Tensor],
    crop_batching: CropBatching,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Features and head outputs of each crop (N, C, h, w), in order.

    ``per_crop`` passes each crop alone; ``per_resolution`` those that follow one another in one size
    together, through both; ``joint`` so through the backbone, and all crops at once through the head.
    Faster, but batch norm then takes its statistics over all that pass together.
    """
    if crop_batching == "per_crop":
        features = tuple(backbone(crop) for crop in crops)
        return features, tuple(head(h) for h in features)
    groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape)]
    passed = [backbone(torch.cat(group)) for group in groups]
    joined = torch.cat(passed)
    outputs = head(joined) if crop_batching == "joint" else torch.cat([head(h) for h in passed])
    return joined.chunk(len(crops)), outputs.chunk(len(crops))
