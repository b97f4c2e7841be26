"""A folder of pictures, and the comparison of other data sets with it: the same images give the same views, for any
number of workers and processes, and from any position on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslzoo.data.datasets import open_source
from sslzoo.data.loading import RawBatch
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sampler import GlobalBatchSampler
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, ProbeConfig, ViewConfig

CLASSES = ("cat", "dog")
TRAIN = 20  # pictures of each class
_VIEWS = (
    ViewConfig(size=16, scale=(0.2, 1.0), flip_p=0.5),
    ViewConfig(size=12, scale=(0.1, 0.5), role="local"),
)
_EVAL = EvalConfig(every_epochs=1, size=16, resize=16, knn_k=5, knn_temperature=0.1, batch_size=7)


def write_photos(root: Path) -> None:
    """Pictures of different sizes as JPEG and PNG in class folders of ``root``/train and val."""
    draw = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", 5)):
        for c in CLASSES:
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(
                    0, 256, (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3), np.uint8
                )
                Image.fromarray(pixels).save(root / split / c / f"{i:02}.{('jpg', 'png')[i % 2]}")


def photos(folder: Path) -> list[tuple[str, int, bytes]]:
    """Name, label and bytes of each picture in class folders, as ``imagefolder`` sorts them."""
    paths = sorted(folder.glob("*/*"))
    return [(p.relative_to(folder).as_posix(), CLASSES.index(p.parent.name), p.read_bytes()) for p in paths]


def data_module(
    dataset: str, root: Path, *, workers: int = 0, world: int = 1, bad: float = 0.01
) -> SSLDataModule:
    """The training data of a small recipe."""
    cfg = DataConfig(
        dataset=dataset,
        root=str(root),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        workers=workers,
        global_batch_size=12,
        max_bad_fraction=bad,
    )
    source = open_source(cfg)
    plan = TrainingPlan(
        dataset_size=len(source), global_batch_size=cfg.global_batch_size, max_epochs=3, world_size=world
    )
    return SSLDataModule(cfg, _VIEWS, _EVAL, ProbeConfig(lrs=(0.1,)), plan, seed=1, source=source)


def _epoch(module: SSLDataModule, rank: int = 0) -> list[list[Tensor]]:
    """Sample ids, labels and views of a rank's batches, from the position of ``module`` to the end of the epoch."""
    sampler = GlobalBatchSampler(module.plan, module.seed, rank, lambda: module.position)
    return [_tensors(raw) for raw in module.view_loader(sampler)]


def _tensors(raw: RawBatch) -> list[Tensor]:
    assert raw.label is not None
    return [raw.sample_id, raw.label, *(images.clone() for images in raw.images)]


def _same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def assert_equal_to_folder(folder: Path, dataset: str, root: Path) -> None:
    """The training and test images of ``dataset`` are those of the class folders in ``folder``, in their order."""
    plain, other = data_module("imagefolder", folder), data_module(dataset, root)
    for want, source in zip(
        (plain.train_source, plain.eval_sets()[1].source),
        (other.train_source, other.eval_sets()[1].source),
        strict=True,
    ):
        assert len(source) == len(want) and source.num_classes == want.num_classes == len(CLASSES)
        assert source.labels is not None and want.labels is not None
        assert source.labels.tolist() == want.labels.tolist()
        assert all(torch.equal(source.read(i), want.read(i)) for i in range(len(want)))
    want = _epoch(plain)
    assert len(want) == 3
    assert _same(_epoch(data_module(dataset, root, workers=2)), want)
    ranks = [_epoch(data_module(dataset, root, world=2), rank) for rank in range(2)]
    joined = [[torch.cat(parts) for parts in zip(*batch, strict=True)] for batch in zip(*ranks, strict=True)]
    assert _same(joined, want)
    resumed = data_module(dataset, root)
    resumed.load_state_dict(other.state_dict() | {"position": 1})
    assert _same(_epoch(resumed), want[1:])
