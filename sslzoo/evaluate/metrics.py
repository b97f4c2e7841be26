"""What evaluations share: standardised features, top-k accuracy and how far to trust it."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.distributed import all_reduce_sum
from sslzoo.evaluate.task import CHUNK
from sslzoo.recipe.sections import PCA_WIDTH

# What the final evaluation measures, by the prefix of its keys in the summary.
FEATURES = {
    "": "trained encoder",
    "random_init_": "random init",
    "start_": "start (pretrained)",  # in place of random init, where the encoder began from weights
    "raw_pixels_": "raw pixels",
    "pca_": f"PCA-{PCA_WIDTH}",
}
Z95 = 1.959964  # of the normal distribution, 95 % lie within so many deviations


class Standardizer(NamedTuple):
    """Zero mean and unit variance by the statistics of a training set; constant features become 0."""

    mean: Tensor  # (F,)
    scale: Tensor  # (F,)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise ``x`` (N, F)."""
        return (x - self.mean) * self.scale


def standardizer(x: Tensor, rows: Tensor | None = None) -> Standardizer:
    """Fit a :class:`Standardizer` to ``x`` (N, F), or to its ``rows`` (indices), over all ranks, in chunks.

    Without any row it makes everything NaN.
    """
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    count = all_reduce_sum(x.new_tensor([len(rows)], dtype=torch.float64))
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        total += x[part].sum(0, dtype=torch.float64)
    mean = all_reduce_sum(total) / count
    total = torch.zeros_like(total)
    for part in rows.split(CHUNK):
        total += (x[part] - mean.to(x.dtype)).square().sum(0, dtype=torch.float64)
    var = all_reduce_sum(total) / count
    constant = var <= 1e-12 * var.amax().clamp_min(1e-30)
    return Standardizer(mean.to(x.dtype), torch.where(constant, 0.0, var.rsqrt()).to(x.dtype))


def within_top(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Whether the label is among the ``k`` largest of ``logits`` (..., N, C): bool (..., N).

    Of equal logits the smaller class comes first; logits that are not finite are never right.
    """
    label = label.expand(logits.shape[:-1]).unsqueeze(-1)
    own = logits.gather(-1, label)
    earlier = torch.arange(logits.shape[-1], device=logits.device) < label
    ahead = (logits > own) | ((logits == own) & earlier)
    return (ahead.sum(-1) < k) & logits.isfinite().all(-1)


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, a fraction, measured on ``n`` samples (Wilson, JASA 22, 1927)."""
    z = Z95 * Z95 / n
    centre = (accuracy + z / 2) / (1 + z)
    half = sqrt(accuracy * (1 - accuracy) * z + z * z / 4) / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)
