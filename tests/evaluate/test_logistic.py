"""The offline probe: at the optimum, fair to any scale, the same over unequal shards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.evaluate import logistic
from sslzoo.evaluate.logistic import STRENGTHS, ProbeResult, fit_linear, linear_probe, principal_components
from sslzoo.evaluate.metrics import within_top
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


def _split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[:500], y[:500], x[500:], y[500:]


def test_each_strength_reaches_its_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = _problem()
    x = x.double()
    strengths = (1e-3, 1e-1)
    monkeypatch.setattr(logistic, "ITERATIONS", 2000)
    model = fit_linear(x, y, classes=CLASSES, strengths=strengths)
    for i, l2 in enumerate(strengths):
        weight = model.weight[i].clone().requires_grad_()
        z = model.standardize(x) @ model.basis
        loss = F.cross_entropy(z @ weight[:, 1:].T + weight[:, 0], y) + l2 / 2 * weight[:, 1:].square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.abs().max() < 1e-8
    assert model.logits(x).isfinite().all()


def test_the_iterations_it_takes_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, bayes = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    result = linear_probe(train_x, train_y, test_x, test_y, _held_out(500), classes=CLASSES)
    best = (bayes[500:] == test_y).float().mean()
    assert 0.6 < best < 0.97
    assert result.top1 > best - 0.08 > 1 / CLASSES
    monkeypatch.setattr(logistic, "ITERATIONS", 2000)
    converged = linear_probe(train_x, train_y, test_x, test_y, _held_out(500), classes=CLASSES)
    assert result.top1 == pytest.approx(converged.top1, abs=0.011)
    assert result.top5 > result.top1
    assert result.l2 in STRENGTHS


def test_rotation_and_scale_of_the_features_do_not_matter() -> None:
    x, y, _ = _problem()
    train_x, train_y, test_x, test_y = _split(x, y)
    plain = linear_probe(train_x, train_y, test_x, test_y, _held_out(500), classes=CLASSES)
    scale = torch.logspace(2, -2, x.shape[1])
    moved = linear_probe(
        train_x * scale - 1, train_y, test_x * scale - 1, test_y, _held_out(500), classes=CLASSES
    )
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
            result = linear_probe(train_x, labels, test_x, tested, held_out, classes=CLASSES)
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
    found = linear_probe(
        train_x[own],
        train_y[own],
        test_x[own_test],
        test_y[own_test],
        _held_out(500)[own],
        classes=CLASSES,
    )
    mean, vectors = principal_components(train_x[own], 3)
    scores = ((train_x[:5] - mean) @ vectors).abs()
    return found, scores.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_unequal_shards_equal_one_process(world: int) -> None:
    alone, scores = _on_shards(0, 1)
    for found, other in run_ranks(world, _on_shards):
        assert found == pytest.approx(alone, abs=0.006)  # one sample, where float32 sums tip a tie
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


@pytest.mark.parametrize(
    ("held_out", "message"), [(False, "held out to choose"), (True, "at least one training")]
)
def test_a_holdout_of_nothing_or_all_is_an_error(held_out: bool, message: str) -> None:
    x, y, _ = _problem(40)
    with pytest.raises(ValueError, match=message):
        linear_probe(x, y, x, y, torch.full((40,), held_out), classes=CLASSES)


def test_principal_components_are_the_singular_vectors() -> None:
    x = torch.randn(60, 8) @ torch.diag(torch.arange(1.0, 9.0)) + 4
    mean, vectors = principal_components(x, 3)
    expected = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3].T
    torch.testing.assert_close((vectors * expected).sum(0).abs(), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean, x.mean(0))
    assert principal_components(x, 64)[1].shape == (8, 8)
