"""What the DataModule hands to methods and to evaluation, and what methods show to analyses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sslzoo.checks import require


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


class Contrast(NamedTuple):
    """What the loss of a method compares."""

    # Anchors and their positives, (N, D) each, by kind of pair: ``global``, which must be there, and any other.
    pairs: dict[str, tuple[Tensor, Tensor]]
    temperature: float | None = None  # what divides their cosines; None: the loss has no such number

    @classmethod
    def of_views(
        cls,
        batch: Batch,
        embed: Callable[[Tensor], Tensor],
        embed_key: Callable[[Tensor], Tensor] | None = None,
        *,
        temperature: float | None = None,
    ) -> Contrast:
        """The first global view, and under ``local`` the first local one, against the second global view, which
        ``embed_key`` embeds where another network makes the keys."""
        require(len(batch.global_views) >= 2, "two global views are compared; set views to count: 2")
        anchors = {"global": batch.global_views[0]}
        if batch.local_views:
            anchors["local"] = batch.local_views[0]
        key = (embed_key or embed)(batch.global_views[1])
        return cls({kind: (embed(view), key) for kind, view in anchors.items()}, temperature)
