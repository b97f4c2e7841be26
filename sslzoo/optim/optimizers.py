"""Optimisers: LARS, written here, and torch's own, behind one set of parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from sslzoo.recipe.sections import LARSConfig, OptimConfig, SGDConfig


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888) in the form the SSL papers use.

    For a parameter with more than one dimension: d = g + wd * w, then d * (trust * |w| / |d|), where
    the factor is 1 if either norm is 0. Parameters with at most one dimension take the raw gradient,
    without decay. buffer <- momentum * buffer + d; w <- w - lr * buffer: the rate multiplies the
    buffer as it is applied. ``clip_trust`` caps factor/lr at 1, so that a step never exceeds plain SGD's.
    A group's ``adapt`` of False switches both decay and trust ratio off for it, of True on for 1-d
    parameters as well; left out, the number of dimensions decides.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
        clip_trust: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "clip_trust": clip_trust,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; norms stay on the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [self._direction(p, group) for p in params]
            buffers = [self._buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    @staticmethod
    def _direction(p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        if not group.get("adapt", p.ndim > 1):
            return p.grad
        d = p.grad + group["weight_decay"] * p
        weight_norm, d_norm = p.norm(), d.norm()
        factor = group["trust_coefficient"] * weight_norm / d_norm
        if group["clip_trust"] and group["lr"] > 0:
            factor = (factor / group["lr"]).clamp(max=1.0)
        return d * torch.where((weight_norm > 0) & (d_norm > 0), factor, torch.ones_like(factor))


def split_decay(
    named: Iterable[tuple[str, nn.Parameter]], *, decay_1d: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: biases and norm parameters (ndim <= 1) have none
    unless ``decay_1d``."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, p in named:
        (decayed if decay_1d or p.ndim > 1 else plain).append(p)
    return decayed, plain


def build_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that ``cfg`` names over ``groups`` (see ``SSLMethod.parameter_groups``).

    Each group is split by weight decay; other keys of a group are kept. The rate starts at 0 and is
    set before every step by :func:`set_learning_rate`.
    """
    decay_1d = not isinstance(cfg, LARSConfig) and cfg.decay_1d
    split: list[dict[str, Any]] = []
    for group in groups:
        extra = {"lr_factor": 1.0} | {key: value for key, value in group.items() if key != "named"}
        decayed, plain = split_decay(group["named"], decay_1d=decay_1d)
        if decayed:
            split.append({"weight_decay": cfg.weight_decay} | extra | {"params": decayed})
        if plain:
            split.append(extra | {"params": plain, "weight_decay": 0.0})
    if isinstance(cfg, LARSConfig):
        return LARS(
            split,
            lr=0.0,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            trust_coefficient=cfg.trust_coefficient,
            clip_trust=cfg.clip_trust,
        )
    if isinstance(cfg, SGDConfig):
        return torch.optim.SGD(split, lr=0.0, momentum=cfg.momentum, nesterov=cfg.nesterov)
    adam = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
    return adam(split, lr=0.0, betas=cfg.betas)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_factor``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
