"""Linear evaluation by SGD: learns, keeps its hands off held-out labels, and does not depend on the ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslzoo.evaluate.sgd_probe import LinearResult, linear_evaluation
from sslzoo.recipe.sections import ProbeConfig
from sslzoo.testing.ranks import run_ranks

CLASSES, WIDTH = 5, 8
CFG = ProbeConfig(lrs=(1e-4, 0.1, 0.3))


def _data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes whose features differ in scale."""
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=draw)
    x = means[y] + torch.randn(n, WIDTH, generator=draw)
    return x * torch.logspace(-2, 2, WIDTH), y


def _nearest_mean(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """The Bayes rule of this problem with estimated means, as a yardstick."""
    scale = train[0].std(0)
    means = torch.stack([train[0][train[1] == c].mean(0) for c in range(CLASSES)]) / scale
    return float((torch.cdist(test[0] / scale, means).argmin(1) == test[1]).float().mean())


def _evaluate(rank: int, world: int, n: int = 900, classes: int = CLASSES) -> LinearResult:
    (x, y), (test_x, test_y) = _data(n), _data(500, seed=1)
    cut, test_cut = (torch.arange(k).tensor_split(world)[rank] for k in (n, 500))
    held_out = torch.arange(n) % 10 == 0
    return linear_evaluation(
        (x[cut], y[cut]), (test_x[test_cut], test_y[test_cut]), held_out[cut], CFG, classes=classes, seed=3
    )


def test_comes_close_to_the_best_possible():
    found = _evaluate(0, 1)
    assert found.top1 > _nearest_mean(_data(900), _data(500, seed=1)) - 0.02
    assert found.top5 == 1.0
    assert found.lr in CFG.lrs[1:]  # 1e-4 is too slow to be right


def test_held_out_labels_never_train():
    x, y = _data(400)
    test = _data(300, seed=1)
    held_out = torch.arange(400) % 4 == 0
    cfg = ProbeConfig(lrs=(0.1,))  # nothing to choose: held-out labels can then matter only by training
    poisoned = torch.where(held_out, (y + 1) % CLASSES, y)
    results = [
        linear_evaluation((x, labels), test, held_out, cfg, classes=CLASSES, seed=0).top1
        for labels in (y, poisoned)
    ]
    assert results[0] == results[1]
    all_train = torch.zeros_like(held_out)
    all_train[0] = True
    harmed = linear_evaluation((x, poisoned), test, all_train, cfg, classes=CLASSES, seed=0).top1
    assert harmed < results[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_and_stay_close_to_one_process(world):
    whole = _evaluate(0, 1)
    parts = run_ranks(world, _evaluate)
    assert all(part == parts[0] for part in parts)
    # Batches are composed of the ranks' shares, so they differ from one process's.
    assert parts[0].top1 == pytest.approx(whole.top1, abs=0.02)


def _uneven(rank: int, world: int, parts: list[list[int]]) -> LinearResult:
    """Rank r has ``parts[r]`` = [held out, not held out] of the training samples, the last one the rest."""
    (x, y), test = _data(900), _data(500, seed=1)
    held_out = torch.arange(900) % 10 == 0
    rows = [held_out.nonzero().squeeze(1).tolist(), (~held_out).nonzero().squeeze(1).tolist()]
    mine: list[int] = []
    for pool, column in zip(rows, zip(*parts, strict=True), strict=True):
        before = sum(column[:rank])
        mine += pool[before : before + column[rank]] if rank < world - 1 else pool[before:]
    cut = torch.tensor(mine, dtype=torch.int64)
    tested = torch.arange(500).tensor_split(world)[rank]
    train, share = (x[cut], y[cut]), (test[0][tested], test[1][tested])
    return linear_evaluation(train, share, held_out[cut], CFG, classes=CLASSES, seed=3)


def test_a_rank_without_samples_or_with_held_out_ones_alone_keeps_step():
    whole = _evaluate(0, 1)
    parts = run_ranks(3, _uneven, [[0, 0], [30, 0], [0, 0]])
    assert all(part == parts[0] for part in parts)
    assert parts[0].top1 == pytest.approx(whole.top1, abs=0.02)


def test_all_held_out_is_refused():
    x, y = _data(50)
    with pytest.raises(ValueError, match=r"lower probe\.holdout"):
        linear_evaluation((x, y), (x, y), torch.ones(50, dtype=torch.bool), CFG, classes=CLASSES, seed=0)


def test_nothing_held_out_is_refused():
    x, y = _data(50)
    with pytest.raises(ValueError, match=r"probe\.holdout"):
        linear_evaluation((x, y), (x, y), torch.zeros(50, dtype=torch.bool), CFG, classes=CLASSES, seed=0)
