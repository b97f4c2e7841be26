"""Margin losses (arXiv:2306.11526) with and without negatives, as pure functions without modules or process groups.

The equations follow from the definition of the loss; the paper's body was not available (see the card). Notation as in
sslzoo_methods.margin.factors: N anchors, M candidates, D embedding width, K queue rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, ieee_matmul, normalize
from sslzoo_methods.margin.config import Isolated
from sslzoo_methods.margin.factors import (
    NO_MARGIN,
    Chunk,
    Factors,
    Margin,
    Pairs,
    at_pole,
    chord_angle,
    gradient_factors,
    with_negatives,
)


@compilable
def contrast(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    *,
    own: Tensor | None,
    temperature: float | Tensor,
    chunk: Chunk | None,
) -> Pairs:
    """Contrast anchors (N, D) with candidates (M, D), both not normalised; gradients reach both.

    ``positive`` (N,) is the index of each anchor's positive among the candidates, and ``own`` (N,) that of the
    anchor itself if it is among them; all other candidates are negatives. ``chunk`` as in with_negatives.
    """
    u, v = normalize(anchors), normalize(candidates)
    excluded = positive[:, None] if own is None else torch.stack([positive, own], dim=1)
    with autocast_off(u):
        target = v[positive]
        pairs = Pairs((u * target).sum(dim=1), chord_angle(u, target), None)
        return with_negatives(pairs, u, v, excluded, temperature=temperature, chunk=chunk)


@compilable
def contrast_queue(
    queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float | Tensor, chunk: Chunk | None
) -> Pairs:
    """Contrast queries (N, D) with their keys (N, D), the positives, and a queue (K, D) of unit rows, the
    negatives. Keys and queue are constants."""
    u, v = normalize(queries), normalize(keys.detach())
    nothing = torch.empty(len(u), 0, dtype=torch.int64, device=u.device)
    with autocast_off(u):
        pairs = Pairs((u * v).sum(dim=1), chord_angle(u, v), None)
        return with_negatives(pairs, u, queue.detach(), nothing, temperature=temperature, chunk=chunk)


def attract(predictions: Tensor, targets: Tensor) -> Pairs:
    """Positive pairs of predictions (N, D) and constant targets (N, D), without negatives (BYOL, SimSiam)."""
    u, v = normalize(predictions), normalize(targets.detach())
    with autocast_off(u):
        return Pairs((u * v).sum(dim=1), chord_angle(u, v), None)


@compilable
def margin_loss(
    pairs: Pairs, margin: Margin, *, temperature: float | Tensor, beta: float, detached: bool
) -> Tensor:
    """L_i (N,) = -l + beta log(e^l + e^n), with l = (psi(theta) - m2) / tau the positive's logit.

    The margin applies in numerator and denominator. beta = 1 is InfoNCE; beta = 0 drops the negatives, as do
    pairs without negatives.
    ``detached``: the margin changes the value of the cosine but not its derivative. No factor is clamped here.
    """
    psi = margin.cosine(pairs.theta, pairs.cosine)
    if detached:
        psi = pairs.cosine + (psi - pairs.cosine).detach()
    positive = (psi - margin.subtractive) / temperature
    if pairs.negatives is None:
        return -positive
    # The derivative 1 - P of -logsigmoid is accurate for saturated pairs; cross_entropy has cancellation,
    # and F.softplus is linear above 20.
    return _pushed(-beta * F.logsigmoid(positive - pairs.negatives) - (1 - beta) * positive, pairs)


def margin_push(pairs: Pairs, margin: Margin, *, temperature: float | Tensor, beta: float) -> Tensor:
    """The derivative (N,) of :func:`margin_loss` by the logsumexp n of the negatives: beta (1 - P)."""
    assert pairs.negatives is not None
    positive = (margin.cosine(pairs.theta, pairs.cosine) - margin.subtractive) / temperature
    return beta * torch.sigmoid(pairs.negatives - positive)


def _pushed(loss: Tensor, pairs: Pairs) -> Tensor:
    """``loss`` (N,), with the gradient through n in its mean if n is a constant."""
    return loss if pairs.push is None else loss + pairs.push


@compilable
def isolated_loss(
    pairs: Pairs,
    margin: Margin,
    effects: Isolated,
    *,
    temperature: float | Tensor,
    beta: float,
    sums: Tensor,
) -> Tensor:
    """L_i (N,) without the margin, with only the selected ``effects`` of the margin in its gradient.

    ``emphasis`` (E1 or a constant) and ``angle`` (E2) scale the positive's gradient, ``logit`` (E3) that of the
    positive, the negatives or both. All three together give the gradient of :func:`margin_loss`. The factors are
    constants; that of the positive is clamped to ``factor_range``, and is 0 where theta is 0 or pi, where it would
    be infinite. The value is that of the loss without margin, multiplied by A_i if ``value_preserving`` is False.
    ``sums`` is the global pull_sums.
    """
    f = gradient_factors(pairs, margin, temperature=temperature, sums=sums)
    beta = 0.0 if pairs.negatives is None else beta
    pulls = 1 - beta + beta * (f.one_minus_p if effects.logit in ("both", "positive") else f.one_minus_p0)
    pushes = beta * (f.one_minus_p if effects.logit in ("both", "negative") else f.one_minus_p0)
    factor = positive_factor(f, effects).clamp(*effects.factor_range)
    if not margin.keeps_angle:
        factor = factor.masked_fill(at_pole(pairs.theta), 0.0)
    value = margin_loss(pairs, NO_MARGIN, temperature=temperature, beta=beta, detached=False).detach()
    if not effects.value_preserving:
        value = f.logit * value
    # The gradient dL/dC of the positive and, through n, that of all negatives.
    surrogate = -factor * pulls / temperature * (pairs.cosine - pairs.cosine.detach())
    if pairs.negatives is not None:
        surrogate = surrogate + pushes * (pairs.negatives - pairs.negatives.detach())
    return _pushed(value + surrogate, pairs)


def isolated_push(
    pairs: Pairs, margin: Margin, effects: Isolated, *, temperature: float | Tensor, beta: float
) -> Tensor:
    """The derivative (N,) of :func:`isolated_loss` by the logsumexp n of the negatives."""
    acting = margin if effects.logit in ("both", "negative") else NO_MARGIN
    return margin_push(pairs, acting, temperature=temperature, beta=beta)


def positive_factor(factors: Factors, effects: Isolated) -> Tensor:
    """The factor (N,) of the positive's gradient before clamping: the product of E1 (or its constant) and E2, as
    selected."""
    slope, e1 = factors.slope, factors.emphasis
    match effects.emphasis:
        case None:
            return factors.angle if effects.angle else torch.ones_like(slope)
        case "batch":
            return slope if effects.angle else e1.expand_as(slope)
        case constant:
            if not effects.angle:
                return torch.full_like(slope, constant)
            return torch.where((slope == 0) & (e1 == 0), constant, slope * (constant / e1))  # E2 is 1 there


def view_alignment(embeddings: Sequence[Tensor]) -> Tensor:
    """Mean cosine (), detached, between the views (N, D each) of an image, over all pairs of views and all rows."""
    z = normalize(torch.stack(list(embeddings)).detach())  # (V, N, D)
    with autocast_off(z), ieee_matmul():
        cosines = torch.einsum("and,bnd->abn", z, z).mean(dim=2)  # (V, V)
        return (cosines.sum() - cosines.trace()) / (len(z) * (len(z) - 1))


def macl_temperature(alignment: Tensor, *, temperature: float, alpha: float, initial: float) -> Tensor:
    """MACL's temperature tau (1 + alpha (A - A0)) (arXiv:2207.07874). ``alignment`` A is the mean cosine of
    positive pairs in the global batch, a constant."""
    return temperature * (1 + alpha * (alignment.detach() - initial))


@compilable
def macl_loss(pairs: Pairs, *, temperature: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """MACL's reweighted InfoNCE at its temperature, a baseline without margin: (V_i L_i, V_i), each (N,), with
    the constant V = 1 / (1 - P + eps)."""
    assert pairs.negatives is not None, "MACL needs negatives"
    gap = pairs.cosine / temperature - pairs.negatives
    weight = 1 / (torch.sigmoid(-gap.detach()) + eps)
    return _pushed(-weight * F.logsigmoid(gap), pairs), weight


def macl_push(pairs: Pairs, *, temperature: Tensor, eps: float) -> Tensor:
    """The derivative (N,) of :func:`macl_loss` by the logsumexp n of the negatives: V_i (1 - P)."""
    push = margin_push(pairs, NO_MARGIN, temperature=temperature, beta=1.0)
    return push / (push + eps)
