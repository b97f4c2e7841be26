"""The momentum encoder."""

from __future__ import annotations

import torch
from torch import nn

from sslzoo.nn.momentum import MomentumEncoder


def online() -> tuple[nn.Sequential, nn.Linear]:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)


def test_starts_as_a_frozen_copy_applied_in_sequence() -> None:
    trunk, head = online()
    ema = MomentumEncoder(trunk, head)
    x = torch.randn(5, 3, requires_grad=True)
    y = ema(x)
    torch.testing.assert_close(y, head(trunk(x)))
    assert not y.requires_grad
    assert not any(p.requires_grad for p in ema.parameters())
    with torch.no_grad():
        head.bias.add_(1.0)
    assert not torch.equal(ema(x), head(trunk(x)))


def test_update_averages_parameters_and_no_statistics() -> None:
    trunk, head = online()
    ema = MomentumEncoder(trunk, head)
    before = [p.clone() for p in ema.parameters()]
    with torch.no_grad():
        for p in (*trunk.parameters(), *head.parameters()):
            p.add_(1.0)
        trunk(torch.randn(6, 3))  # moves the online statistics only
    ema.update(trunk, head, coefficient=0.75)
    for p, old in zip(ema.parameters(), before, strict=True):
        torch.testing.assert_close(p, old + 0.25)
    assert torch.equal(dict(ema.named_buffers())["layers.0.1.running_mean"], torch.zeros(4))


def test_coefficient_one_changes_nothing_and_zero_copies() -> None:
    trunk, head = online()
    ema = MomentumEncoder(trunk, head)
    before = [p.clone() for p in ema.parameters()]
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(3.0)
    ema.update(trunk, head, coefficient=1.0)
    assert all(map(torch.equal, ema.parameters(), before))
    ema.update(trunk, head, coefficient=0.0)
    assert all(map(torch.equal, ema.layers[1].parameters(), head.parameters()))
