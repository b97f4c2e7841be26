"""How the base frameworks pair views: who queries, who is a candidate. Pure: gathering is the method's.

N samples on this rank, M on all ranks, D embedding width; the first views are the global ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslzoo.margins import Margin, Pairs
from sslzoo_methods.margin.config import NEGATIVE_FREE, MarginConfig
from sslzoo_methods.margin.loss import attract, contrast, contrast_queue


class Term(NamedTuple):
    """The pairs of one query view and one key view; of both at once in NT-Xent."""

    pairs: Pairs
    negatives: int  # of each anchor
    local: bool  # a local crop queries


# Projectors as the base's published recipes have them: norms between layers, norm and bias at the output.
HEADS: dict[str, dict[str, Any]] = {
    "simclr": {"hidden_norm": False},
    "mocov2": {"hidden_norm": False},
    "mocov3": {"output_norm": "batch_no_affine", "output_bias": False},
    "byol": {},
    "simsiam": {"output_norm": "batch_no_affine", "output_bias": False},
}
# MoCo v3's predictor ends in a norm for vision transformers only (solo-learn: for ResNets, last_bn=False).
PREDICTORS: dict[str, dict[str, Any]] = {"mocov3": {"output_bias": False}}
# Times the mean over the terms: both view orders are summed, not averaged.
VIEW_ORDERS = {"mocov3": 2.0, "byol": 2.0}
# Added to each term: BYOL's loss is 2 - 2 cos.
CONSTANT = {"byol": 2.0}


def margin_of(cfg: MarginConfig, negatives: int, ramp: float) -> Margin:
    """The recipe's margin at the share ``ramp`` of its full size, for so many ``negatives`` an anchor."""
    if cfg.family == "sphereface":
        return Margin(angular=0.0, subtractive=0.0, multiplier=cfg.sphere_multiplier)
    subtractive = cfg.eqco_margin(negatives) if cfg.family == "eqco" else cfg.subtractive_margin
    return Margin(angular=ramp * cfg.radians, subtractive=ramp * subtractive, wide_angle=cfg.wide_angle)


def key_views(base: str, views: int, symmetric: bool) -> range:
    """Which of the ``views`` global views are keys: MoCo v2 without symmetrisation has the second alone."""
    return range(1, 2) if base == "mocov2" and not symmetric else range(views)


def pair_views(
    cfg: MarginConfig,
    queries: Sequence[Tensor],
    keys: Mapping[int, Tensor],
    queue: Tensor | None,
    *,
    views: int,
    offset: int,
    temperature: float | Tensor,
) -> list[Term]:
    """A term for every query view (N, D) and key view other than it. The first ``views`` queries are global.

    ``keys`` by view: (M, D) with this rank's rows at ``offset`` for simclr and mocov3, which contrast
    within the batch; (N, D) for the others, which do not. Nothing is normalised but the ``queue`` (K, D).
    SimCLR with two views is NT-Xent, whose candidates are both views.
    """
    base, chunk = cfg.base, cfg.chunk_size
    rows = torch.arange(len(queries[0]), device=queries[0].device)
    if base == "simclr" and len(queries) == 2:
        m = len(keys[0])
        own = torch.cat([rows, rows + m]) + offset
        positive = torch.cat([rows + m, rows]) + offset
        candidates = torch.cat([keys[0], keys[1]])
        pairs = contrast(
            torch.cat(list(queries)), candidates, positive, own=own, temperature=temperature, chunk=chunk
        )
        return [Term(pairs, 2 * m - 2, False)]
    terms = []
    for a, query in enumerate(queries):
        for b, key in keys.items():
            if a == b:
                continue
            if base in NEGATIVE_FREE:
                pairs, negatives = attract(query, key), 0
            elif queue is not None:
                pairs = contrast_queue(query, key, queue, temperature=temperature, chunk=chunk)
                negatives = len(queue)
            else:
                pairs = contrast(query, key, rows + offset, own=None, temperature=temperature, chunk=chunk)
                negatives = len(key) - 1
            terms.append(Term(pairs, negatives, local=a >= views))
    return terms
