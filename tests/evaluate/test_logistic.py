"""The offline probe: at the optimum, fair to any scale, the same over unequal shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.evaluate import logistic
from sslzoo.evaluate.logistic import (
    QUICK,
    Effort,
    ProbeResult,
    fit_linear,
    linear_probe,
    principal_components,
)
from sslzoo.evaluate.metrics import interval, standardizer, within_top
from sslzoo.evaluate.task import Features, Roles, Task
from sslzoo.testing.ranks import run_ranks

CLASSES = 7


def _problem(n: int = 700, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping classes in badly scaled, correlated features with offsets, one of them constant; the
    Bayes-optimal labels' agreement with the drawn ones bounds any probe."""
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(CLASSES, width, generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    x = means[y] + 0.9 * torch.randn(n, width, generator=generator)
    bayes = torch.cdist(x, means).argmin(1)
    mixed = x @ torch.randn(width, width, generator=generator) * torch.logspace(-3, 3, width) + 50
    return torch.cat([mixed, torch.full((n, 1), 3.0)], 1), y, bayes


def _held_out(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.2


def _task(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, held_out: Tensor | None = None
) -> Task:
    """The first two of which ``held_out`` choose, the others test."""
    held_out = _held_out(len(train_x)) if held_out is None else held_out
    return Task(
        Features(train_x, train_y, torch.arange(len(train_x))),
        Features(test_x, test_y, torch.arange(len(test_x))),
        Roles(~held_out, held_out, torch.ones_like(held_out)),
        CLASSES,
    )


def _probe(task: Task) -> ProbeResult:
    return linear_probe(task, effort=QUICK)


def _split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[:500], y[:500], x[500:], y[500:]


def _objective(
    model: logistic.LinearClassifiers, i: int, x: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The objective of the ``i``-th strength, and its gradients by autograd."""
    weight, bias = (part[i].clone().requires_grad_() for part in (model.weight, model.bias))
    loss = F.cross_entropy(model.standardize(x) @ weight.T + bias, y)
    loss = loss + model.fits[i].l2 / 2 * weight.square().sum()
    return loss.detach(), list(torch.autograd.grad(loss, [weight, bias]))


@pytest.mark.parametrize("kept", [0, 2**26])
def test_each_strength_reaches_its_optimum(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "KEPT", kept)
    x, y, _ = _problem()
    x = x.double()
    strengths = (1e-3, 1e-1)
    data = Features(x, y, torch.arange(len(x)))
    effort = Effort(strengths, 1e-9, 2000)
    model = fit_linear(data, torch.arange(len(x)), classes=CLASSES, effort=effort)
    for i, l2 in enumerate(strengths):
        assert model.fits[i].l2 == l2 and model.fits[i].converged
        for gradient in _objective(model, i, x, y)[1]:
            assert gradient.abs().max() < 1e-8
    assert model.logits(x).isfinite().all()
    assert model.fits[1].iterations < model.fits[0].iterations < 200


def test_converged_is_said_of_what_converged_alone() -> None:
    """By the gradient of autograd, as a fraction of that at zero weights, where all classes are equally likely."""
    x, y, _ = _problem()
    data, rows = Features(x, y, torch.arange(len(x))), torch.arange(len(x))
    for iterations, expected in ((2, [False, False]), (16, [False, True]), (500, [True, True])):
        model = fit_linear(data, rows, classes=CLASSES, effort=Effort((1e-4, 0.3), 2e-3, iterations))
        error = 1 / CLASSES - F.one_hot(y, CLASSES).float()
        z = torch.cat([model.standardize(x), torch.ones(len(x), 1)], 1)
        start = (error.T @ z / len(x)).norm()
        for i, fit in enumerate(model.fits):
            gradient = torch.cat([part.flatten() for part in _objective(model, i, x, y)[1]]).norm() / start
            assert fit.gradient == pytest.approx(float(gradient), rel=1e-2, abs=1e-5)
            assert fit.converged == (fit.gradient <= 2e-3)
            assert fit.iterations == iterations or fit.converged
        assert [fit.converged for fit in model.fits] == expected
        said = logistic.converged(model.fits)
        assert said.startswith("all 2 in") if all(expected) else "all but L2 0.0001" in said


def test_steps_that_are_too_long_are_shortened() -> None:
    """Classes that come in pairs alike have more curvature near the optimum than at zero weights."""
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(40, (2000,), generator=draw)
    x = 6 * torch.randn(20, 40, generator=draw)[y // 2] + torch.randn(2000, 40, generator=draw)
    data, rows, effort = Features(x, y, y), torch.arange(2000), Effort((1e-2,), 1e-3, 60)
    assert fit_linear(data, rows, classes=40, effort=effort).fits[0].converged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "TOO_LONG", float("inf"))
        assert fit_linear(data, rows, classes=40, effort=effort).fits[0].gradient > 0.1


def test_the_iterations_it_takes_are_enough() -> None:
    x, y, bayes = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    result = linear_probe(_task(train_x, train_y, test_x, test_y), effort=QUICK)
    best = (bayes[500:] == test_y).float().mean()
    assert 0.6 < best < 0.97
    assert result.top1 > best - 0.08 > 1 / CLASSES
    converged = linear_probe(
        _task(train_x, train_y, test_x, test_y), effort=Effort(QUICK.strengths, 1e-5, 2000)
    )
    assert all(fit.converged for fit in converged.fits)
    assert result.top1 == pytest.approx(converged.top1, abs=0.011)
    assert result.top5 > result.top1
    assert result.l2 in QUICK.strengths


def test_rotation_and_scale_of_the_features_do_not_matter() -> None:
    x, y, _ = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    plain = _probe(_task(train_x, train_y, test_x, test_y))
    scale = torch.logspace(2, -2, x.shape[1])
    moved = _probe(_task(train_x * scale - 1, train_y, test_x * scale - 1, test_y))
    assert moved.l2 == plain.l2 and moved.top1 == pytest.approx(plain.top1, abs=0.011)


def test_held_out_labels_choose_and_never_train() -> None:
    x, y, _ = _problem()
    held_out = _held_out(500)
    train_x, train_y, test_x, test_y = _split(x, y)
    fits: list[Tensor] = []
    original = logistic.fit_linear

    def spy(*args: object, **kwargs: object) -> logistic.LinearClassifiers:
        model = original(*args, **kwargs)  # type: ignore[arg-type]
        fits.append(model.weight)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "fit_linear", spy)
        poisoned = torch.where(held_out, (train_y + 1) % CLASSES, train_y)
        for labels, tested in ((train_y, test_y), (poisoned, test_y), (train_y, (test_y + 1) % CLASSES)):
            result = _probe(_task(train_x, labels, test_x, tested, held_out))
            if labels is poisoned:
                assert result.holdout_top1 < 0.3 < result.top1
    assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])


def _on_shards(rank: int, world: int) -> tuple[ProbeResult, list[list[float]]]:
    x, y, _ = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    # Unequal on purpose: the last rank holds what the others leave, the first of three no test sample.
    cuts = [0, 130, 500] if world == 2 else [0, 30, 250, 500]
    tests = [0, 77, 200] if world == 2 else [0, 0, 11, 200]
    own, own_test = (slice(c[rank], c[rank + 1]) for c in (cuts, tests))
    if world == 1:
        own, own_test = slice(0, 500), slice(0, 200)
    shares = train_x[own], train_y[own], test_x[own_test], test_y[own_test], _held_out(500)[own]
    found = _probe(_task(*shares))
    mean, vectors = principal_components(train_x[own], 3)
    scores = ((train_x[:5] - mean) @ vectors).abs()
    return found, scores.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_unequal_shards_equal_one_process(world: int) -> None:
    alone, scores = _on_shards(0, 1)
    for found, other in run_ranks(world, _on_shards):
        assert found[:4] == pytest.approx(alone[:4], abs=0.006)  # one sample, where float32 sums tip a tie
        torch.testing.assert_close(torch.tensor(other), torch.tensor(scores), rtol=1e-3, atol=1e-2)


def test_within_top_equals_sorting() -> None:
    logits = torch.randn(3, 200, 9).round(decimals=1)  # with ties
    label = torch.randint(9, (200,))
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # the smaller class first
    for k in (1, 5, 9):
        expected = (order[..., :k] == label[None, :, None]).any(-1)
        assert torch.equal(within_top(logits, label, k), expected)
    logits[0, 0, 0] = float("nan")
    assert not within_top(logits, label, 9)[0, 0]


@pytest.mark.parametrize(("held_out", "message"), [(False, "held out to choose"), (True, "all are held out")])
def test_a_holdout_of_nothing_or_all_is_an_error(held_out: bool, message: str) -> None:
    x, y, _ = _problem(40)
    with pytest.raises(ValueError, match=message):
        _probe(_task(x, y, x, y, torch.full((40,), held_out)))


def test_principal_components_are_the_singular_vectors() -> None:
    x = torch.randn(60, 8) @ torch.diag(torch.arange(1.0, 9.0)) + 4
    mean, vectors = principal_components(x, 3)
    expected = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3].T
    torch.testing.assert_close((vectors * expected).sum(0).abs(), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean, x.mean(0))
    assert principal_components(x, 64)[1].shape == (8, 8)


def test_rows_that_are_not_finite_teach_nothing_and_are_wrong() -> None:
    x, y, _ = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    held_out = _held_out(500)
    rows = (~held_out).nonzero()[[2, 90], 0]
    spoilt, kept = train_x.clone(), torch.ones(500, dtype=torch.bool)
    spoilt[rows, 1], kept[rows] = torch.tensor([torch.nan, torch.inf]), False
    without = _probe(_task(train_x[kept], train_y[kept], test_x, test_y, held_out[kept]))
    assert _probe(_task(spoilt, train_y, test_x, test_y)) == without
    broken = test_x.clone()
    broken[:, 0] = torch.nan
    assert _probe(_task(train_x, train_y, broken, test_y)).top5 == 0
    assert _probe(_task(broken, test_y, test_x, test_y)).top5 == 0


def test_statistics_need_no_copy_of_the_features() -> None:
    """Told by the largest tensor that the computation makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.data_ptr() != x.data_ptr():
                self.elements = max(self.elements, out.numel())
            return out

    x, y = torch.randn(20_000, 16), torch.randint(CLASSES, (20_000,))
    seen = Largest()
    with seen:
        data, rows = Features(x, y, y), torch.arange(len(x))
        standardize = standardizer(data, rows)
        fit_linear(data, rows, classes=CLASSES, effort=Effort((0.1,), 1e-3, 1))
    assert seen.elements <= x.numel() / 2
    torch.testing.assert_close(standardize(x).std(0, correction=0), torch.ones(16))


def test_the_interval_is_wilsons() -> None:
    # By hand: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.96.
    assert interval(0.885, 2000) == pytest.approx((0.8703, 0.8983), abs=1e-4)
    assert interval(0.0, 50) == pytest.approx((0.0, 0.0713), abs=1e-4)
    assert interval(1.0, 50) == pytest.approx((0.9287, 1.0), abs=1e-4)


@pytest.mark.parametrize("width", [3, 600])
def test_collapsed_features_are_borne(width: int) -> None:
    """All the same up to scale, or constant: the covariance then has one eigenvalue, or none."""
    one = torch.randn(1000, 1)
    y = (one[:, 0] > 0).long()
    x = one * (torch.rand(width) + 0.1)
    assert _probe(_task(x[:800], y[:800], x[800:], y[800:])).top1 > 0.9
    constant = torch.ones(1000, width)
    found = _probe(_task(constant[:800], y[:800], constant[800:], y[800:]))
    assert 0.3 < found.top1 < 0.7
