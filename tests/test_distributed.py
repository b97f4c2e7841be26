"""Collectives: identities alone, sums and rows over ranks, derivatives of both, ShuffleBN's permutation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sslzoo import distributed as d
from sslzoo.nn.shuffle import shuffle, shuffled_order, unshuffle
from sslzoo.testing.ranks import run_ranks


def rows(rank: int, n: int = 3) -> Tensor:
    return (torch.arange(n * 2, dtype=torch.float64).view(n, 2) + 1) * (rank + 1) / 5


def test_one_process_is_the_identity() -> None:
    x = rows(0).requires_grad_()
    assert (d.world_size(), d.rank()) == (1, 0)
    for fn in (d.all_reduce_sum, d.all_reduce_mean, d.gather, d.broadcast_from_zero):
        assert fn(x) is x
    assert torch.equal(d.gather_detached(x), x)
    assert not d.gather_detached(x).requires_grad


def _values(rank: int, world: int) -> dict[str, Any]:
    x = rows(rank)
    return {
        "rank": (d.rank(), d.world_size()),
        "sum": d.all_reduce_sum(x),
        "mean": d.all_reduce_mean(x),
        "gather": d.gather(x),
        "detached": d.gather_detached(x.t().contiguous().t().requires_grad_()).detach(),
        "integers": d.gather_detached(torch.tensor([rank, rank + 10])),
        "zero": d.broadcast_from_zero(x.clone()),
        "untouched": torch.equal(x, rows(rank)),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_values(world: int) -> None:
    every = torch.cat([rows(r) for r in range(world)])
    for r, got in enumerate(run_ranks(world, _values)):
        assert got["rank"] == (r, world)
        assert got["untouched"]
        torch.testing.assert_close(got["sum"], sum(rows(i) for i in range(world)))
        torch.testing.assert_close(got["mean"], got["sum"] / world)
        assert torch.equal(got["gather"], every)
        assert torch.equal(got["detached"], every)
        assert got["integers"].tolist() == [i + k for i in range(world) for k in (0, 10)]
        assert torch.equal(got["zero"], rows(0))


def whole_loss(every: Tensor) -> Tensor:
    """Couples all rows."""
    return (every @ every.T).logsumexp(dim=1).mean() + (every.sum(0) ** 4).sum()


def _derivatives(rank: int, world: int, how: str) -> tuple[Tensor, Tensor]:
    x = rows(rank).requires_grad_()
    if how == "gather":  # the whole loss on every rank
        loss = whole_loss(d.gather(x))
    else:  # local parts of a global mean, coupled by a sum over ranks
        mean = d.all_reduce_sum(x.sum(0)) / (3 * world)
        loss = ((x - mean) ** 4).mean()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    # The second pass treats the mean over ranks of the squared gradients as its loss.
    (second,) = torch.autograd.grad((first**2).sum(), x)
    return first.detach(), second


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["gather", "reduce"])
def test_derivatives_are_those_of_one_process_times_the_world_size(how: str, world: int) -> None:
    """First order: W times, which DDP's mean removes. Second order of the W times larger gradient: W squared."""
    x = torch.cat([rows(r) for r in range(world)]).requires_grad_()
    loss = whole_loss(x) if how == "gather" else ((x - x.mean(0)) ** 4).mean()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    results = run_ranks(world, _derivatives, how)
    torch.testing.assert_close(
        torch.cat([r[0] for r in results]), first.detach() * world, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(torch.cat([r[1] for r in results]), second * world**2, rtol=1e-9, atol=1e-10)


def _shuffled(rank: int, world: int) -> tuple[Tensor, Tensor]:
    x = rows(rank)
    order = shuffled_order(3 * world, seed=1, step=2, device=x.device)
    mine = shuffle(x, order)
    return mine, unshuffle(d.gather_detached(mine), order)


def test_shuffle_and_back() -> None:
    results = run_ranks(2, _shuffled)
    every = torch.cat([rows(0), rows(1)])
    mixed = torch.cat([r[0] for r in results])
    assert not torch.equal(mixed, every)
    assert all(torch.equal(r[1], every) for r in results)


def test_shuffled_order_is_a_permutation_that_changes_with_seed_step_and_micro_batch() -> None:
    def order(seed: int, step: int, micro_batch: int = 0) -> list[int]:
        device = torch.device("cpu")
        return shuffled_order(64, seed=seed, step=step, micro_batch=micro_batch, device=device).tolist()

    orders = [order(1, 2), order(2, 2), order(1, 3), order(1, 2, 1)]
    assert all(sorted(o) == list(range(64)) for o in orders)
    assert len(set(map(tuple, orders))) == 4
    assert order(1, 2) == orders[0]
