"""Momentum encoder: an exponential moving average (EMA) of an online network."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """A frozen copy of ``modules``, applied in sequence and updated by :meth:`update`.

    Only parameters are averaged; the copy runs in training mode and has its own batch-norm statistics.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(deepcopy(module) for module in modules)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Output of the last module, without gradients."""
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def update(self, *modules: nn.Module, coefficient: float) -> None:
        """Update every parameter: target <- coefficient * target + (1 - coefficient) * online."""
        online = [p.detach() for module in modules for p in module.parameters()]
        target = [p.detach() for p in self.layers.parameters()]
        assert len(online) == len(target), "update() takes the modules that the encoder was built from"
        torch._foreach_lerp_(target, online, 1.0 - coefficient)
