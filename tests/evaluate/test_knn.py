"""k-NN against its definition, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sslzoo.evaluate import knn
from sslzoo.evaluate.knn import knn_accuracy
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


@pytest.mark.parametrize("k", [1, 7, 83])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 5.0])
def test_equals_the_definition_in_any_chunks(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_definition(*problem(), k=k, temperature=temperature, classes=CLASSES)
    assert 0.2 < expected < 1
    assert knn_accuracy(*problem(), k=k, temperature=temperature, classes=CLASSES) == expected
    monkeypatch.setattr(knn, "QUERIES", 10)
    monkeypatch.setattr(knn, "BANK", 9)
    assert knn_accuracy(*problem(), k=k, temperature=temperature, classes=CLASSES) == expected


def test_a_tiny_temperature_stays_finite() -> None:
    bank, bank_y, _, _ = problem()
    assert knn_accuracy(bank, bank_y, bank, bank_y, k=9, temperature=1e-4, classes=CLASSES) == 1


def _all_on_one_rank(rank: int, world: int) -> float:
    bank, bank_y, test, test_y = problem()
    mine = slice(None) if rank == 0 else slice(0, 0)
    theirs = slice(None) if rank == world - 1 else slice(0, 0)
    return knn_accuracy(
        bank[mine], bank_y[mine], test[theirs], test_y[theirs], k=7, temperature=0.2, classes=CLASSES
    )


def test_ranks_may_have_nothing() -> None:
    expected = by_definition(*problem(), k=7, temperature=0.2, classes=CLASSES)
    assert run_ranks(3, _all_on_one_rank) == [expected] * 3
