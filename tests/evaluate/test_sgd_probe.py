"""Linear evaluation by SGD: learns, keeps its hands off held-out labels, and does not depend on the ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslzoo.evaluate import sgd_probe
from sslzoo.evaluate.sgd_probe import SGDResult, sgd_evaluation, sgd_schedule
from sslzoo.evaluate.task import Features, Roles, Task
from sslzoo.recipe.sections import ProbeConfig
from sslzoo.testing.ranks import run_ranks

CLASSES, WIDTH = 5, 8
CFG = ProbeConfig(lrs=(1e-4, 0.1, 0.3))


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(sgd_probe, "EPOCHS", 20)
    monkeypatch.setattr(sgd_probe, "STEPS", 200)


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


def _task(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    held_out: Tensor,
    sample_id: Tensor | None = None,
) -> Task:
    ids = torch.arange(len(train[0])) if sample_id is None else sample_id
    known = Features(*train, ids), Features(*test, torch.arange(len(test[0])))
    return Task(*known, Roles(~held_out, held_out, torch.ones_like(held_out)), CLASSES)


def _evaluate(rank: int, world: int, n: int = 900) -> SGDResult:
    (x, y), (test_x, test_y) = _data(n), _data(500, seed=1)
    cut, test_cut = (torch.arange(k).tensor_split(world)[rank] for k in (n, 500))
    held_out = torch.arange(n) % 10 == 0
    task = _task((x[cut], y[cut]), (test_x[test_cut], test_y[test_cut]), held_out[cut], cut)
    return sgd_evaluation(task, CFG, seed=3)


def test_comes_close_to_the_best_possible():
    found = _evaluate(0, 1)
    assert found.top1 > _nearest_mean(_data(900), _data(500, seed=1)) - 0.02
    assert found.top5 == 1.0
    assert found.lr in CFG.lrs[1:]  # 1e-4 is too slow to be right


def test_many_samples_are_learned_in_larger_batches_at_larger_rates(monkeypatch):
    """In at most 15,000 steps at ImageNet's size; as before up to CIFAR's."""
    monkeypatch.undo()
    assert sgd_schedule(45_000) == (50, 176, 256)
    assert sgd_schedule(76_800) == (50, 300, 256)
    for samples in (76_801, 115_305, 1_153_050, 1_281_167):
        epochs, steps, batch = sgd_schedule(samples)
        assert 14_000 / 2 < epochs * steps <= 15_000
        assert steps * batch >= samples
    assert sgd_schedule(1_153_050) == (50, 282, 4096)
    monkeypatch.setattr(sgd_probe, "EPOCHS", 20)
    monkeypatch.setattr(sgd_probe, "STEPS", 1)
    small = _evaluate(0, 1)
    monkeypatch.setattr(sgd_probe, "MOST_STEPS", 40)
    assert sgd_schedule(810) == (20, 2, 512)
    assert abs(_evaluate(0, 1).top1 - small.top1) < 0.02


def test_held_out_labels_never_train():
    x, y = _data(400)
    test = _data(300, seed=1)
    held_out = torch.arange(400) % 4 == 0
    cfg = ProbeConfig(lrs=(0.1,))  # nothing to choose: held-out labels can then matter only by training
    poisoned = torch.where(held_out, (y + 1) % CLASSES, y)
    results = [
        sgd_evaluation(_task((x, labels), test, held_out), cfg, seed=0).top1 for labels in (y, poisoned)
    ]
    assert results[0] == results[1]
    all_train = torch.zeros_like(held_out)
    all_train[0] = True
    harmed = sgd_evaluation(_task((x, poisoned), test, all_train), cfg, seed=0).top1
    assert harmed < results[0]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_what_one_process_does(world):
    assert run_ranks(world, _evaluate) == [_evaluate(0, 1)] * world


def test_the_order_belongs_to_the_seed_and_not_to_the_rows():
    (x, y), test = _data(900), _data(500, seed=1)
    held_out = torch.arange(900) % 10 == 0
    turned = torch.arange(900).flip(0)
    task = _task((x[turned], y[turned]), test, held_out[turned], turned)
    assert sgd_evaluation(task, CFG, seed=3) == _evaluate(0, 1)


def _uneven(rank: int, world: int, parts: list[list[int]]) -> SGDResult:
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
    task = _task((x[cut], y[cut]), (test[0][tested], test[1][tested]), held_out[cut], cut)
    return sgd_evaluation(task, CFG, seed=3)


def test_a_rank_without_samples_or_with_held_out_ones_alone_keeps_step():
    assert run_ranks(3, _uneven, [[0, 0], [30, 0], [0, 0]]) == [_evaluate(0, 1)] * 3


def test_rows_that_are_not_finite_teach_nothing():
    (x, y), test = _data(900), _data(500, seed=1)
    held_out = torch.arange(900) % 10 == 0
    x[[1, 2], 3] = torch.tensor([torch.nan, torch.inf])
    kept = torch.ones(900, dtype=torch.bool)
    kept[[1, 2]] = False
    without = _task((x[kept], y[kept]), test, held_out[kept], torch.arange(900)[kept])
    found = sgd_evaluation(_task((x, y), test, held_out), CFG, seed=3)
    assert found == sgd_evaluation(without, CFG, seed=3)
    assert found.top1 > 0.5
    assert sgd_evaluation(_task((x * torch.nan, y), test, held_out), CFG, seed=3).top5 == 0


@pytest.mark.parametrize(
    ("held_out", "said"), [(True, r"lower probe\.holdout"), (False, r"raise probe\.holdout")]
)
def test_a_holdout_of_all_or_nothing_is_refused(held_out, said):
    x, y = _data(50)
    with pytest.raises(ValueError, match=said):
        sgd_evaluation(_task((x, y), (x, y), torch.full((50,), held_out)), CFG, seed=0)
