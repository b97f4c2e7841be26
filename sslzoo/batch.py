"""What the DataModule hands to methods and to evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What the DataModule yields for training: N samples of this rank, views normalised."""

    global_views: tuple[Tensor, ...]  # each (N, C, H, W)
    local_views: tuple[Tensor, ...]  # each (N, C, h, w); may be empty
    sample_id: Tensor  # (N,) int64, position in the training set; stable over epochs, workers, ranks
    label: Tensor | None = None  # (N,) int64, for probes only; None where there are none


class EvalBatch(NamedTuple):
    """What the DataModule yields for evaluation: one plain view, normalised."""

    image: Tensor  # (N, C, H, W)
    sample_id: Tensor  # (N,)
    label: Tensor  # (N,) int64
