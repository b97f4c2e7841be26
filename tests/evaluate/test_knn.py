"""k-NN against its definition, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sslzoo.evaluate import knn
from sslzoo.evaluate.knn import knn_accuracies, knn_accuracy
from sslzoo.evaluate.task import Features, Roles, Task
from sslzoo.testing.ranks import run_ranks

CLASSES = 5


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A bank of 83 and 41 test samples that overlap enough for errors."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(CLASSES, 6, generator=generator)
    y = torch.randint(CLASSES, (124,), generator=generator)
    x = means[y] + torch.randn(124, 6, generator=generator)
    return x[:83], y[:83], x[83:], y[83:]


def by_definition(
    bank: Tensor, bank_y: Tensor, test: Tensor, test_y: Tensor, *, k: int, temperature: float, classes: int
) -> float:
    """Plain loops over Wu et al.'s section 3.4."""
    right = 0
    for query, label in zip(test, test_y.tolist(), strict=True):
        similarity = [float(query @ b / (query.norm() * b.norm())) for b in bank]
        best = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * classes
        for i in best:
            votes[int(bank_y[i])] += math.exp(similarity[i] / temperature)
        right += votes.index(max(votes)) == label
    return right / len(test)


def task(bank: Tensor, bank_y: Tensor, test: Tensor, test_y: Tensor, in_bank: Tensor | None = None) -> Task:
    """The vote of these."""
    ids, everybody = torch.arange(len(bank)), torch.ones(len(bank), dtype=torch.bool)
    return Task(
        Features(bank, bank_y, ids),
        Features(test, test_y, torch.arange(len(test))),
        Roles(everybody, ~everybody, everybody if in_bank is None else in_bank),
        CLASSES,
    )


@pytest.mark.parametrize("k", [1, 7, 83])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 5.0])
def test_equals_the_definition_in_any_chunks(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_definition(*problem(), k=k, temperature=temperature, classes=CLASSES)
    assert 0.2 < expected < 1
    assert knn_accuracy(task(*problem()), k=k, temperature=temperature) == expected
    monkeypatch.setattr(knn, "GROUP", 4)
    assert knn_accuracy(task(*problem()), k=k, temperature=temperature) == expected
    for name, value in {"QUERIES": 10, "COMPARED": 4, "BANK": 9}.items():
        monkeypatch.setattr(knn, name, value)
    assert knn_accuracy(task(*problem()), k=k, temperature=temperature) == expected


def test_one_search_serves_every_k_and_temperature() -> None:
    found = knn_accuracies(task(*problem()), (7, 1, 20), (5.0, 0.01))
    assert found == {
        (k, temperature): by_definition(*problem(), k=k, temperature=temperature, classes=CLASSES)
        for k in (7, 1, 20)
        for temperature in (5.0, 0.01)
    }
    assert len(set(found.values())) > 2


def test_a_tiny_temperature_stays_finite() -> None:
    bank, bank_y, _, _ = problem()
    assert knn_accuracy(task(bank, bank_y, bank, bank_y), k=9, temperature=1e-4) == 1


def test_neighbours_come_from_the_bank_alone() -> None:
    bank, bank_y, test, test_y = problem()
    some = torch.arange(83) % 3 == 0
    expected = by_definition(bank[some], bank_y[some], test, test_y, k=7, temperature=0.2, classes=CLASSES)
    assert knn_accuracy(task(bank, bank_y, test, test_y, some), k=7, temperature=0.2) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_no_neighbours_and_never_right(value: float) -> None:
    bank, bank_y, test, test_y = problem()
    spoilt = bank.clone()
    spoilt[[3, 40], 2] = value
    rest = torch.ones(83, dtype=torch.bool)
    rest[[3, 40]] = False
    expected = by_definition(bank[rest], bank_y[rest], test, test_y, k=7, temperature=0.2, classes=CLASSES)
    assert knn_accuracy(task(spoilt, bank_y, test, test_y), k=7, temperature=0.2) == expected
    broken = bank.clone()
    broken[:, 0] = value
    assert knn_accuracy(task(bank, bank_y, broken, bank_y), k=1, temperature=0.2) == 0
    assert knn_accuracy(task(broken, bank_y, bank, bank_y), k=1, temperature=0.2) == 0


def test_more_neighbours_than_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="k=1000 exceeds the 83"):
        knn_accuracy(task(*problem()), k=1000, temperature=0.2)


def _shares(rank: int, world: int, spoilt: bool) -> float:
    bank, bank_y, test, test_y = problem()
    if spoilt:
        bank[5] = float("nan")
    mine, theirs = (slice(rank * n // world, (rank + 1) * n // world) for n in (83, 41))
    return knn_accuracy(task(bank[mine], bank_y[mine], test[theirs], test_y[theirs]), k=7, temperature=0.2)


@pytest.mark.parametrize("spoilt", [False, True])
def test_unequal_shards_equal_one_process(spoilt: bool) -> None:
    assert run_ranks(3, _shares, spoilt) == [_shares(0, 1, spoilt)] * 3


def _all_on_one_rank(rank: int, world: int) -> float:
    bank, bank_y, test, test_y = problem()
    mine = slice(None) if rank == 0 else slice(0, 0)
    theirs = slice(None) if rank == world - 1 else slice(0, 0)
    return knn_accuracy(task(bank[mine], bank_y[mine], test[theirs], test_y[theirs]), k=7, temperature=0.2)


def test_ranks_may_have_nothing() -> None:
    expected = by_definition(*problem(), k=7, temperature=0.2, classes=CLASSES)
    assert run_ranks(3, _all_on_one_rank) == [expected] * 3
