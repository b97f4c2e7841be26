"""The bilevel step: the generators' gradient of the objective after a virtual step of the encoder.

theta are the encoder's parameters, omega the generators'; for equation numbers, see the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sslzoo.distributed import all_reduce_mean, world_size
from sslzoo.nn.numerics import autocast_off
from sslzoo_methods.metaug.config import MetaConfig
from sslzoo_methods.metaug.loss import Objective
from sslzoo_methods.metaug.objective import INNER, OUTER

Parameters = Mapping[str, Tensor]


class MetaGradient(NamedTuple):
    """Result of the bilevel step on this rank; only the inner gradient is averaged over ranks."""

    inner: Tensor  # L(theta, omega)
    outer: Tensor  # L(theta-hat, omega)
    virtual: dict[str, Tensor]  # theta-hat, detached
    direct: list[Tensor]  # gradient with respect to omega at constant theta-hat
    indirect: list[Tensor]  # gradient with respect to omega through theta-hat; zeros for order 1

    @property
    def total(self) -> list[Tensor]:
        """The full gradient with respect to omega, in the order of omega."""
        return [a + b for a, b in zip(self.direct, self.indirect, strict=True)]


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Mean over ranks of each tensor, with a single collective; differentiable to any order."""
    if world_size() == 1:
        return list(tensors)
    flat = all_reduce_mean(torch.cat([t.flatten() for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def meta_gradient(
    inner: Callable[[Parameters], Tensor],
    outer: Callable[[Parameters], Tensor],
    theta: Parameters,
    omega: Sequence[Tensor],
    *,
    virtual_lr: float,
    order: int,
    sync: bool,
) -> MetaGradient:
    """d/d omega of outer(theta - virtual_lr * d inner / d theta), by the chain rule at theta-hat.

    ``inner`` and ``outer`` map theta to the objective and use omega through a closure. The tensors in ``theta``
    and ``omega`` must be leaves that require gradients; ``.grad`` is not changed and DDP's hooks do not run.
    ``order=1`` omits the second derivatives. ``sync`` averages the inner gradient over ranks, within the graph;
    without it, the result depends on the number of ranks.
    """
    names, leaves = list(theta), list(theta.values())
    value = inner(theta)
    with autocast_off(value):
        h = _gradient(value, leaves, create_graph=order == 2)
        h = mean_over_ranks(h) if sync else h
        virtual = [t - virtual_lr * g for t, g in zip(leaves, h, strict=True)]
    held = [t.detach().requires_grad_() for t in virtual]
    after = outer(dict(zip(names, held, strict=True)))
    with autocast_off(after):
        if order == 1:
            direct = _gradient(after, omega)
            indirect = [torch.zeros_like(w) for w in omega]
        else:
            # One backward pass through the outer graph gives both factors of the chain rule.
            grads = _gradient(after, [*omega, *held])
            direct, at_virtual = grads[: len(omega)], grads[len(omega) :]
            indirect = list(
                torch.autograd.grad(virtual, omega, at_virtual, allow_unused=True, materialize_grads=True)
            )
    detached = {name: t.detach() for name, t in zip(names, held, strict=True)}
    return MetaGradient(value.detach(), after.detach(), detached, direct, indirect)


def _gradient(loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    grads = torch.autograd.grad(
        loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(grads)


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, for a forward pass that must not change the running statistics."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def bilevel(
    network: nn.Module,
    generators: nn.Module,
    views: Sequence[Tensor],
    global_views: int,
    objective: Callable[[list[Tensor], list[Tensor], int], Objective],
    cfg: MetaConfig,
) -> MetaGradient:
    """The generators' gradient (equations 6 to 9) at the current parameters.

    ``objective`` takes embeddings, generated features of the first ``global_views`` views, and the pass (INNER or
    OUTER). Parameters, ``.grad`` and the network's buffers do not change; the generators' running statistics are
    updated once, in the outer pass. Only the inner gradient is averaged over ranks.
    """
    torch.clear_autocast_cache()  # it contains half-precision copies of the weights before the step
    full = nullcontext() if cfg.autocast else autocast_off(views[0])
    with full, sdpa_kernel(SDPBackend.MATH):  # flash attention has no second derivative
        theta = {n: p.detach().requires_grad_() for n, p in network.named_parameters() if p.requires_grad}
        omega = {n: p.detach().requires_grad_() for n, p in generators.named_parameters()}
        passed: Sequence[Tensor] | None = None
        if cfg.virtual_params == "projector":
            theta = {n: p for n, p in theta.items() if n.startswith("projector.")}
            with torch.no_grad():
                passed, _ = functional_call(network, copied_buffers(network), (views,))

        def evaluate(params: Parameters, statistics: Parameters, call: int) -> Tensor:
            z = functional_call(network, {**params, **copied_buffers(network)}, (views, passed))[1]
            generated = functional_call(generators, {**omega, **statistics}, (z[:global_views],))
            return objective(z, generated, call).loss

        return meta_gradient(
            lambda t: evaluate(t, copied_buffers(generators), INNER),
            lambda t: evaluate(t, {}, OUTER) * cfg.loss_scale,
            theta,
            list(omega.values()),
            virtual_lr=cfg.virtual_lr,
            order=cfg.order,
            sync=cfg.sync_virtual_step,
        )
