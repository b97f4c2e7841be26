"""Build the optimiser of a recipe: LARS (defined here), or SGD, Adam and AdamW from torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from sslzoo.recipe.sections import LARSConfig, OptimConfig, SGDConfig

FUSED = ("cpu", "cuda")  # devices on which torch updates all parameters by one kernel per group


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888) in the form SSL papers use.

    For parameters with more than one dimension: d = g + wd * w, then d <- d * (trust * |w| / |d|), where
    the factor is 1 if either norm is 0. Parameters with at most one dimension use the raw gradient,
    without weight decay. Then buffer <- momentum * buffer + d and w <- w - lr * buffer, so a change of the
    learning rate also scales past gradients. ``clip_trust`` limits factor / lr to 1, so that a step never
    exceeds that of plain SGD. A group's ``adapt=False`` disables weight decay and trust ratio for the
    group; ``adapt=True`` enables them for 1-d parameters too; by default the number of dimensions decides.
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
        """Perform one update, without a host-device synchronisation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers = [self._buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            raw, adapted = [], []  # positions in params
            for i, p in enumerate(params):
                (adapted if group.get("adapt", p.ndim > 1) else raw).append(i)
            if raw:
                torch._foreach_add_([buffers[i] for i in raw], [_grad(params[i]) for i in raw])
            if adapted:
                updates = self._adapt([params[i] for i in adapted], group)
                torch._foreach_add_([buffers[i] for i in adapted], updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    @staticmethod
    def _adapt(params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The updates d of ``params``, with weight decay and trust ratio. The factors of all parameters are computed
        together, so that a GPU starts one kernel for each parameter, to apply its factor, and few others."""
        updates = list(torch._foreach_mul(params, group["weight_decay"]))
        torch._foreach_add_(updates, [_grad(p) for p in params])
        weight_norms = torch.stack(torch._foreach_norm(params))
        update_norms = torch.stack(torch._foreach_norm(updates))
        factors = group["trust_coefficient"] * weight_norms / update_norms
        if group["clip_trust"] and group["lr"] > 0:
            factors = (factors / group["lr"]).clamp(max=1.0)
        factors = torch.where((weight_norms > 0) & (update_norms > 0), factors, torch.ones_like(factors))
        torch._foreach_mul_(updates, factors.unbind())
        return updates


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def split_decay(
    named: Iterable[tuple[str, nn.Parameter]], *, decay_1d: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those with and those without weight decay. Biases and norm parameters
    (ndim <= 1) get none unless ``decay_1d``."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, p in named:
        (decayed if decay_1d or p.ndim > 1 else plain).append(p)
    return decayed, plain


def build_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Build the optimiser that ``cfg`` describes for ``groups`` (see ``SSLMethod.parameter_groups``).

    Each group is split by weight decay; its other keys are kept. The learning rate is 0 until
    :func:`set_learning_rate` sets it, before every step. ``fused``: whether torch's fused kernels may be used for Adam
    and AdamW.
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
    fused = fused and all(p.device.type in FUSED for group in split for p in group["params"])
    return adam(split, lr=0.0, betas=cfg.betas, fused=fused)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its ``lr_factor``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
