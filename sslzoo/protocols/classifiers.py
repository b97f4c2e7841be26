"""The linear classifiers of a protocol, trained together on the same steps.

Shapes: N samples of this rank in a step, F features, C classes, L classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sslzoo.distributed import all_reduce_sum, world_size
from sslzoo.evaluate.metrics import within_top
from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.randomness import key


class Length(NamedTuple):
    """Length of a training in steps."""

    per_epoch: int
    total: int


class Classifiers:
    """One linear classifier for each kind of features and each learning rate of ``protocol``.

    ``widths`` has the number of features of each kind. Weights are initialised from ``seed``, equal on all ranks.
    """

    def __init__(
        self,
        protocol: ViewProtocol,
        widths: Mapping[str, int],
        classes: int,
        length: Length,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.protocol, self.length = protocol, length
        scale = protocol.batch_size / 256 if protocol.lr_scaling == "linear" else 1.0
        self.layers = [layer for layer in widths for _ in protocol.lrs]
        self.lrs = [lr * scale for _ in widths for lr in protocol.lrs]  # of the first step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("linear classifiers", seed))
            made = [_linear(protocol, widths[layer], classes, dtype) for layer in self.layers]
        self.linear = nn.ModuleList(made).to(device)
        groups = [
            {"params": list(part.parameters()), "lr": lr}
            for part, lr in zip(self.linear, self.lrs, strict=True)
        ]
        self.optimizer = _optimizer(protocol, groups)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # samples added since the last step

    @property
    def names(self) -> list[str]:
        """A description of each classifier."""
        return [
            ", ".join(part for part in (f"rate {lr:.3g}", layer) if part)
            for lr, layer in zip(self.lrs, self.layers, strict=True)
        ]

    def add(self, features: Mapping[str, Tensor], label: Tensor) -> None:
        """Add a part of this rank's share of a step: features (N, F) by kind, and labels (N,). Rows that are not finite
        are left out."""
        finite = torch.stack([x.isfinite().all(1) for x in features.values()]).all(0)
        self._count += finite.sum()
        with torch.enable_grad():
            logits = self._logits({name: x[finite] for name, x in features.items()})
            losses = [F.cross_entropy(part, label[finite], reduction="sum") for part in logits]
            torch.stack(losses).sum().backward()

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Take step ``step`` (from 0) with the mean loss of all samples added on all ranks. Collective."""
        count = all_reduce_sum(self._count)
        for parameter in self.linear.parameters():
            if parameter.grad is None:  # this rank has no share of the first step
                parameter.grad = torch.zeros_like(parameter)
            if world_size() > 1:
                dist.all_reduce(parameter.grad)
            parameter.grad /= count.clamp_min(1)
        factor = self.protocol.rate_factor(step, *self.length)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._count.zero_()

    @torch.no_grad()
    def correct(self, features: Mapping[str, Tensor], label: Tensor) -> Tensor:
        """Numbers of rows that are correct at top-1 and at top-5, int64 (2, L)."""
        logits = self._logits(features)
        return torch.stack(
            [torch.stack([within_top(part, label, k).sum() for part in logits]) for k in (1, 5)]
        )

    def _logits(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        return [part(features[layer]) for part, layer in zip(self.linear, self.layers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimiser's state."""
        return {"linear": self.linear.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.linear.load_state_dict(state["linear"])
        self.optimizer.load_state_dict(state["optimizer"])


def _linear(protocol: ViewProtocol, width: int, classes: int, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(width, classes)
    if protocol.initial != "default":
        nn.init.normal_(made.weight, std=0.01 if protocol.initial == "normal" else 0.0)
        nn.init.zeros_(made.bias)
    return made.to(dtype)


def _optimizer(protocol: ViewProtocol, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if protocol.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
        weight_decay=protocol.weight_decay,
    )
