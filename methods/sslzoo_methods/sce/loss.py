"""The SCE loss (arXiv:2111.14585, section 3), as pure functions without modules, state or process groups.

Shapes: N samples of this rank, M keys of one momentum view on all ranks, K queued keys, D embedding
width. In the paper's symbols ``temperature`` is tau, ``target_temperature`` tau_m and
``contrastive_weight`` lambda. All features are L2-normalised; gradients reach only ``online``.

:func:`sce_loss` is the definition for one pair of views. :func:`sce_multicrop_loss` computes the same for
any number of pairs without storing an N x K matrix; training uses it. Both compute in at least float32 with
autocast off: half-precision similarities divided by 0.07 cause an error of 0.6 to 2.7 % in the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import at_least_float32, autocast_off, ieee_matmul, product
from sslzoo.nn.streaming import needs_shift
from sslzoo_methods.sce.config import PairWeighting, TargetPositive

# Logits per tile: on a CPU as many as its cache holds; elsewhere 2**23 (32 MiB), because kernel launches are costly.
TILE = {"cpu": 2**20}
MIN_WIDTH = 64


class SCETerms(NamedTuple):
    """The loss and the three terms of its decomposition; scalars, means over the rows.

    For the masked target, loss = lambda * contrastive + (1 - lambda) * (relational + ceil) exactly; with
    ``zero_logit`` the weight of the positive is slightly larger than lambda and that of the others smaller.
    """

    loss: Tensor
    contrastive: Tensor  # L_InfoNCE
    relational: Tensor  # L_ReSSL: without the positive in target and prediction
    ceil: Tensor  # L_Ceil: for the probability that the prediction assigns to the negatives


class TermWeights(NamedTuple):
    """Weights of the three terms: lambda, mu and eta."""

    contrastive: float
    relational: float
    ceil: float

    @classmethod
    def sce(cls, contrastive: float) -> TermWeights:
        """The weights of SCE: lambda, 1 - lambda, 1 - lambda."""
        return cls(contrastive, 1 - contrastive, 1 - contrastive)


RESSL = TermWeights(0.0, 1.0, 0.0)


class SCEDense(NamedTuple):
    """Result of :func:`sce_loss`; see there for the order of the candidates."""

    terms: SCETerms
    target: Tensor  # (N, candidates), w: the soft target, rows sum to 1
    log_prediction: Tensor  # (N, candidates), log p


def sce_loss(
    online: Tensor,
    target: Tensor,
    *,
    keys: Tensor | None,
    first_row: int,
    queue: Tensor | None,
    temperature: float,
    target_temperature: float,
    contrastive_weight: float,
    target_positive: TargetPositive,
) -> SCEDense:
    """Cross-entropy between a soft target over the candidates and the online view's prediction.

    ``online`` (N, D) and ``target`` (N, D): the same images from the online and the momentum branch.
    ``queue`` (K, D) or None. ``keys`` (M, D) or None: all ranks' keys of the target's view, if the batch
    provides candidates too; the positive of row i is then their row ``first_row + i``. Candidates, in order:
    without ``keys``, the row's positive and the queue; with ``keys``, ``keys`` and the queue.

    ``target_positive``: ``masked`` removes the positive from the target's softmax, as in the paper;
    ``zero_logit`` keeps it with its logit set to 0, as both official repositories do if only the queue
    provides negatives. Raises ``ValueError`` without negatives, or for ``zero_logit`` with keys.
    """
    _check(keys, queue, target_positive)
    with autocast_off(online):
        q, k = at_least_float32(online), at_least_float32(target.detach())
        batch = None if keys is None else at_least_float32(keys.detach())
        stored = None if queue is None else at_least_float32(queue.detach())
        n = q.shape[0]
        if batch is None:
            prediction, similarity = _rows_dot(q, k)[:, None], torch.zeros_like(q[:, :1])
            positive = torch.zeros(n, dtype=torch.int64, device=q.device)
        else:
            prediction, similarity = product(q, batch.T), product(k, batch.T)
            positive = torch.arange(first_row, first_row + n, device=q.device)
        if stored is not None:
            prediction = torch.cat([prediction, product(q, stored.T)], dim=1)
            similarity = torch.cat([similarity, product(k, stored.T)], dim=1)
        prediction, similarity = prediction / temperature, similarity / target_temperature

        is_positive = F.one_hot(positive, prediction.shape[1]).bool()  # (N, candidates)
        masked = similarity.masked_fill(is_positive, -torch.inf).softmax(dim=1)
        s = masked if target_positive == "masked" else similarity.softmax(dim=1)
        w = contrastive_weight * is_positive.to(s.dtype) + (1 - contrastive_weight) * s
        log_p = prediction.log_softmax(dim=1)
        negatives = prediction.masked_fill(is_positive, -torch.inf)
        log_rest = negatives.logsumexp(dim=1) - prediction.logsumexp(dim=1)
        # A masked column has weight 0 and log-probability -inf; set it to 0 to avoid NaN in the product.
        log_relation = negatives.log_softmax(dim=1).masked_fill(is_positive, 0.0)
        terms = SCETerms(
            loss=-(w * log_p).sum(dim=1).mean(),
            contrastive=-log_p.gather(1, positive[:, None]).mean(),
            relational=-(masked * log_relation).sum(dim=1).mean(),
            ceil=-log_rest.mean(),
        )
        return SCEDense(terms, w, log_p)


class SCEOutput(NamedTuple):
    """Result of :func:`sce_multicrop_loss`: scalars, means over rows and pairs; all but ``terms.loss`` detached."""

    terms: SCETerms
    positive_similarity: Tensor  # q . k
    target_entropy: Tensor  # entropy (nats) of the target's distribution over the negatives
    target_count: Tensor  # exp of that entropy per row: the effective number of relational targets
    target_top1: Tensor  # largest probability in that distribution

    def health(self) -> dict[str, Tensor]:
        """Everything but the loss, by name."""
        named = self.terms._asdict() | self._asdict()
        return {name: value for name, value in named.items() if name not in ("loss", "terms")}


class Pair(NamedTuple):
    """A momentum view and an online crop, as indices into the two branches' lists of crops."""

    target: int
    online: int
    weight: float  # in the loss; the weights of all pairs sum to 1


def crop_pairs(targets: int, crops: int, *, symmetric: bool, weighting: PairWeighting) -> list[Pair]:
    """The pairs of crops that the loss compares.

    Symmetric: the online branch sees all ``crops``, the momentum branch the first ``targets`` of them; a
    crop is not paired with itself. Asymmetric: crop 0 is the momentum view and the online list starts at crop 1.

    ``flat``: all pairs have equal weight (as in the official code), so with 2 + 4 crops the local ones get 8/10.
    ``per_online_crop``: all online crops have equal weight, divided equally among their pairs.
    """
    if symmetric:
        pairs = [(i, j) for i in range(targets) for j in range(crops) if i != j]
    else:
        pairs = [(0, j) for j in range(crops - 1)]
    if weighting == "flat":
        return [Pair(i, j, 1 / len(pairs)) for i, j in pairs]
    online = Counter(j for _, j in pairs)
    return [Pair(i, j, 1 / (len(online) * online[j])) for i, j in pairs]


@compilable
def sce_multicrop_loss(
    online: Sequence[Tensor],
    target: Sequence[Tensor],
    pairs: Sequence[Pair],
    *,
    keys: Sequence[Tensor] | None,
    first_row: int,
    queue: Tensor | None,
    temperature: float,
    target_temperature: float,
    weights: TermWeights,
    target_positive: TargetPositive,
) -> SCEOutput:
    """Weighted mean of :func:`sce_loss` over ``pairs``.

    ``online`` and ``target`` are lists of (N, D), ``keys`` a list of (M, D) that matches ``target``, or None. With
    ``weights`` from :meth:`TermWeights.sce` this is SCE, with :data:`RESSL` ReSSL, and with other weights the
    three-coefficient loss of the paper's ablation (the latter two only with ``masked``).

    For each online crop q, let L be the log-sum-exp over the negatives Q and b = softmax(q.Q / tau) Q their
    mean; for each momentum view, let m be the same mean at tau_m. With a = q.k / tau, the logit of the
    positive, a row of a pair contributes: contrastive -log sigmoid(a - L), relational L - q.m / tau, ceil
    -log sigmoid(L - a), which are exact for saturated rows too. The gradient of L is b, computed along with
    L, so nothing of size N x K is stored. Differentiable once. The backward pass has no matrix product and
    is thus unaffected by autocast.
    """
    _check(None if keys is None else keys[0], queue, target_positive)
    with autocast_off(online[0]), ieee_matmul():
        q = [at_least_float32(x) for x in online]
        k = [at_least_float32(x.detach()) for x in target]
        n, crops = q[0].shape[0], len(q)
        scaled_q, scaled_k = [x / temperature for x in q], [x / target_temperature for x in k]
        shifted = needs_shift(min(temperature, target_temperature))
        shared: list[_Spread] = []  # of all rows over the queue: crops, then momentum views
        if queue is not None:
            rows = torch.cat([*scaled_q, *scaled_k])
            shared = _spread(rows, queue, None, shifted=shifted, targets=len(k) * n).split(n)
        online_spread: dict[tuple[int, int], _Spread] = {}
        target_spread: dict[int, _Spread] = {}
        for i in dict.fromkeys(pair.target for pair in pairs):
            partners = [pair.online for pair in pairs if pair.target == i]
            spreads = [shared[j] for j in (*partners, crops + i)] if shared else []
            if keys is not None:
                rows = torch.cat([*(scaled_q[j] for j in partners), scaled_k[i]])
                own = torch.arange(first_row, first_row + n, device=rows.device).repeat(len(partners) + 1)
                batch = _spread(rows, keys[i], own, shifted=shifted, targets=n).split(n)
                spreads = [a.join(b) for a, b in zip(spreads, batch, strict=True)] if spreads else batch
            online_spread |= {(i, j): s for j, s in zip(partners, spreads[:-1], strict=True)}
            target_spread[i] = spreads[-1]

        loss, terms = q[0].new_zeros(()), q[0].new_zeros(4)
        for i, j, weight in pairs:
            rest, relations = online_spread[i, j].log_sum, target_spread[i]
            positive = _rows_dot(scaled_q[j], k[i])  # (N,), a
            contrastive = -F.logsigmoid(positive - rest)
            relational = rest - _rows_dot(scaled_q[j], relations.centre)
            ceil = -F.logsigmoid(rest - positive)
            # zero_logit: the positive's mass in the target's softmax, exp(0) among exp(log_sum).
            s = torch.sigmoid(-relations.log_sum) if target_positive == "zero_logit" else 0.0
            mixed = (weights.contrastive + (1 - weights.contrastive) * s) * contrastive + (1 - s) * (
                weights.relational * relational + weights.ceil * ceil
            )
            loss = loss + weight * mixed.mean()
            with torch.no_grad():
                parts = torch.stack([contrastive, relational, ceil, positive * temperature]).mean(dim=1)
                terms = terms + weight * parts
        with torch.no_grad():
            spreads = list(target_spread.values())
            log_sum = torch.stack([s.log_sum for s in spreads])  # (views, N)
            dots = torch.stack([_rows_dot(scaled_k[i], s.centre) for i, s in target_spread.items()])
            entropy = log_sum - dots
            top1 = (torch.stack([s.largest for s in spreads]) - log_sum).exp()
        return SCEOutput(
            SCETerms(loss, terms[0], terms[1], terms[2]),
            terms[3],
            entropy.mean(),
            entropy.exp().mean(),
            top1.mean(),
        )


class _Spread(NamedTuple):
    """Summary of the softmax of the dot products between rows x (R, D) and a bank of keys."""

    log_sum: Tensor  # (R,) log-sum-exp; the only one with a gradient
    centre: Tensor  # (R, D) softmax-weighted mean of the keys, which is the gradient of log_sum
    largest: Tensor  # (R,) largest logit, in rows of targets

    def split(self, rows: int) -> list[_Spread]:
        """Split into blocks of ``rows`` rows."""
        return [_Spread(*block) for block in zip(*(x.split(rows) for x in self), strict=True)]

    def join(self, other: _Spread) -> _Spread:
        """The summary over both banks."""
        log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        with torch.no_grad():
            share = (self.log_sum - log_sum).exp()[:, None]
            centre = torch.lerp(other.centre, self.centre, share)
        return _Spread(log_sum, centre, torch.maximum(self.largest, other.largest))


class _SpreadFunction(torch.autograd.Function):
    """Computes the softmax summary tile by tile, and saves only the mean of the keys. Exponentials are relative to a
    running maximum if they could leave the range of float32 otherwise (``shifted``)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bank: Tensor, skip: Tensor | None, shifted: bool, targets: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        r, d = rows.shape
        x = rows.detach()
        tile = TILE.get(x.device.type, 2**23)
        width = min(max(tile // r, MIN_WIDTH), bank.shape[0])
        buffer = x.new_empty(r * width)
        # The lowest finite number, not -inf, because a row may have no candidate in a tile or in the whole bank.
        largest = x.new_full((r, 1), torch.finfo(x.dtype).min)
        highest = x.new_zeros(targets, 1)  # exponentials of the targets' largest logits
        total, centre = x.new_zeros(r, 1), x.new_zeros(r, d)
        for start in range(0, bank.shape[0], width):
            part = bank[start : start + width]
            logits = torch.mm(x, part.T, out=buffer[: r * len(part)].view(r, len(part)))
            if skip is not None:
                _mask_column(logits, skip - start)
            if shifted:
                new = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
                weights, shrink = logits.sub_(new).exp_(), (largest - new).exp_()
                total.mul_(shrink)
                centre.mul_(shrink)
                largest = new
            else:
                weights = logits.exp_()
                highest = torch.maximum(highest, weights[r - targets :].amax(dim=1, keepdim=True))
            total.add_(weights.sum(dim=1, keepdim=True))
            centre.addmm_(weights, part)
        if shifted:
            log_sum = (largest + total.log()).squeeze(1)
        else:
            log_sum = total.log().squeeze(1)
            largest[r - targets :] = highest.log()
        centre = centre / total.clamp(min=torch.finfo(x.dtype).tiny)
        largest = largest.squeeze(1)
        ctx.save_for_backward(centre)
        ctx.mark_non_differentiable(centre, largest)
        ctx.set_materialize_grads(False)
        return log_sum, centre, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
        (centre,) = ctx.saved_tensors
        return None if grad is None else grad[:, None] * centre, None, None, None, None


def _spread(rows: Tensor, bank: Tensor, skip: Tensor | None, *, shifted: bool, targets: int) -> _Spread:
    """The summary of ``rows``, of which the last ``targets`` are those of momentum views."""
    return _Spread(*_SpreadFunction.apply(rows, bank.detach().to(rows.dtype), skip, shifted, targets))


def _mask_column(logits: Tensor, column: Tensor) -> None:
    """Set ``column[i]`` of row i to -inf if that column exists, without a host-device synchronisation."""
    inside = (column >= 0) & (column < logits.shape[1])
    index = column.clamp(0, logits.shape[1] - 1)[:, None]
    kept = logits.gather(1, index)
    logits.scatter_(1, index, kept.masked_fill(inside[:, None], -torch.inf))


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot products: (N, D), (N, D) -> (N,)."""
    return (a * b).sum(dim=1)


def _check(keys: Tensor | None, queue: Tensor | None, target_positive: TargetPositive) -> None:
    require(
        queue is not None or (keys is not None and keys.shape[0] > 1),
        "SCE needs negatives: a queue, or batch keys of at least two samples over all ranks",
    )
    require(
        keys is None or target_positive == "masked",
        "target_positive=zero_logit is only defined for candidates from the queue; use masked with batch keys",
    )
