"""LARS by hand, parameter groups, and learning rates per group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslzoo.optim.optimizers import LARS, build_optimizer, set_learning_rate, split_decay
from sslzoo.recipe.sections import AdamConfig, LARSConfig, OptimConfig, SGDConfig

BASE: dict[str, Any] = {"lr": 1.0, "lr_scaling": "none", "weight_decay": 0.1, "warmup_epochs": 0.0}


def lars(p: nn.Parameter, lr: float = 0.5, **options: Any) -> LARS:
    base: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.001}
    return LARS([p], lr, **(base | options))


def test_lars_by_hand_over_two_steps_with_changing_rate() -> None:
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    p = nn.Parameter(w.clone())
    optimizer, buffer = lars(p), torch.zeros_like(w)
    for lr in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
        d = g + 0.1 * w
        buffer = 0.9 * buffer + d * 0.001 * w.norm() / d.norm()
        w = w - lr * buffer  # the rate multiplies the buffer as it is applied
        torch.testing.assert_close(p.data, w, rtol=1e-14, atol=0)


def test_lars_leaves_biases_raw_and_survives_zero_norms() -> None:
    bias = nn.Parameter(torch.tensor([1.0, 2.0]))
    bias.grad = torch.tensor([0.5, 0.5])
    lars(bias).step()
    torch.testing.assert_close(bias.data, torch.tensor([0.75, 1.75]))
    zero = nn.Parameter(torch.zeros(1, 2))
    zero.grad = torch.tensor([[1.0, 1.0]])
    lars(zero).step()  # no weight norm: the factor is 1
    torch.testing.assert_close(zero.data, torch.tensor([[-0.5, -0.5]]))
    still = nn.Parameter(torch.ones(1, 2))
    still.grad = torch.zeros(1, 2)
    lars(still, weight_decay=0.0).step()
    torch.testing.assert_close(still.data, torch.ones(1, 2))


def test_lars_clip_trust_never_exceeds_sgd() -> None:
    for trust in (0.001, 1000.0):
        p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        p.grad = torch.tensor([[0.6, 0.8]])
        lars(p, weight_decay=0.0, trust_coefficient=trust, clip_trust=True).step()
        factor = min(trust * 5 / 0.5, 1.0)
        torch.testing.assert_close(p.data, torch.tensor([[3.0, 4.0]]) - 0.5 * factor * p.grad)


def test_lars_group_may_switch_adaptation() -> None:
    on, off = (nn.Parameter(torch.ones(2)) for _ in range(2))
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 0.5}
    for p, adapt in ((on, True), (off, False)):
        p.grad = torch.tensor([0.0, 2.0])
        LARS([{"params": [p], "adapt": adapt}], 1.0, **options).step()
    torch.testing.assert_close(on.data, torch.tensor([1.0, 1 - 0.5 * 2**0.5]))
    torch.testing.assert_close(off.data, torch.tensor([1.0, -1.0]))


def test_lars_ignores_parameters_without_gradient_and_runs_closures() -> None:
    p, idle = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))
    optimizer = LARS([p, idle], 1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=1.0)

    def closure() -> float:
        (p * 2).sum().backward()
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert idle.item() == 1.0
    assert p.item() == 0.0


class Operations(TorchDispatchMode):
    """Counts the operations within it that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in ("detach", "unbind")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_trust", [False, True])
def test_lars_updates_all_parameters_together_as_it_would_each(clip_trust: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (3,), (4, 2, 3, 3), (1,)] * 10
    together, apart = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.5}
    options["clip_trust"] = clip_trust
    optimizers = [LARS(ps, 0.3, **options) for ps in (together, *([p] for p in apart))]
    operations = Operations()
    for _ in range(3):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        operations.count = 0
        with operations:
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))
    assert operations.count < 30  # a loop over the 20 matrices takes over 200


def test_split_decay_and_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    decayed, plain = split_decay(model.named_parameters(), decay_1d=False)
    assert [p.ndim for p in decayed] == [2]
    assert [p.ndim for p in plain] == [1, 1, 1]
    assert len(split_decay(model.named_parameters(), decay_1d=True)[0]) == 4
    groups = [{"named": list(model[0].named_parameters()), "lr_factor": 10.0, "mark": "x"}]
    optimizer = build_optimizer(groups, SGDConfig(**BASE), fused=True)
    assert [(g["weight_decay"], g["lr_factor"], g["mark"]) for g in optimizer.param_groups] == [
        (0.1, 10.0, "x"),
        (0.0, 10.0, "x"),
    ]
    set_learning_rate(optimizer, 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LARSConfig(**BASE), LARS),
        (SGDConfig(**BASE), torch.optim.SGD),
        (AdamConfig(**BASE, name="adamw"), torch.optim.AdamW),
        (AdamConfig(**BASE, name="adam"), torch.optim.Adam),
    ],
)
def test_optimizers_by_config(config: OptimConfig, kind: type) -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer([{"named": list(model.named_parameters())}], config, fused=True)
    assert type(optimizer) is kind
    assert all(g["lr"] == 0.0 for g in optimizer.param_groups)
    assert [g["lr_factor"] for g in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_fused_where_it_may_be(name: Any) -> None:
    named = [{"named": list(nn.Linear(2, 2).named_parameters())}]
    for fused in (False, True):
        optimizer = build_optimizer(named, AdamConfig(**BASE, name=name), fused=fused)
        assert [group["fused"] for group in optimizer.param_groups] == [fused] * 2


def test_sgd_with_decay_1d_decays_everything() -> None:
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(
        [{"named": list(model.named_parameters())}],
        SGDConfig(**BASE, decay_1d=True, momentum=0.0),
        fused=True,
    )
    set_learning_rate(optimizer, 1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p.item() for p in model.parameters()] == [pytest.approx(0.9)] * 2
