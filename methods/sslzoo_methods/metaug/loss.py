"""The MetAug objective, as pure functions without modules, state or process groups.

Shapes: N samples on this rank, G on all ranks, M views, D embedding width. Similarities are (1 + cos) / 2,
in [0, 1]. A pair (u, v) compares queries of view u with keys of view v; generated features are only queries.
The official code is github.com/jiangmengli/metaug at 33a9fd0; where it differs from the paper
(arXiv:2203.05119), the card says which is followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.numerics import at_least_float32, autocast_off, product
from sslzoo_methods.metaug.config import Circle, Thresholds

Pair = tuple[int, int]  # (query view, key view)


class Contrast(NamedTuple):
    """Parameters that turn similarities into logits and a loss."""

    gamma: float  # sharpness, equal to a softmax temperature of 2 / gamma on the cosine
    scale: float  # the softplus is multiplied by scale / gamma, so that gamma does not change its slope
    circle: Circle | None


class Margin(NamedTuple):
    """Parameters of the regulariser R."""

    weight: float  # beta
    positive_weight: float  # lambda+, weight of the positives
    thresholds: Thresholds
    detach_thresholds: bool  # whether thresholds are constants for the gradient


class Regulariser(NamedTuple):
    """R, unweighted, and its thresholds."""

    value: Tensor  # ()
    sigma_pos: Tensor  # (N,)
    sigma_neg: Tensor  # (N,)


class Block(NamedTuple):
    """Similarities of each sample's query with its keys, and the log-sum-exps of their logits."""

    pos: Tensor  # (N, P)
    neg: Tensor  # (N, K)
    own: Tensor | None  # (N, K) bool: columns of neg to exclude (the sample itself); None: exclude none
    negatives: int  # number of negatives per sample
    log_pos: Tensor  # (N,) log-sum-exp of the positives' logits
    log_neg: Tensor  # (N,) the same for the negatives


class Objective(NamedTuple):
    """The loss of this rank's samples and its parts, which are unweighted."""

    loss: Tensor  # ()
    terms: Tensor  # (M+2,): original features; view u replaced by generated features (M); all replaced
    regulariser: Regulariser | None
    similarity: Tensor  # (4,) detached means: positives, negatives, and the same for generated queries


def score(
    pos: Tensor, neg: Tensor, contrast: Contrast, *, own: Tensor | None = None, owned: int = 0
) -> Block:
    """Compute a block from similarities ``pos`` (N, P) and ``neg`` (N, K); ``own`` (N, K) marks ``owned`` columns
    per row to exclude.

    The logits are gamma w- (s- - shift-) and -gamma w+ (s+ - shift+). The circle weights w are constants for the
    gradient; a weight clamped to 0 gives a logit of 0 (circle loss, arXiv:2002.10857, equation 6).
    """
    require(neg.shape[1] > owned, "a batch of one sample has no negatives for MetAug; use method.keys=bank")
    circle = contrast.circle
    shift_pos, shift_neg = (1 - circle.m, circle.m) if circle is not None and circle.shift else (0.0, 0.0)
    logit_pos, logit_neg = -contrast.gamma * (pos - shift_pos), contrast.gamma * (neg - shift_neg)
    if circle is not None and circle.weights:
        logit_pos = logit_pos * (1 + circle.m - pos.detach()).clamp_min(0)
        logit_neg = logit_neg * (circle.m + neg.detach()).clamp_min(0)
    if own is not None:
        logit_neg = logit_neg.masked_fill(own, -torch.inf)
    return Block(pos, neg, own, neg.shape[1] - owned, logit_pos.logsumexp(1), logit_neg.logsumexp(1))


def oucl(blocks: Iterable[Block], contrast: Contrast) -> Tensor:
    """The unified contrastive loss: the softplus over all pairs of a negative and a positive of a sample, with all
    blocks in one term; mean over the N samples, times scale / gamma."""
    log_pos, log_neg = zip(*[(b.log_pos, b.log_neg) for b in blocks], strict=True)
    x = torch.stack(log_neg).logsumexp(0) + torch.stack(log_pos).logsumexp(0)
    # Exact softplus; torch's is linear above 20, where its second derivative is 0.
    return -contrast.scale / contrast.gamma * F.logsigmoid(-x).mean()


def thresholds(blocks: Sequence[Block], margin: Margin) -> tuple[Tensor, Tensor]:
    """sigma+ (N,) and sigma- (N,) from each sample's hardest positive and hardest negative (equation 2)."""
    lowest = torch.stack([b.pos.amin(1) for b in blocks]).amin(0)
    negatives = [b.neg if b.own is None else b.neg.masked_fill(b.own, -torch.inf) for b in blocks]
    highest = torch.stack([neg.amax(1) for neg in negatives]).amax(0)
    if margin.detach_thresholds:
        lowest, highest = lowest.detach(), highest.detach()
    if margin.thresholds == "mean":
        return (lowest + highest) / 2, (lowest + highest) / 2
    low, high = torch.minimum(lowest, highest), torch.maximum(lowest, highest)
    return (low, high) if margin.thresholds == "large" else (high, low)


def margin_regulariser(reference: Sequence[Block], generated: Sequence[Block], margin: Margin) -> Regulariser:
    """R (equation 3) with thresholds from ``reference``.

    In ``generated``, positives are penalised by how much they exceed sigma+, negatives by how much they fall
    below sigma-, with separate means over all entries. The weight lambda+ is from the official code.
    """
    sigma_pos, sigma_neg = thresholds(reference, margin)
    above = [F.relu(b.pos - sigma_pos[:, None]) for b in generated]
    below = [F.relu(sigma_neg[:, None] - b.neg) for b in generated]
    below = [x if b.own is None else x.masked_fill(b.own, 0) for x, b in zip(below, generated, strict=True)]
    count = sum(b.negatives * len(b.neg) for b in generated)
    positives = torch.stack([x.sum() for x in above]).sum() / sum(x.numel() for x in above)
    negatives = torch.stack([x.sum() for x in below]).sum() / count
    return Regulariser(margin.positive_weight * positives + negatives, sigma_pos, sigma_neg)


def view_pairs(views: int) -> list[Pair]:
    """Ordered pairs of different views (query, key), sorted."""
    return list(permutations(range(views), 2))


def batch_objective(
    original: Sequence[Tensor],
    generated: Sequence[Tensor],
    keys: Tensor,
    *,
    offset: int,
    contrast: Contrast,
    margin: Margin | None,
    generated_weight: float,
    local: Sequence[Tensor] = (),
    query_keys: Tensor | None = None,
    unified: bool = False,
) -> Objective:
    """Equation 5 with keys from the batch.

    ``original`` and ``generated``: M views, each (N, D); ``keys`` (M, G, D): the original features of all
    ranks, where row ``offset + i`` is sample i; ``local``: additional queries of the first term, each (N, D). All
    L2-normalised; gradients reach all. With ``query_keys`` (2M, G, D), the original and generated features of
    all ranks, other samples in the query's own view are negatives too. ``unified``: a single term with all 2M
    queries instead of M+2 terms.
    """
    views, queries = len(original), torch.stack([*original, *generated, *local])  # (2M+L, N, D)
    rows = torch.arange(queries.shape[1], device=queries.device)
    own = rows[:, None] + offset == torch.arange(keys.shape[1], device=queries.device)
    with autocast_off(queries):
        queries, keys = at_least_float32(queries), at_least_float32(keys)
        # One product computes the similarities for all terms, which share its blocks.
        s = (1 + product(queries.flatten(0, 1), keys.flatten(0, 1).T)) / 2
        table = s.view(len(queries), len(rows), views, -1).permute(0, 2, 1, 3)  # (2M+L, M, N, G)
        same = None
        if query_keys is not None:
            same = (1 + product(queries[: 2 * views], at_least_float32(query_keys).mT)) / 2  # (2M, N, G)
        blocks: dict[Pair, Block] = {}
        for q, by_view in enumerate(table.unbind(0)):
            for v, block in enumerate(by_view.unbind(0)):
                if q >= 2 * views or q % views != v:
                    pos = block[rows, rows + offset][:, None]
                    neg, mask = block, own
                    if same is not None and q < 2 * views and v == (q + 1) % views:  # only once per query
                        neg, mask = torch.cat([block, same[q]], 1), own.repeat(1, 2)
                    blocks[q, v] = score(pos, neg, contrast, own=mask, owned=mask.shape[1] // own.shape[1])
        pairs = view_pairs(views)
        extra = [blocks[2 * views + i, v] for i in range(len(local)) for v in range(views)]
        first = [blocks[pair] for pair in pairs] + extra
        last = [blocks[u + views, v] for u, v in pairs]
        single = [
            [blocks[u + views if u == replaced else u, v] for u, v in pairs] for replaced in range(views)
        ]
        terms = [first + last] if unified else [first, *single, last]
        return _assemble(terms, (first, last), (first, last), contrast, margin, generated_weight)


def bank_objective(
    original: Sequence[Tensor],
    generated: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    contrast: Contrast,
    margin: Margin | None,
    generated_weight: float,
    local: Sequence[Tensor] = (),
    official_pairs: bool = False,
) -> Objective:
    """Equation 5 with keys from the memory banks.

    ``keys``: (M, N, 1+K, D) for each of the M+2 terms, with the sample's own row first; without gradients. The
    rest is as in :func:`batch_objective`. ``official_pairs`` (M = 3) computes R over the pairs of the official
    code: from the term of each generated view, all pairs that involve this view, even as (original) keys. The
    reference of a pair comes from the term in which both of its views are original.
    """
    views = len(original)
    with autocast_off(original[0]):
        queries = [list(original)]
        queries += [[*original[:u], generated[u], *original[u + 1 :]] for u in range(views)]
        queries.append(list(generated))
        tables = [
            _bank_blocks([*term_queries, *(local if t == 0 else ())], views, rows, contrast)
            for t, (term_queries, rows) in enumerate(zip(queries, keys, strict=True))
        ]
        terms = [list(table.values()) for table in tables]
        reference, hard = terms[0], terms[-1]
        if official_pairs:
            pairs = view_pairs(views)
            reference = [tables[1 + views - u - v][u, v] for u, v in pairs]  # the third of the views 0, 1, 2
            hard = [tables[1 + w][pair] for w in range(views) for pair in pairs if w in pair]
        shown = (terms[0], terms[-1])
        return _assemble(terms, (reference, hard), shown, contrast, margin, generated_weight)


def _bank_blocks(
    queries: Sequence[Tensor], views: int, keys: Tensor, contrast: Contrast
) -> Mapping[Pair, Block]:
    """Blocks of a term, by pair; queries beyond the M views are compared with every key view. One product per key
    view."""
    queries = [at_least_float32(q) for q in queries]
    blocks: dict[Pair, Block] = {}
    for v, rows in enumerate(keys):
        against = [q for q in range(len(queries)) if q != v]
        columns = torch.stack([queries[q] for q in against], dim=2)  # (N, D, queries)
        s = (1 + product(rows.to(columns.dtype), columns)) / 2
        for q, column in zip(against, s.unbind(2), strict=True):  # (N, 1+K)
            blocks[q, v] = score(column[:, :1], column[:, 1:], contrast)
    return {pair: blocks[pair] for pair in sorted(blocks)}


def _assemble(
    terms: Sequence[Sequence[Block]],
    regularised: tuple[Sequence[Block], Sequence[Block]],
    shown: tuple[Sequence[Block], Sequence[Block]],
    contrast: Contrast,
    margin: Margin | None,
    generated_weight: float,
) -> Objective:
    values = torch.stack([oucl(blocks, contrast) for blocks in terms])
    loss, r = values[0] + generated_weight * values[1:].sum(), None
    if margin is not None:
        r = margin_regulariser(*regularised, margin)
        loss = loss + margin.weight * r.value
    means = [mean for blocks in shown for mean in _means(blocks)]
    return Objective(loss, values, r, torch.stack(means))


@torch.no_grad()
def _means(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Mean positive and mean negative similarity."""
    pos = torch.stack([b.pos.mean() for b in blocks]).mean()
    sums = [(b.neg if b.own is None else b.neg.masked_fill(b.own, 0)).sum() for b in blocks]
    return pos, torch.stack(sums).sum() / sum(b.negatives * len(b.neg) for b in blocks)
