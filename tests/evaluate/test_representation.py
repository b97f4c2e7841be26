"""Representation metrics: equal to their definitions in float64, written without a shortcut, and what they promise."""

from __future__ import annotations

from math import exp, isfinite, log
from statistics import mean

import pytest
import torch
from torch import Tensor

from sslzoo.evaluate.representation import (
    NEIGHBOURS,
    Neighbours,
    alignment,
    decay,
    deviation,
    lidar,
    measure_plain,
    measure_views,
    normalised,
    objects,
    overlap,
)

Shape = tuple[int, int]
SHAPES = [(60, 8), (40, 40), (12, 30)]  # more samples than features, as many, and fewer


def features(n: int, width: int, *, rank: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, F) around a mean per class, some of them always zero as after a ReLU, and labels."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=draw)
    x = torch.randn(3, width, generator=draw)[label] + torch.randn(n, width, generator=draw)
    x = x * torch.linspace(1, 0.1, width)
    x[:, -2:] = 0
    if rank is not None:
        x = torch.randn(n, rank, generator=draw) @ torch.randn(rank, width, generator=draw)
    return x.double(), label


def plain(x: Tensor, label: Tensor | None = None) -> dict[str, float]:
    """All that is measured without views."""
    every = torch.arange(len(x))
    return measure_plain(x, label, every, every).figures


def views(n: int, q: int, width: int) -> Tensor:
    """Features (n, q, F) of n images that differ more than their views."""
    draw = torch.Generator().manual_seed(n)
    image = torch.randn(n, 1, width, generator=draw).double()
    return image + 0.3 * torch.randn(n, q, width, generator=draw).double()


# -- definitions ----------------------------------------------------------------------------------


def entropy_rank(sizes: Tensor) -> float:
    p = [float(s) / float(sizes.sum()) + 1e-7 for s in sizes]
    return exp(-sum(share * log(share) for share in p))


def by_definition(x: Tensor, label: Tensor) -> dict[str, float]:
    """With loops and dense matrices."""
    n = len(x)
    z = torch.stack([row / row.norm() for row in x])
    spread = [float(((column - column.mean()) ** 2).mean() ** 0.5) for column in z.T]
    pairs = [float((-2 * (z[i] - z[j]).square().sum()).exp()) for i in range(n) for j in range(n) if i != j]
    classes = [z[label == c] for c in label.unique()]
    k = len(classes)
    distance = [
        [
            mean(float(1 - u @ v) for m, u in enumerate(a) for n, v in enumerate(b) if i != j or m != n)
            for j, b in enumerate(classes)
        ]
        for i, a in enumerate(classes)
    ]
    within = sum(distance[i][i] for i in range(k)) / k
    over_all = sum(map(sum, distance)) / k**2
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / n).flip(0)
    return {
        "width": x.shape[1],
        "std": sum(spread) / len(spread),
        "rankme": entropy_rank(torch.linalg.svd(x)[1]),
        "alpha": slope(eigenvalues),
        "uniformity": log(sum(pairs) / len(pairs)),
        "separation": 1 - within / over_all,
    }


def slope(eigenvalues: Tensor) -> float:
    """By the normal equations of a line."""
    known = [float(value) for value in eigenvalues if value > 1e-12 * eigenvalues[0]]
    first, last = max(1, len(known) // 20), len(known) // 2
    j = torch.arange(first, last + 1).double().log()
    a = torch.stack([torch.ones_like(j), j], dim=1)
    return -float(torch.linalg.lstsq(a, torch.tensor(known[first - 1 : last]).double().log()[:, None])[0][1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_figures_are_their_definitions(shape: Shape) -> None:
    x, label = features(*shape)
    assert plain(x, label) == pytest.approx(by_definition(x, label), rel=1e-6, abs=1e-6)


def test_the_spectrum_is_that_of_the_covariance() -> None:
    x, _ = features(60, 8)
    found = measure_plain(x, None, torch.arange(60), torch.arange(60)).spectrum
    assert torch.allclose(found, torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0), atol=1e-12)


def test_neighbours_are_the_nearest() -> None:
    x, _ = features(40, 8)
    ids = torch.arange(40) * 3
    found = measure_plain(x, None, ids, torch.arange(5, 40)).neighbours
    assert torch.equal(found.sample_id, ids[5:])
    z = normalised(x[5:])
    for i, near in enumerate(found.nearest):
        distance = (z - z[i]).norm(dim=1)
        distance[i] = torch.inf
        assert set(near.tolist()) == set(ids[5:][distance.argsort()[:NEIGHBOURS]].tolist())


@pytest.mark.parametrize("shape", [(50, 4, 8), (10, 3, 20)], ids=str)
def test_figures_of_views_are_their_definitions(shape: tuple[int, int, int]) -> None:
    x = views(*shape)
    n, q, width = shape
    z = normalised(x)
    pairs = [
        float((z[i, a] - z[i, b]).square().sum())
        for i in range(n)
        for a in range(q)
        for b in range(q)
        if a != b
    ]
    means = x.mean(1)
    between, within = torch.zeros(width, width).double(), 1e-4 * torch.eye(width).double()
    for i in range(n):
        between += torch.outer(means[i] - means.mean(0), means[i] - means.mean(0)) / n
        for v in range(q):
            within += torch.outer(x[i, v] - means[i], x[i, v] - means[i]) / (n * q)
    value, vector = torch.linalg.eigh(within)
    root = vector @ torch.diag(value**-0.5) @ vector.T
    eigenvalues = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    wanted = {"alignment": sum(pairs) / len(pairs), "lidar": entropy_rank(eigenvalues)}
    assert measure_views(x) == pytest.approx(wanted, rel=1e-6)


# -- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_units_and_axes_and_the_order_of_samples_are_nothing(shape: Shape) -> None:
    x, label = features(*shape)
    order = torch.randperm(len(x))
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1]).double())[0]
    turned = plain(7 * x[order] @ turn, label[order])
    of_axes = {"std"}  # the mean over axes depends on them
    assert {k: v for k, v in turned.items() if k not in of_axes} == pytest.approx(
        {k: v for k, v in plain(x, label).items() if k not in of_axes}, rel=1e-6
    )
    assert plain(7 * x, label) == pytest.approx(plain(x, label), rel=1e-6)
    seen = views(30, 3, 6)
    moved = seen @ torch.linalg.qr(torch.randn(6, 6).double())[0]
    assert measure_views(moved[torch.randperm(30)]) == pytest.approx(measure_views(seen), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_is_at_most_that_of_the_features(rank: int) -> None:
    x, _ = features(80, 20, rank=rank)
    assert plain(x)["rankme"] <= rank * 1.001


def test_directions_that_are_used_evenly_all_count() -> None:
    x = torch.cat([torch.eye(16), -torch.eye(16)]).double()
    assert plain(x)["rankme"] == pytest.approx(16, rel=1e-4)
    assert deviation(x) == pytest.approx(16**-0.5)


def test_a_collapse_is_at_the_end_of_every_scale() -> None:
    x = torch.ones(30, 8).double()
    figures = plain(x, torch.arange(30) % 3)
    assert figures["std"] < 1e-12 and figures["rankme"] == pytest.approx(1, abs=1e-4)
    assert figures["uniformity"] == pytest.approx(0, abs=1e-12)
    assert "alpha" not in figures and "separation" not in figures
    assert alignment(normalised(x.view(10, 3, 8))) == pytest.approx(0, abs=1e-12)
    zeros = plain(torch.zeros(30, 8).double())
    assert zeros["std"] == 0 and all(isfinite(value) for value in zeros.values())


def test_each_class_in_a_point_is_separated() -> None:
    label = torch.arange(30) % 3
    points = torch.eye(3, 8).double()[label]
    assert plain(points, label)["separation"] == pytest.approx(1)
    mixed = features(400, 8)[0]
    by_chance = [plain(mixed, torch.arange(400) % c)["separation"] for c in (2, 100)]  # 200 and 4 of a class
    assert by_chance == pytest.approx([0, 0], abs=0.01)


def test_the_exponent_of_a_power_law_is_found() -> None:
    j = torch.arange(1, 201).double()
    assert decay(3 * j**-1.25) == pytest.approx(1.25)
    assert decay(torch.tensor([1.0, 0.0, 0.0]).double()) is None


def test_overlap_is_the_share_of_neighbours_kept() -> None:
    before = Neighbours(torch.tensor([0, 4, 7]), torch.tensor([[4, 7], [0, 7], [0, 4]]))
    now = Neighbours(torch.tensor([0, 4, 9]), torch.tensor([[7, 9], [7, 0], [0, 4]]))
    assert overlap(before, before) == 1
    assert overlap(before, now) == 0.75  # of 0 a half, of 4 all; 7 and 9 are in one alone
    assert overlap(before, Neighbours(torch.tensor([8]), torch.tensor([[1, 2]]))) is None


def test_lidar_counts_directions_that_views_leave_alone() -> None:
    """Of 8 directions in which images differ, views scramble the last 4."""
    image = torch.randn(2000, 1, 8, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(2000, 4, 8, generator=torch.Generator().manual_seed(1)).double()
    noise = noise * torch.tensor([0.01] * 4 + [10.0] * 4)
    assert lidar(image + noise) == pytest.approx(4, rel=0.02)


def test_lidar_of_features_as_large_as_in_a_run_that_diverges() -> None:
    """Rounding errors of their variances exceed the 1e-4 that is added."""
    image, noise = torch.randn(40, 1, 3).double(), torch.randn(40, 4, 3).double()
    x = 1e8 * (image + 0.1 * noise) @ torch.randn(3, 32).double()
    assert 1 <= lidar(x) <= 32


def test_few_images_are_shown_in_few_views() -> None:
    assert objects(12_000, 256) == 512
    assert objects(1_281_167, 2048) == 2048
    assert objects(960, 256) == 60
    assert objects(8, 16) == 2
