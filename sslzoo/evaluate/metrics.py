"""Shared by evaluations: standardised features, top-k accuracy, and its confidence interval."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.distributed import all_reduce_sum
from sslzoo.evaluate.task import Features

Z95 = 1.959964  # 95 % of a normal distribution is within this many standard deviations


class Standardizer(NamedTuple):
    """Standardises features to zero mean and unit variance on a training set; constant features become 0."""

    mean: Tensor  # (F,)
    scale: Tensor  # (F,)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise ``x`` (N, F)."""
        return (x - self.mean) * self.scale


def standardizer(data: Features, rows: Tensor) -> Standardizer:
    """Fit a :class:`Standardizer` to ``rows`` (indices) of ``data`` over all ranks, in chunks.

    If there are no rows, its results are NaN.
    """
    count = all_reduce_sum(torch.tensor([len(rows)], dtype=torch.float64, device=data.device))
    total = count.new_zeros(data.x.shape[1])
    for x, _ in data.chunks(rows):
        total += x.sum(0, dtype=torch.float64)
    mean = all_reduce_sum(total) / count
    total = torch.zeros_like(total)
    for x, _ in data.chunks(rows):
        total += (x - mean.to(x.dtype)).square().sum(0, dtype=torch.float64)
    var = all_reduce_sum(total) / count
    constant = var <= 1e-12 * var.amax().clamp_min(1e-30)
    scale = torch.where(constant, 0.0, var.rsqrt())
    return Standardizer(mean.to(data.x.dtype), scale.to(data.x.dtype))


def within_top(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Whether ``label`` (N,) is among the ``k`` largest of ``logits`` (..., N, C): bool (..., N).

    Ties are broken in favour of the smaller class; rows with non-finite logits are never correct.
    """
    label = label.expand(logits.shape[:-1]).unsqueeze(-1)
    correct = logits.gather(-1, label)
    earlier = torch.arange(logits.shape[-1], device=logits.device) < label
    ahead = (logits > correct) | ((logits == correct) & earlier)
    return (ahead.sum(-1) < k) & logits.isfinite().all(-1)


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy (a fraction) measured on ``n`` samples (Wilson, JASA 22, 1927)."""
    z = Z95 * Z95 / n
    centre = (accuracy + z / 2) / (1 + z)
    half = sqrt(accuracy * (1 - accuracy) * z + z * z / 4) / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)
