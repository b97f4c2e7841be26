"""Neighbours and map: the same images each time, on any number of processes, and the right neighbours."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sslzoo.data.sources import ArraySource
from sslzoo.evaluate.gallery import NEIGHBOURS, QUERIES, gallery
from sslzoo.evaluate.task import Features, Roles, Task
from sslzoo.testing.ranks import run_ranks

CLASSES, TRAIN, TEST, WIDTH = 5, 61, 33, 12


def source(n: int) -> ArraySource:
    draw = np.random.default_rng(n)
    images = draw.integers(0, 255, (n, 6, 6, 1), dtype=np.uint8)
    return ArraySource(
        "small", "test", images, np.arange(n) % CLASSES, [f"class {i}" for i in range(CLASSES)]
    )


def eval_sets() -> tuple[Any, Any]:
    return SimpleNamespace(source=source(TRAIN), size=TRAIN), SimpleNamespace(source=source(TEST), size=TEST)


def features(n: int, rank: int, world: int) -> Features:
    """This rank's share of ``n`` samples."""
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))
    ids = torch.arange(n)[rank::world]
    return Features(x[ids], ids % CLASSES, ids)


def drawn(rank: int, world: int) -> dict[str, Any] | None:
    train = features(TRAIN, rank, world)
    bank = train.sample_id % 7 != 0
    roles = Roles(bank, ~bank, bank)
    return gallery(Task(train, features(TEST, rank, world), roles, CLASSES), *eval_sets())


def test_neighbours_are_the_nearest_of_the_bank() -> None:
    found = drawn(0, 1)
    assert found is not None
    train, test = features(TRAIN, 0, 1), features(TEST, 0, 1)
    cosine = F.normalize(test.x, dim=1) @ F.normalize(train.x, dim=1).T
    cosine[:, train.sample_id % 7 == 0] = -1
    assert len(found["neighbours"]) == QUERIES
    assert {row["query"]["label"] for row in found["neighbours"]} == set(range(CLASSES))
    for row in found["neighbours"]:
        expected = cosine[row["query"]["sample_id"]].topk(NEIGHBOURS)
        assert [near["sample_id"] for near in row["nearest"]] == expected.indices.tolist()
        assert [near["label"] for near in row["nearest"]] == (expected.indices % CLASSES).tolist()
    assert base64.b64decode(found["neighbours"][0]["query"]["image"]).startswith(b"\x89PNG")


def test_without_labels_an_image_is_not_its_own_neighbour() -> None:
    shown = features(TRAIN, 0, 1)._replace(label=torch.full((TRAIN,), -1))
    every = torch.ones(TRAIN, dtype=torch.bool)
    images = source(TRAIN)
    images.labels = None
    plain: Any = SimpleNamespace(source=images, size=TRAIN)
    found = gallery(Task(shown, shown, Roles(every, every, every), 0), plain, plain)
    assert found is not None
    for row in found["neighbours"]:
        near = [image["sample_id"] for image in row["nearest"]]
        assert len(near) == NEIGHBOURS
        assert row["query"]["sample_id"] not in near
        assert row["query"]["label"] is None


def test_the_map_is_the_plane_of_most_variance() -> None:
    found = drawn(0, 1)
    assert found is not None
    unit = F.normalize(features(TEST, 0, 1).x.double(), dim=1)
    centred = unit - unit.mean(dim=0)
    values = torch.linalg.svdvals(centred).square()
    plane = torch.tensor([found["map"]["x"], found["map"]["y"]], dtype=torch.float64)
    torch.testing.assert_close(plane.square().sum(dim=1), values[:2], atol=1e-3, rtol=1e-3)
    assert found["map"]["explained"] == [round(float(v / values.sum()), 4) for v in values[:2]]


def test_several_processes_draw_the_same() -> None:
    one = drawn(0, 1)
    for world in (2, 3):
        first, *others = run_ranks(world, drawn)
        assert first == one
        assert others == [None] * (world - 1)


def test_features_that_are_not_finite_have_no_map() -> None:
    train, test = features(TRAIN, 0, 1), features(TEST, 0, 1)
    test.x[3] = torch.nan
    every = torch.ones(TRAIN, dtype=torch.bool)
    assert gallery(Task(train, test, Roles(every, every, every), CLASSES), *eval_sets()) is None
