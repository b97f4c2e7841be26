"""Projectors and predictors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sslzoo.checks import require
from sslzoo.recipe.sections import HeadConfig, OutputNorm


def build_head(width_in: int, cfg: HeadConfig) -> nn.Sequential:
    """Build the head that ``cfg`` describes, for inputs (N, ``width_in``)."""
    return mlp(
        (width_in, *cfg.widths),
        hidden_norm=cfg.hidden_norm,
        hidden_bias=cfg.hidden_bias,
        output_norm=cfg.output_norm,
        output_bias=cfg.output_bias,
    )


def mlp(
    widths: Sequence[int],
    *,
    hidden_norm: bool = True,
    hidden_bias: bool = False,
    output_norm: OutputNorm = "none",
    output_bias: bool = True,
) -> nn.Sequential:
    """An MLP: linear layers of the given ``widths`` (input first) with batch norm and ReLU between them.

    Hidden layers before a batch norm have a bias only with ``hidden_bias``. ``output_norm``: ``none``,
    ``batch``, ``batch_no_affine`` (no scale, no shift) or ``batch_no_shift`` (shift frozen at 0).
    """
    require(len(widths) >= 2, f"an MLP needs an input and an output width, got {tuple(widths)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(fan_in, fan_out, bias=hidden_bias or not hidden_norm))
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
