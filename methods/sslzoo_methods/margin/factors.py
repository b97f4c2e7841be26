"""Margins on the positive pair: angles, probabilities and the three gradient factors.

The mathematics of "Understanding Contrastive Learning Through the Lens of Margins" (arXiv:2306.11526) as
pure functions, used for training and for analyses.

Notation: N anchors, M candidates, D embedding width, tau temperature; theta is the angle of a positive pair,
C its cosine, psi the cosine changed by the margin, m2 the subtractive margin, n the logsumexp of an anchor's
negative logits, P and P0 the positive's probability with and without the margin. The margin multiplies the
gradient of an anchor by A, and its positive part additionally by B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, pi, sin
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.numerics import product
from sslzoo.nn.streaming import stream, with_gradient

WideAngle = Literal["exact", "arcface", "clamp", "easy"]


def chord_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles (N,) in [0, pi] between the unit rows of ``a`` and ``b`` (N, D), differentiable.

    2 atan2(|a-b|, |a+b|) has full relative accuracy near 0 and pi, where acos of a rounded cosine has none.
    A chord shorter than four machine epsilons is rounding noise of two parallel rows: it is set to zero, and
    the pair, whose direction is undefined, gets no gradient.
    """
    noise = 4 * torch.finfo(a.dtype).eps
    difference, total = torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(a + b, dim=1)
    return 2 * torch.atan2(
        difference.masked_fill(difference < noise, 0.0), total.masked_fill(total < noise, 0.0)
    )


def at_pole(theta: Tensor) -> Tensor:
    """Mask where ``theta`` is exactly 0 or pi (in its precision)."""
    return (theta == 0) | (theta >= pi)


def _sin(theta: Tensor) -> Tensor:
    return torch.sin(theta).masked_fill(at_pole(theta), 0.0)  # the sine of the rounded pi is not 0


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A margin, which replaces the cosine of a positive pair by psi(theta) - ``subtractive``.

    psi(theta) = cos(theta + ``angular``), in radians. ``wide_angle`` defines psi for wide angles: ``exact``
    uses this formula throughout; from theta = pi - m1 on, ``arcface`` continues with cos(theta) - m1 sin(m1) and
    ``clamp`` with -1; ``easy`` applies the angular margin only below a right angle. With a ``multiplier`` m
    above 1, psi is SphereFace's: (-1)^k cos(m theta) - 2k, k = floor(m theta / pi).
    """

    angular: float
    subtractive: float
    wide_angle: WideAngle = "exact"
    multiplier: int = 1

    def __post_init__(self) -> None:
        require(
            -pi < self.angular < pi,
            f"an angular margin m1 must lie in (-pi, pi) radians, got {self.angular}",
        )
        require(isfinite(self.subtractive), f"a subtractive margin m2 must be finite, got {self.subtractive}")
        require(self.multiplier >= 1, f"the angle's multiplier must be at least 1, got {self.multiplier}")
        require(
            self.multiplier == 1 or self.angular == 0, "a multiplier and an angular margin exclude each other"
        )

    @property
    def keeps_angle(self) -> bool:
        """Whether psi equals the cosine for every angle."""
        return self.angular == 0 and self.multiplier == 1

    @property
    def keeps_all(self) -> bool:
        """Whether the margin has no effect at all."""
        return self.keeps_angle and self.subtractive == 0

    @property
    def neutral_angle(self) -> float:
        """theta* = (pi - m1) / 2, where B = 1: positives at smaller angles are pulled more, at wider angles less."""
        return (pi - self.angular) / 2

    def _active(self, theta: Tensor) -> Tensor:
        """Mask where psi is cos(theta + m1)."""
        if self.wide_angle == "exact":
            return torch.ones_like(theta, dtype=torch.bool)
        return theta < (pi / 2 if self.wide_angle == "easy" else pi - self.angular)

    def cosine(self, theta: Tensor, cosine: Tensor) -> Tensor:
        """psi (N,), differentiable. Without an angular margin, ``cosine`` is returned unchanged."""
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
        """-psi'(theta), (N,): the tangential pull on a positive pair; sin(theta + m1) where the margin applies."""
        if self.multiplier > 1:
            k = torch.floor(self.multiplier * theta / pi)
            return self.multiplier * (1 - 2 * (k % 2)) * torch.sin(self.multiplier * theta)
        beyond = torch.zeros_like(theta) if self.wide_angle == "clamp" else _sin(theta)
        if self.angular == 0:
            return _sin(theta)
        return torch.where(self._active(theta), torch.sin(theta + self.angular), beyond)

    def slope_factor(self, theta: Tensor) -> Tensor:
        """B = -psi'(theta) / sin(theta), (N,): 1 where the margin does not change the derivative; infinite at
        theta = 0 or pi if it does."""
        if self.keeps_angle:
            return torch.ones_like(theta)
        b = self.pull(theta) / _sin(theta)
        if self.multiplier == 1 and self.wide_angle != "exact":
            b = torch.where(self._active(theta), b, 0.0 if self.wide_angle == "clamp" else 1.0)
        return b

    def drop(self, theta: Tensor) -> Tensor:
        """cos(theta) - psi(theta) + m2, (N,), computed without cancellation: tau times delta, and the subtractive
        margin with the same effect on the logit."""
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
    """N positive pairs and the logsumexp of their negatives."""

    cosine: Tensor  # (N,) C, cosine of the positive pair
    theta: Tensor  # (N,) its angle in radians, from chord_angle
    negatives: Tensor | None  # (N,) n, logsumexp of the negative logits; None: no negatives
    # (), 0 with the gradient that the mean loss has through n, which is a constant then; None: n is differentiable
    push: Tensor | None = None


class Chunk(NamedTuple):
    """How many anchors are contrasted at a time. Their gradient is computed along with n, which needs its factor."""

    size: int
    push: Callable[[Pairs], Tensor]  # derivative (N,) of the anchors' losses by n


class Factors(NamedTuple):
    """Probabilities and gradient factors, detached; (N,) each except ``emphasis``."""

    p: Tensor  # P = sigmoid((psi - m2) / tau - n)
    p0: Tensor  # P0, without the margin
    one_minus_p: Tensor  # from a separate sigmoid, so accurate even if P rounds to 1
    one_minus_p0: Tensor
    delta: Tensor  # decrease of the positive logit
    logit: Tensor  # A = (1 - P) / (1 - P0), effect E3: scales the anchor's whole gradient
    slope: Tensor  # B, scales its positive part
    emphasis: Tensor  # (), E1 = sum of pulls / sum of pulls without the margin
    angle: Tensor  # E2 = B / E1; 1 where both are 0


def pull_sums(theta: Tensor, margin: Margin) -> Tensor:
    """Sums (2,) over the anchors of the pull with and without the margin, detached. Sum them over ranks
    before :func:`gradient_factors`, because E1 is defined for the global batch."""
    theta = theta.detach()
    return torch.stack([margin.pull(theta).sum(), _sin(theta).sum()])


def gradient_factors(pairs: Pairs, margin: Margin, *, temperature: float | Tensor, sums: Tensor) -> Factors:
    """The gradient factors for the given pairs. ``sums`` is the global :func:`pull_sums`.

    Without negatives all probabilities and A are 1, since such a loss has no logit effect. If the margin removes
    all pull (E1 and B are 0), E2 is set to 1.
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


def with_negatives(
    pairs: Pairs,
    anchors: Tensor,
    candidates: Tensor,
    excluded: Tensor,
    *,
    temperature: float | Tensor,
    chunk: Chunk | None,
) -> Pairs:
    """``pairs`` of the ``anchors`` (N, D) with n: log of the sum of exp(cosine / tau) over the anchor's negatives.

    Rows are unit vectors. ``excluded`` (N, k) has the indices of ``candidates`` (M, D) that are not negatives
    of an anchor: its positive, and itself if it is among them. With ``chunk``, the memory is O(size x M) instead of
    O(N x M); loss and gradient are the same, differentiable once.
    """
    if chunk is None:
        logits = product(anchors / temperature, candidates.T)
        return pairs._replace(negatives=logits.scatter(1, excluded, -torch.inf).logsumexp(dim=1))
    assert not isinstance(temperature, Tensor) or not temperature.requires_grad, "it would get no gradient"
    cosine, theta = pairs.cosine.detach(), pairs.theta.detach()
    log_sum, pull, push = stream(
        anchors.detach(),
        candidates.detach(),
        temperature=temperature,
        exclude=lambda rows, logits: logits.scatter_(1, excluded[rows], -torch.inf),
        weights=lambda rows, n: chunk.push(Pairs(cosine[rows], theta[rows], n)),
        pull=True,
        push=candidates.requires_grad,
        block=chunk.size,
    )
    scale = 1 / (len(anchors) * temperature)
    parts = (anchors, pull.mul_(scale)), (candidates, push.mul_(scale))
    return pairs._replace(negatives=log_sum, push=with_gradient(log_sum.new_zeros(()), *parts))
