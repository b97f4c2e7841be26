"""Measurements whose value is not a mean over images, such as a standard deviation, as functions of means.

What a step measures is averaged over steps, micro-batches and processes. The average of standard deviations or ratios
would depend on how the images are divided; that of what they are computed from does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.nn.numerics import at_least_float32


def moments(rows: Tensor) -> Tensor:
    """Means and mean squares (2, D) of ``rows`` (N, D), in at least float32; see :func:`reported`."""
    rows = at_least_float32(rows)
    return torch.stack([rows, rows.square()]).mean(dim=1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The pair (2,) of two scalars; see :func:`reported`."""
    return torch.stack([numerator, denominator])


def reported(mean: Tensor) -> float:
    """The value of a measurement with the average ``mean``.

    That of a scalar is itself; of a :func:`ratio` (2,) the quotient, 0 if both are 0; of :func:`moments` (2, D) the
    mean standard deviation of the D columns times sqrt(D), which is 1 for rows spread evenly over the unit sphere and
    0 for equal rows.
    """
    if mean.ndim == 0:
        return mean.item()
    if mean.ndim == 1:
        numerator, denominator = mean.tolist()
        return numerator / denominator if denominator else (0.0 if numerator == 0 else float("nan"))
    first, square = mean
    deviation = (square - first.square()).clamp_min(0).sqrt()
    return deviation.mean().item() * mean.shape[1] ** 0.5
