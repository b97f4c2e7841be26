"""Measurements on batches of embeddings, and the effects of margins computed from them (arXiv:2306.11526).

Notation as in sslzoo_methods.margin.factors. An observation does not depend on a margin, so the same observation
serves any number of margins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslzoo.batch import Contrast
from sslzoo.checks import require
from sslzoo.distributed import gather_detached, rank
from sslzoo.nn.numerics import autocast_off, ieee_matmul, normalize
from sslzoo_methods.margin.factors import Factors, Margin, Pairs, chord_angle, gradient_factors, pull_sums

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Beginnings of the scalars that are the same for all margins.
OF_PAIRS = ("theta_", "p0", "saturated_", "alignment", "uniformity", "negative_cosine_")
CHUNK = 1024  # anchors whose similarities are computed at a time


class Observation(NamedTuple):
    """Measurements for N anchors and their candidates, (N,) each."""

    cosine: Tensor  # cosine of the positive pair
    theta: Tensor  # its angle in radians
    negatives: Tensor  # logsumexp of the negative logits
    lateral: Tensor  # mean sine of the angles to the negatives, weighted by their softmax
    push: Tensor  # length of the tangential part of the negatives' softmax-weighted mean
    along: Tensor  # component of that part in the direction of the positive
    negative_mean: Tensor  # mean cosine of the negatives
    negative_max: Tensor  # largest cosine of the negatives
    uniformity: Tensor  # log mean exp(-2 |u - v|^2) over the negatives

    @property
    def pairs(self) -> Pairs:
        """The part that :func:`gradient_factors` needs."""
        return Pairs(self.cosine, self.theta, self.negatives)


@torch.no_grad()
def observe(anchors: Tensor, positives: Tensor, *, temperature: float) -> Observation:
    """Compare ``anchors`` (n, D) of this rank with the ``positives`` (n, D) gathered from all ranks: row i is the
    positive of anchor i, all others are its negatives. Inputs need not be normalised. Returns the measurements
    (N,) for all ranks' anchors in rank order, equal on all ranks. Collective.
    """
    u, v = normalize(anchors), normalize(positives)
    candidates = gather_detached(v)
    require(
        len(candidates) > 1,
        "the analysis margins needs at least two samples, because the negatives are the other samples",
    )
    own = rank() * len(u) + torch.arange(len(u), device=u.device)
    parts = [
        _observe(u[rows], v[rows], candidates, own[rows], temperature)
        for rows in torch.arange(len(u), device=u.device).split(CHUNK)
    ]
    return Observation(*gather_detached(torch.cat(parts)).unbind(dim=1))


def _observe(u: Tensor, v: Tensor, candidates: Tensor, own: Tensor, temperature: float) -> Tensor:
    """The columns of an Observation, (n, 9)."""
    with autocast_off(u), ieee_matmul():
        cosines = u @ candidates.T  # (n, M)
        others = cosines.scatter(1, own[:, None], -torch.inf)
        logits = others / temperature
        n = logits.logsumexp(dim=1)
        share = torch.exp(logits - n[:, None])  # 0 at the positive
        centre = share @ candidates
        cosine = (u * v).sum(dim=1)
        direction = v - cosine[:, None] * u
        direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True).clamp_min(1e-12)
        push = centre - (centre * u).sum(dim=1, keepdim=True) * u
        sines = (1 - cosines.clamp(-1, 1).square()).sqrt()
        count = candidates.shape[0] - 1
        total = cosines.sum(dim=1) - cosines.gather(1, own[:, None])[:, 0]
        spread = (4 * others - 4).logsumexp(dim=1) - torch.tensor(float(count)).log()
        columns = (
            cosine,
            chord_angle(u, v),
            n,
            (share * sines).sum(dim=1),
            torch.linalg.vector_norm(push, dim=1),
            (push * direction).sum(dim=1),
            total / count,
            others.amax(dim=1),
            spread,
        )
    return torch.stack(columns, dim=1)


def join(observations: Sequence[Observation]) -> Observation:
    """Concatenate the rows of several observations."""
    return Observation(*(torch.cat(column) for column in zip(*observations, strict=True)))


def factors(seen: Observation, margin: Margin, *, temperature: float) -> Factors:
    """The gradient factors of ``margin`` for these embeddings, with E1 over all of them."""
    sums = pull_sums(seen.theta, margin)
    return gradient_factors(seen.pairs, margin, temperature=temperature, sums=sums)


def margin_statistics(seen: Observation, margin: Margin, *, temperature: float) -> dict[str, float]:
    """Scalar statistics of one margin for these embeddings; angles in degrees.

    ``log_emphasis + log_angle + log_logit`` is the mean log factor of the positive part of the gradient,
    over the samples whose B is positive and finite; ``without_log`` is the number of other samples.
    """
    f, theta = factors(seen, margin, temperature=temperature), seen.theta
    degrees = torch.rad2deg(theta)
    pull = margin.pull(theta)
    usable = (f.slope > 0) & f.slope.isfinite() & (f.angle > 0) & f.angle.isfinite()
    quantiles = torch.quantile(degrees, torch.tensor(QUANTILES, dtype=degrees.dtype, device=degrees.device))
    stats: dict[str, Tensor] = {
        "theta_mean": degrees.mean(),
        "theta_std": degrees.std(correction=0),
        **{f"theta_q{round(100 * q):02d}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "p": f.p.mean(),
        "p0": f.p0.mean(),
        "delta": f.delta.mean(),
        "negative_multiplier": f.delta.mean().exp(),
        "saturated_90": (f.p0 > 0.9).double().mean(),
        "saturated_99": (f.p0 > 0.99).double().mean(),
        "emphasis": f.emphasis,
        "beyond_neutral_angle": (theta > margin.neutral_angle).double().mean(),
        "beyond_pi": (theta + margin.angular > pi).double().mean(),
        "pull_to_push": (f.one_minus_p * pull).sum() / (f.one_minus_p * seen.lateral).sum(),
        "alignment": (2 - 2 * seen.cosine).mean(),
        "uniformity": seen.uniformity.logsumexp(0) - torch.tensor(float(len(theta))).log(),
        "negative_cosine_mean": seen.negative_mean.mean(),
        "negative_cosine_max": seen.negative_max.max(),
    }
    for name, every in (("angle", f.angle), ("logit", f.logit), ("slope", f.slope)):
        value = every[every.isfinite()]
        if len(value):
            stats |= {f"{name}_mean": value.mean(), f"{name}_std": value.std(correction=0)}
            stats |= {f"{name}_min": value.min(), f"{name}_max": value.max()}
    if usable.any():
        stats["log_emphasis"] = f.emphasis.log()
        stats["log_angle"] = f.angle[usable].log().mean()
        stats["log_logit"] = f.logit[usable].log().mean()
    result = dict(zip(stats, torch.stack([v.double() for v in stats.values()]).tolist(), strict=True))
    result["without_log"] = float((~usable).sum())
    return result


def per_sample(seen: Observation, margin: Margin, *, temperature: float) -> dict[str, Tensor]:
    """Values per sample: angle (in degrees), probabilities, factors, and the lengths of the gradients of its loss
    with respect to its unit embedding."""
    f = factors(seen, margin, temperature=temperature)
    pull = margin.pull(seen.theta)
    squared = pull.square() - 2 * pull * seen.along + seen.push.square()
    return {
        "theta": torch.rad2deg(seen.theta),
        "p0": f.p0,
        "p": f.p,
        "one_minus_p0": f.one_minus_p0,
        "one_minus_p": f.one_minus_p,
        "delta": f.delta,
        "logit_factor": f.logit,
        "slope_factor": f.slope,
        "angle_factor": f.angle,
        "positive_gradient": f.one_minus_p * pull.abs() / temperature,
        "total_gradient": f.one_minus_p * squared.clamp_min(0).sqrt() / temperature,
    }


class Seen(NamedTuple):
    """The observations of one or several batches."""

    temperature: float
    by_kind: dict[str, Observation]  # by kind of pair: global, and local or any other


def see(contrast: Contrast, *, temperature: float | None, name: str) -> Seen:
    """Observe the pairs of the method ``name`` at ``temperature``, or at the method's temperature if that is None.

    Raises ``ValueError`` if there is no temperature, or no pairs of global views.
    """
    tau = contrast.temperature if temperature is None else temperature
    if tau is None:
        raise ValueError(
            f"{name} has no temperature: set one for the analysis margins, such as temperature: 0.2, or "
            "--temperature 0.2 on the command line"
        )
    require(
        "global" in contrast.pairs,
        f"{name}: contrasted() must return pairs of global views under 'global'",
    )
    return Seen(tau, {kind: observe(*pair, temperature=tau) for kind, pair in contrast.pairs.items()})


def together(seen: Sequence[Seen]) -> Seen:
    """Combine several batches; each anchor keeps the negatives of its own batch."""
    temperature, first = seen[0]
    if len(seen) == 1:
        return seen[0]
    return Seen(temperature, {kind: join([s.by_kind[kind] for s in seen]) for kind in first})


def describe(seen: Seen, margins: Mapping[str, Margin]) -> dict[str, Any]:
    """For pairs of global views: the temperature, a histogram of the angles in 36 bins of 5 degrees, and the scalars of
    every margin; for other pairs, histogram and scalars under the name of their kind."""
    tau = seen.temperature
    described = {
        kind: {
            "histogram": angle_histogram(s.theta).tolist(),
            "margins": grid_statistics(s, margins, temperature=tau),
        }
        for kind, s in seen.by_kind.items()
    }
    return {"temperature": tau} | described.pop("global") | described


def metrics(described: Mapping[str, Any]) -> dict[str, float]:
    """Scalars named ``margins/theta_mean`` etc. for the first margin. Those of other margins that depend on the margin
    are named ``margins/p/m1=..,m2=..``; those of other kinds of pairs ``margins/p/local`` and
    ``margins/p/local/m1=..,m2=..``."""
    values = _named(described["margins"], "")
    for kind, part in described.items():
        if isinstance(part, dict) and kind != "margins":
            values |= _named(part["margins"], f"/{kind}")
    return values


def _named(scalars: Mapping[str, Mapping[str, float]], kind: str) -> dict[str, float]:
    first, *others = scalars
    values = {f"margins/{key}{kind}": value for key, value in scalars[first].items()}
    return values | {
        f"margins/{key}{kind}/{name}": value
        for name in others
        for key, value in scalars[name].items()
        if not key.startswith(OF_PAIRS)
    }


def grid_statistics(
    seen: Observation, margins: Mapping[str, Margin], *, temperature: float
) -> dict[str, dict[str, float]]:
    """The scalars of each margin for the same embeddings."""
    return {
        name: margin_statistics(seen, margin, temperature=temperature) for name, margin in margins.items()
    }


def angle_histogram(theta: Tensor, bins: int = 36) -> Tensor:
    """Counts (``bins``,) int64 of angles in equal bins from 0 to 180 degrees, which include their lower edge;
    the last also includes its upper edge."""
    degrees = torch.rad2deg(theta.detach().double())
    index = (degrees * (bins / 180)).floor().long().clamp(0, bins - 1)
    return torch.bincount(index, minlength=bins)
