"""Forward passes of several crops through a backbone and a head, one by one or batched."""

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
    """Features (N, F) and head outputs (N, D) of each crop (N, C, h, w), in order.

    ``per_crop`` passes one crop at a time; ``per_resolution`` passes consecutive crops of the same size
    together; ``joint`` does so for the backbone, and passes all crops at once through the head. Batching is
    faster, but batch norm then uses joint statistics of the crops in a pass.
    """
    if crop_batching == "per_crop":
        features = tuple(backbone(crop) for crop in crops)
        return features, tuple(head(h) for h in features)
    groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape)]
    passed = [backbone(torch.cat(group)) for group in groups]
    joined = torch.cat(passed)
    outputs = head(joined) if crop_batching == "joint" else torch.cat([head(h) for h in passed])
    return joined.chunk(len(crops)), outputs.chunk(len(crops))
