"""What linear evaluations share: standardised features and top-k accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum
from sslzoo.recipe.sections import PCA_WIDTH

# What the final evaluation measures, by the prefix of its keys in the summary.
FEATURES = {
    "": "trained encoder",
    "random_init_": "random init",
    "start_": "start (pretrained)",  # in place of random init, where the encoder began from weights
    "raw_pixels_": "raw pixels",
    "pca_": f"PCA-{PCA_WIDTH}",
}


class Standardizer(NamedTuple):
    """Zero mean and unit variance by the statistics of a training set; constant features become 0."""

    mean: Tensor  # (F,)
    scale: Tensor  # (F,)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise ``x`` (N, F)."""
        return (x - self.mean) * self.scale


def standardizer(x: Tensor) -> Standardizer:
    """Fit a :class:`Standardizer` to ``x`` (N, F), over all ranks."""
    count = all_reduce_sum(x.new_tensor([len(x)], dtype=torch.float64))
    require(bool(count > 0), "a linear probe needs at least one training sample")
    mean = all_reduce_sum(x.sum(0, dtype=torch.float64)) / count
    var = all_reduce_sum((x - mean.to(x.dtype)).square().sum(0, dtype=torch.float64)) / count
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
