"""MetAug's objective. Pure: no module, no state, no process group.

Shapes: N samples on this rank, G on all ranks, M views, D embedding width. A similarity is (1 + cos) / 2,
hence in [0, 1]. A pair (u, v) is query view u against key view v; generated features are queries, never
keys. The official code is github.com/jiangmengli/metaug at 33a9fd0; where the paper (arXiv:2203.05119) and
that code part, the card says which is followed.
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
    """How similarities become logits."""

    gamma: float  # sharpness: a softmax temperature of 2 / gamma on the cosine
    scale: float  # the loss is scale / gamma times the softplus, so that gamma leaves its slope
    circle: Circle | None


class Margin(NamedTuple):
    """How generated features are pushed to be hard."""

    weight: float  # beta
    positive_weight: float  # lambda+, of the positives' part
    thresholds: Thresholds
    detach_thresholds: bool  # no gradient through them


class Regulariser(NamedTuple):
    """R, unweighted, and the thresholds it is of."""

    value: Tensor  # ()
    sigma_pos: Tensor  # (N,)
    sigma_neg: Tensor  # (N,)


class Block(NamedTuple):
    """Similarities of each sample's queries with its keys, and what the softmax needs of them."""

    pos: Tensor  # (N, P)
    neg: Tensor  # (N, K)
    own: Tensor | None  # (N, K) bool: the columns of neg that are no negatives; None where all are
    negatives: int  # of a sample
    log_pos: Tensor  # (N,) log-sum-exp of the positives' logits
    log_neg: Tensor  # (N,)


class Objective(NamedTuple):
    """The loss of this rank's samples and its parts; all but ``loss`` unweighted."""

    loss: Tensor  # ()
    terms: Tensor  # (M+2,): originals, view u replaced by its generated features, all replaced
    regulariser: Regulariser | None
    similarity: Tensor  # (4,) detached means: positives, negatives, the same of generated queries


def score(
    pos: Tensor, neg: Tensor, contrast: Contrast, *, own: Tensor | None = None, owned: int = 0
) -> Block:
    """A block from similarities (N, P) and (N, K); ``own`` marks ``owned`` columns a row to leave out.

    The logits are gamma w- (s- - shift-) and -gamma w+ (s+ - shift+). Circle weights carry no gradient; one
    that is clamped to 0 leaves a logit of 0 (circle loss, arXiv:2002.10857, equation 6).
    """
    require(
        neg.shape[1] > owned, "MetAug needs negatives: a batch of one sample has none; use method.keys=bank"
    )
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
    """The unified contrastive loss: softplus of every negative against every positive of a sample, over all
    its blocks in one term; mean over the N samples, times scale / gamma."""
    log_pos, log_neg = zip(*[(b.log_pos, b.log_neg) for b in blocks], strict=True)
    x = torch.stack(log_neg).logsumexp(0) + torch.stack(log_pos).logsumexp(0)
    # Exact softplus; torch's own is cut off beyond 20, where its second derivative vanishes.
    return -contrast.scale / contrast.gamma * F.logsigmoid(-x).mean()


def thresholds(blocks: Sequence[Block], margin: Margin) -> tuple[Tensor, Tensor]:
    """sigma+ (N,) and sigma- (N,) from the hardest positive and the hardest negative (equation 2)."""
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
    """R and the thresholds, which come from ``reference``.

    Positives of ``generated`` pay for what they exceed sigma+ by, negatives for what they lack of sigma-;
    the means run over all entries, apart for the two (equation 3). lambda+ is the official code's.
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
    """Ordered pairs of different views: query outer, key inner."""
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
    """Equation 5 with the batch as keys.

    ``original`` and ``generated``: M views, each (N, D); ``keys`` (M, G, D): the original features of all
    ranks, row ``offset + i`` being sample i; ``local``: further queries of the first term, each (N, D). All
    L2-normalised; gradients reach all. With ``query_keys`` (2M, G, D), the original and generated features
    of all ranks, a query also repels its own view's features of other samples. ``unified``: one term with all
    2M queries in place of M+2.
    """
    views, queries = len(original), torch.stack([*original, *generated, *local])  # (2M+L, N, D)
    rows = torch.arange(queries.shape[1], device=queries.device)
    own = rows[:, None] + offset == torch.arange(keys.shape[1], device=queries.device)
    with autocast_off(queries):
        queries, keys = at_least_float32(queries), at_least_float32(keys)
        # All similarities of all terms in one product; the terms share its blocks.
        s = (1 + product(queries.flatten(0, 1), keys.flatten(0, 1).T)) / 2
        table = s.view(len(queries), len(rows), views, -1).permute(0, 2, 1, 3)  # (2M+L, M, N, G)
        same = None
        if query_keys is not None:
            same = (1 + product(queries[: 2 * views], at_least_float32(query_keys).mT)) / 2  # (2M, N, G)
        blocks: dict[Pair, Block] = {}
        for q, of_query in enumerate(table.unbind(0)):
            for v, block in enumerate(of_query.unbind(0)):
                if q >= 2 * views or q % views != v:
                    pos = block[rows, rows + offset][:, None]
                    neg, mask = block, own
                    if same is not None and q < 2 * views and v == (q + 1) % views:  # once a query
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
    """Equation 5 with rows of the memory banks as keys.

    ``keys``: for each of the M+2 terms (M, N, 1+K, D), the sample's own row first; no gradient. The rest is as
    in :func:`batch_objective`. ``official_pairs`` (M = 3) takes R over the pairs of the official code: each
    generated view's term gives the pairs that it has a part in, although its keys are original, and the
    reference of a pair is drawn from the term that leaves it original.
    """
    views = len(original)
    with autocast_off(original[0]):
        queries = [list(original)]
        queries += [[*original[:u], generated[u], *original[u + 1 :]] for u in range(views)]
        queries.append(list(generated))
        tables = [
            _bank_blocks([*of_term, *(local if t == 0 else ())], views, rows, contrast)
            for t, (of_term, rows) in enumerate(zip(queries, keys, strict=True))
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
    """Blocks of a term, by pair; queries beyond the M views meet every key view. One product a key view."""
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
