"""Batch norms: synchronised against one process to second order, and split against separate devices."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from sslzoo.distributed import all_reduce_sum
from sslzoo.nn.batchnorm import LayerSync, SplitBatchNorm, SyncBatchNorm, to_split, to_sync
from sslzoo.testing.ranks import run_ranks


def images(rows: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(rows, 3, 2, 2, generator=g, dtype=torch.float64) * 2 + 1


def derivatives(bn: nn.Module, x: Tensor, total: Any) -> tuple[Tensor, ...]:
    """Output, gradient, and gradient of the squared gradient: of a loss summed over all rows."""
    x = x.clone().requires_grad_()
    y = bn(x)
    loss = total((y**3).sum())
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(total((first**2).sum()), x)
    return y.detach(), first.detach(), second


def layer(kind: type = nn.BatchNorm2d) -> nn.Module:
    bn = kind(3).double()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        bn.bias.copy_(torch.tensor([0.1, 0.0, -0.1]))
    return bn


def _sync_rank(rank: int, world: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    bn = to_sync(layer())
    assert isinstance(bn, SyncBatchNorm)
    share = 12 // world
    got = derivatives(bn, images()[rank * share : (rank + 1) * share], all_reduce_sum)
    # Each rank differentiates the whole sum, and the backward pass adds the ranks up: W times, then W squared.
    scaled = [got[0], got[1] / world, got[2] / world**3]
    return scaled, dict(bn.state_dict())


@pytest.mark.parametrize("world", [2, 3])
def test_sync_equals_one_process_to_second_order(world: int) -> None:
    whole = layer()
    expected = derivatives(whole, images(), lambda x: x)
    results = run_ranks(world, _sync_rank, timeout=120)
    for i, value in enumerate(expected):
        got = torch.cat([r[0][i] for r in results])
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-10)
    for _, state in results:
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)])
def test_sync_on_one_process_is_batch_norm(shape: tuple[int, ...]) -> None:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    plain = layer(kinds[len(shape)])
    sync = to_sync(copy.deepcopy(plain))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(sync(x), plain(x))
    torch.testing.assert_close(sync.state_dict(), plain.state_dict())
    torch.testing.assert_close(sync.eval()(x), plain.eval()(x))


def _far_from_zero(rank: int, world: int) -> tuple[Tensor, Tensor, int]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)) * 0.1 + 1000
    mine = slice(rank * 4, (rank + 1) * 4)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
        y = to_sync(nn.BatchNorm1d(3))(x[mine].requires_grad_())
        y.square().sum().backward()
    return y.detach(), nn.BatchNorm1d(3).double()(x.double())[mine].float().detach(), collective.call_count


def test_sync_sends_both_moments_at_once_and_keeps_the_digits_of_a_large_mean() -> None:
    for got, expected, collectives in run_ranks(2, _far_from_zero, timeout=120):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-3
        )  # the mean has seven digits in float32
        assert collectives == 2  # one forward, one backward


def test_sync_computes_half_precision_in_float32() -> None:
    sync = to_sync(nn.BatchNorm1d(3))
    x = torch.randn(64, 3) + 100
    y = sync(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), nn.BatchNorm1d(3)(x.bfloat16().float()), rtol=0.01, atol=0.01)


def test_sync_refuses_a_single_value() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        to_sync(nn.BatchNorm1d(3))(torch.zeros(1, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_is_one_batch_norm_a_group(layout: torch.memory_format) -> None:
    bn = to_split(layer(), 4)
    assert isinstance(bn, SplitBatchNorm)
    x = images().to(memory_format=layout)
    y = bn(x)
    means, variances = [], []
    for g in range(4):
        alone = layer()
        torch.testing.assert_close(y[g::4], alone(x[g::4]))
        means.append(alone.state_dict()["running_mean"])
        variances.append(alone.state_dict()["running_var"])
    torch.testing.assert_close(bn.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack(variances).mean(0))
    plain = layer().eval()
    plain.load_state_dict(bn.state_dict())
    torch.testing.assert_close(bn.eval()(x), plain(x))


def test_split_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="divisible by 5, got 12"):
        to_split(layer(), 5)(images())


def test_conversion_keeps_parameters_names_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3))).eval()
    parameters, names = list(model.parameters()), list(model.state_dict())
    converted = to_sync(model)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert list(converted.state_dict()) == names
    assert [type(m) for m in converted[1]] == [SyncBatchNorm, SyncBatchNorm]  # type: ignore[index]
    assert not any(m.training for m in converted.modules())
    split = to_split(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3)), 2)
    assert [type(m) for m in split] == [SplitBatchNorm, nn.BatchNorm1d]  # type: ignore[arg-type]


def test_layer_sync_uses_the_frameworks_own_on_cpu() -> None:
    model = LayerSync().apply(nn.Sequential(nn.BatchNorm2d(3)))
    assert isinstance(model[0], SyncBatchNorm)  # type: ignore[index]


class Scaled(nn.BatchNorm2d):
    """Somebody's batch norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("convert", [to_sync, lambda m: to_split(m, 2)], ids=["sync", "split"])
def test_layers_inside_a_batch_norm_stay(convert: Any) -> None:
    bn = BatchNormAct2d(3, act_layer=nn.SiLU)
    new, x = convert(nn.Sequential(copy.deepcopy(bn))), images().float()
    old = nn.Sequential(bn)
    if convert is to_sync:
        torch.testing.assert_close(new(x), old(x))
    else:
        plain = to_split(nn.Sequential(nn.BatchNorm2d(3)), 2)
        torch.testing.assert_close(new(x), F.silu(plain(x)))
    mean, var = new[0].running_mean.view(1, 3, 1, 1), new[0].running_var.view(1, 3, 1, 1)
    torch.testing.assert_close(new.eval()(x), F.silu((x - mean) / (var + new[0].eps).sqrt()))


def test_a_batch_norm_that_does_more_is_refused() -> None:
    with pytest.raises(ValueError, match="Scaled computes more than a batch norm"):
        to_sync(nn.Sequential(Scaled(3)))


@pytest.mark.parametrize("norm", [SplitBatchNorm(4, splits=2), to_split(BatchNormAct2d(4), 2)])
def test_a_split_batch_norm_is_not_synchronised(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match="SplitBatchNorm computes more than a batch norm"):
        to_sync(nn.Sequential(norm))


def test_on_cuda_torchs_layer_takes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def kind(norm: nn.Module, **changes: Any) -> type:
        model = nn.Sequential(norm)
        for name, value in changes.items():
            setattr(model, name, value)
        return type(LayerSync().apply(model)[0])  # type: ignore[index]

    assert kind(nn.BatchNorm2d(3)) is nn.SyncBatchNorm
    assert kind(nn.BatchNorm2d(3), needs_double_backward=True) is SyncBatchNorm
    assert kind(BatchNormAct2d(3)) is SyncBatchNorm
