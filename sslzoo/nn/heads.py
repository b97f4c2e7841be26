"""Projectors and predictors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sslzoo.checks import one_of, require


def mlp(
    widths: Sequence[int],
    *,
    hidden_norm: bool = True,
    hidden_bias: bool | None = None,
    output_norm: str = "none",
    output_bias: bool = True,
) -> nn.Sequential:
    """Linear layers of the given ``widths`` (input first) with BN and ReLU between them.

    ``hidden_bias`` of None leaves the bias out exactly where a batch norm follows. ``output_norm``:
    ``none``, ``batch``, ``batch_no_affine`` (no scale, no shift) or ``batch_no_shift`` (shift frozen at 0).
    """
    require(len(widths) >= 2, f"an MLP needs an input and an output width, got {tuple(widths)}")
    one_of("output_norm", output_norm, ("none", "batch", "batch_no_affine", "batch_no_shift"))
    hidden_bias = not hidden_norm if hidden_bias is None else hidden_bias
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(fan_in, fan_out, bias=hidden_bias))
        if hidden_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=output_bias))
    if output_norm != "none":
        norm = nn.BatchNorm1d(widths[-1], affine=output_norm != "batch_no_affine")
        if output_norm == "batch_no_shift":
            norm.bias.requires_grad_(False)
        layers.append(norm)
    return nn.Sequential(*layers)
