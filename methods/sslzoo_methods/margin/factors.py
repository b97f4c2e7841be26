"""Margins on the positive pair: angles, probabilities and the three gradient factors.

The mathematics of "Understanding Contrastive Learning Through the Lens of Margins" (arXiv:2306.11526),
shared by whatever trains with margins and whatever analyses them. All pure.

Letters: N anchors, M candidates, D embedding width, tau temperature; theta the angle of a positive pair,
C its cosine, psi the cosine that the margin makes of it, m2 the subtractive margin, n the logsumexp of
the negative logits of an anchor, P and P0 the positive's probability with and without the margin.
With the margin, the gradient of an anchor is the one without it times A, its positive part times B too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, pi, sin
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslzoo.checks import require
from sslzoo.nn.numerics import autocast_off, ieee_matmul, product

WideAngle = Literal["exact", "arcface", "clamp", "easy"]


def chord_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles (N,) in [0, pi] between the unit rows of ``a`` and ``b`` (N, D), differentiable.

    2 atan2(|a-b|, |a+b|) keeps full relative accuracy at both poles, where acos of a rounded cosine
    has none. A chord below four machine epsilons is rounding noise of two proportional rows: it counts
    as zero, and the pair, whose direction is undefined, then has no gradient.
    """
    noise = 4 * torch.finfo(a.dtype).eps
    difference, total = a - b, a + b
    difference = difference.masked_fill(_short(difference, noise), 0.0)
    total = total.masked_fill(_short(total, noise), 0.0)
    return 2 * torch.atan2(
        torch.linalg.vector_norm(difference, dim=1), torch.linalg.vector_norm(total, dim=1)
    )


def _short(x: Tensor, limit: float) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) < limit


def at_pole(theta: Tensor) -> Tensor:
    """Where ``theta`` is exactly 0 or pi (in its own precision)."""
    return (theta == 0) | (theta >= pi)


def _sin(theta: Tensor) -> Tensor:
    return torch.sin(theta).masked_fill(at_pole(theta), 0.0)  # the rounded pi has a sine of 1e-16


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What becomes of a positive pair's cosine: psi(theta) - ``subtractive``.

    psi(theta) = cos(theta + ``angular``), in radians, by the rule ``wide_angle`` where theta + angular
    approaches or passes pi: ``exact`` keeps it, ``arcface`` goes on with cos(theta) - m1 sin(m1) from
    pi - m1, ``clamp`` stays at -1, ``easy`` has the angular margin below a right angle only. A
    ``multiplier`` m above 1 is SphereFace's psi instead: (-1)^k cos(m theta) - 2k, k = floor(m theta / pi).
    """

    angular: float
    subtractive: float
    wide_angle: WideAngle = "exact"
    multiplier: int = 1

    def __post_init__(self) -> None:
        require(
            -pi < self.angular < pi,
            f"an angular margin m1 must lie within (-pi, pi) radians, got {self.angular}",
        )
        require(isfinite(self.subtractive), f"a subtractive margin m2 must be finite, got {self.subtractive}")
        require(self.multiplier >= 1, f"the angle's multiplier must be at least 1, got {self.multiplier}")
        require(
            self.multiplier == 1 or self.angular == 0, "a multiplied angle takes no additive angular margin"
        )

    @property
    def keeps_angle(self) -> bool:
        """Whether psi is the cosine itself, for every angle."""
        return self.angular == 0 and self.multiplier == 1

    @property
    def keeps_all(self) -> bool:
        """Whether there is no margin at all."""
        return self.keeps_angle and self.subtractive == 0

    @property
    def neutral_angle(self) -> float:
        """theta* = (pi - m1) / 2, where B = 1: nearer positives are pulled harder, wider ones less."""
        return (pi - self.angular) / 2

    def _active(self, theta: Tensor) -> Tensor:
        """Where the angular margin applies as written."""
        if self.wide_angle == "exact":
            return torch.ones_like(theta, dtype=torch.bool)
        return theta < (pi / 2 if self.wide_angle == "easy" else pi - self.angular)

    def cosine(self, theta: Tensor, cosine: Tensor) -> Tensor:
        """psi (N,), differentiable. Without an angular margin it is ``cosine`` itself, bit for bit."""
        if self.keeps_angle:
            return cosine
        if self.multiplier > 1:
            k = torch.floor(self.multiplier * theta.detach() / pi)
            return (1 - 2 * (k % 2)) * torch.cos(self.multiplier * theta) - 2 * k
        shifted = torch.cos(theta + self.angular)
        if self.wide_angle == "exact":
            return shifted
        beyond = {
            "arcface": cosine - self.angular * sin(self.angular),
            "clamp": torch.full_like(cosine, -1.0),
            "easy": cosine,
        }[self.wide_angle]
        return torch.where(self._active(theta), shifted, beyond)

    def pull(self, theta: Tensor) -> Tensor:
        """-psi'(theta), (N,): the tangential pull on a positive pair, sin(theta + m1) where active."""
        if self.multiplier > 1:
            k = torch.floor(self.multiplier * theta / pi)
            return self.multiplier * (1 - 2 * (k % 2)) * torch.sin(self.multiplier * theta)
        beyond = torch.zeros_like(theta) if self.wide_angle == "clamp" else _sin(theta)
        if self.angular == 0:
            return _sin(theta)
        return torch.where(self._active(theta), torch.sin(theta + self.angular), beyond)

    def slope_factor(self, theta: Tensor) -> Tensor:
        """B = -psi'(theta) / sin(theta), (N,): 1 where the margin leaves the slope, infinite at a pole
        where it does not."""
        if self.keeps_angle:
            return torch.ones_like(theta)
        b = self.pull(theta) / _sin(theta)
        if self.multiplier == 1 and self.wide_angle != "exact":
            b = torch.where(self._active(theta), b, 0.0 if self.wide_angle == "clamp" else 1.0)
        return b

    def drop(self, theta: Tensor) -> Tensor:
        """cos(theta) - psi(theta) + m2, (N,), without cancellation: tau times delta, and the subtractive
        margin that alone would have the same logit effect."""
        if self.multiplier > 1:
            cosine = torch.cos(theta)
            return cosine - self.cosine(theta, cosine) + self.subtractive
        shift = 2 * torch.sin(theta + self.angular / 2) * sin(self.angular / 2)
        beyond = {
            "exact": shift,
            "arcface": torch.full_like(theta, self.angular * sin(self.angular)),
            "clamp": 2 * torch.cos(theta / 2).square(),
            "easy": torch.zeros_like(theta),
        }[self.wide_angle]
        return torch.where(self._active(theta), shift, beyond) + self.subtractive


NO_MARGIN = Margin(angular=0.0, subtractive=0.0)


class Pairs(NamedTuple):
    """What a margin needs to know of N anchors."""

    cosine: Tensor  # (N,) C of the positive pair
    theta: Tensor  # (N,) its angle in radians, by the chord
    negatives: Tensor | None  # (N,) n, logsumexp of the negative logits; None: there are no negatives


class Factors(NamedTuple):
    """Probabilities and gradient factors, detached; (N,) each but ``emphasis``."""

    p: Tensor  # P = sigmoid((psi - m2) / tau - n)
    p0: Tensor  # P0, without the margin
    one_minus_p: Tensor  # by its own sigmoid, hence exact where P rounds to 1
    one_minus_p0: Tensor
    delta: Tensor  # drop of the positive logit
    logit: Tensor  # A = (1 - P) / (1 - P0), effect E3: scales the whole anchor
    slope: Tensor  # B, scales the positive
    emphasis: Tensor  # (), E1 = sum of pulls / sum of pulls without the margin
    angle: Tensor  # E2 = B / E1; 1 where both are 0


def pull_sums(theta: Tensor, margin: Margin) -> Tensor:
    """(2,): sums over the anchors of the pull with and without the margin, detached. Add the sums of all
    ranks before :func:`gradient_factors`: E1 belongs to the global batch."""
    theta = theta.detach()
    return torch.stack([margin.pull(theta).sum(), _sin(theta).sum()])


def gradient_factors(pairs: Pairs, margin: Margin, *, temperature: float | Tensor, sums: Tensor) -> Factors:
    """The factors at fixed embeddings. ``sums`` is the global :func:`pull_sums`.

    Without negatives every probability is 1 and A is 1: such a loss has no logit effect. Where the margin takes
    all pull away (E1 and B are 0), E2 has nothing to distribute and is 1.
    """
    cosine, theta = pairs.cosine.detach(), pairs.theta.detach()
    delta = margin.drop(theta) / temperature
    emphasis = torch.ones_like(sums[0]) if margin.keeps_angle else sums[0] / sums[1]
    slope = margin.slope_factor(theta)
    angle = torch.where((slope == 0) & (emphasis == 0), 1.0, slope / emphasis)
    if pairs.negatives is None:
        one, zero = torch.ones_like(theta), torch.zeros_like(theta)
        return Factors(one, one, zero, zero, delta, one, slope, emphasis, angle)
    gap0 = cosine / temperature - pairs.negatives.detach()
    gap = (margin.cosine(theta, cosine) - margin.subtractive) / temperature - pairs.negatives.detach()
    return Factors(
        p=torch.sigmoid(gap),
        p0=torch.sigmoid(gap0),
        one_minus_p=torch.sigmoid(-gap),
        one_minus_p0=torch.sigmoid(-gap0),
        delta=delta,
        logit=torch.exp(F.logsigmoid(-gap) - F.logsigmoid(-gap0)),
        slope=slope,
        emphasis=emphasis,
        angle=angle,
    )


def negative_logsumexp(
    anchors: Tensor,
    candidates: Tensor,
    excluded: Tensor,
    *,
    temperature: float | Tensor,
    chunk: int | None,
) -> Tensor:
    """n (N,): log of the sum of exp(cosine / tau) over the candidates (M, D) of each anchor (N, D).

    Rows are unit vectors. ``excluded`` (N, k) holds each anchor's candidates that are no negatives: its
    positive, and itself where it is among them. With a ``chunk`` that many anchors are taken at a time:
    memory O(chunk x M), same value, differentiable once.
    """
    if chunk is not None:
        scale = torch.as_tensor(1 / temperature, dtype=anchors.dtype, device=anchors.device)
        return _ChunkedLogSumExp.apply(anchors, candidates, excluded, scale, chunk)  # type: ignore[no-any-return]
    logits = product(anchors / temperature, candidates.T)
    return logits.scatter(1, excluded, -torch.inf).logsumexp(dim=1)


class _ChunkedLogSumExp(torch.autograd.Function):
    """The barycentre of the negatives, which is the gradient at an anchor, is gathered on the way forward;
    the candidates' gradient needs a second pass."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, excluded: Tensor, scale: Tensor, chunk: int
    ) -> Tensor:
        out, centre = anchors.new_empty(len(anchors)), torch.empty_like(anchors)
        with ieee_matmul():
            for rows in torch.arange(len(anchors), device=anchors.device).split(chunk):
                logits = ((anchors[rows] * scale) @ candidates.T).scatter_(1, excluded[rows], -torch.inf)
                out[rows] = logits.logsumexp(dim=1)
                centre[rows] = logits.sub_(out[rows, None]).exp_() @ candidates
        ctx.save_for_backward(anchors, candidates, excluded, scale, out, centre)
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        anchors, candidates, excluded, scale, out, centre = ctx.saved_tensors
        weight = (grad * scale)[:, None]  # (N, 1)
        to_candidates = None
        if ctx.needs_input_grad[1]:
            to_candidates = torch.zeros_like(candidates)
            with autocast_off(anchors), ieee_matmul():
                for rows in torch.arange(len(anchors), device=anchors.device).split(ctx.chunk):
                    logits = ((anchors[rows] * scale) @ candidates.T).scatter_(1, excluded[rows], -torch.inf)
                    share = logits.sub_(out[rows, None]).exp_()
                    to_candidates.addmm_(share.T, anchors[rows] * weight[rows])
        return centre * weight, to_candidates, None, None, None
