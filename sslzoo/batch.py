"""Data passed between components: training and evaluation batches, and the pairs that a loss compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sslzoo.checks import require


class Batch(NamedTuple):
    """A training batch: N samples of this rank, with normalised views."""

    global_views: tuple[Tensor, ...]  # each (N, C, H, W)
    local_views: tuple[Tensor, ...]  # each (N, C, h, w); may be empty
    sample_id: Tensor  # (N,) int64, index in the training set; independent of epoch, worker and rank
    label: Tensor | None = None  # (N,) int64, for probes only; None for unlabelled data


class EvalBatch(NamedTuple):
    """An evaluation batch: one plain view per image, normalised."""

    image: Tensor  # (N, C, H, W)
    sample_id: Tensor  # (N,)
    label: Tensor | None  # (N,) int64; None for unlabelled data


class Contrast(NamedTuple):
    """The positive pairs and the temperature of a method's loss."""

    # Kind of pair -> embeddings of anchors and of their positives, (N, D) each; ``global`` is required.
    pairs: dict[str, tuple[Tensor, Tensor]]
    temperature: float | None = None  # divides the cosine similarities; None: the loss has no temperature

    @classmethod
    def of_views(
        cls,
        batch: Batch,
        embed: Callable[[Tensor], Tensor],
        embed_key: Callable[[Tensor], Tensor] | None = None,
        *,
        temperature: float | None = None,
    ) -> Contrast:
        """Pair the first global view (and, as ``local``, the first local view) with the second global view.

        ``embed`` maps a view to embeddings (N, D); ``embed_key`` does so for the second view if keys have their own
        network. Raises ``ValueError`` with fewer than two global views.
        """
        require(len(batch.global_views) >= 2, "needs two global views; set count: 2 for the view")
        anchors = {"global": batch.global_views[0]}
        if batch.local_views:
            anchors["local"] = batch.local_views[0]
        key = (embed_key or embed)(batch.global_views[1])
        return cls({kind: (embed(view), key) for kind, view in anchors.items()}, temperature)
