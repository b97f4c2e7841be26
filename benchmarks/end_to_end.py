"""Wall time of training on photographs with two data workers, relative to the usual pipeline of PIL images.

    python benchmarks/end_to_end.py

The same network learns from two views of 224 pixels, by the same plain steps, on one thread of its own. Once the
batches come from the data module, once from torch's loader and torchvision's transforms on PIL images, as in solo-learn
and lightly. From the start of the workers to the end of the epoch; the two run in turn on two cores, and the result is
the median of the ratios.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from data import LARGE, module, usual_pipeline
from measure import Result, alternating, ratio, report
from photographs import write_photographs
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslzoo.data.datasets import open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.recipe.sections import DataConfig

ROUNDS = 7
PHOTOGRAPHS, COPIES, BATCH, WORKERS = 48, 4, 32, 2


class Photographs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each photograph by the usual pipeline."""

    def __init__(self, data: SSLDataModule, files: list[Path]) -> None:
        self.files = files
        self.pipeline = usual_pipeline(data.views[0], data.data.mean, data.data.std)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """The views of one photograph."""
        with Image.open(self.files[i]) as file:
            image = file.convert("RGB")
        return self.pipeline(image), self.pipeline(image)


def network() -> nn.Module:
    """Five convolutions, as in half of an AlexNet."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 48, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(48, 128, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(128, 192, 3, 1, 1), nn.ReLU(), nn.Conv2d(192, 192, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(192, 128, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def train(batches: Iterator[tuple[Tensor, ...]]) -> None:
    """A step for each batch of two views."""
    net = network()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for views in batches:
        first, second = (F.normalize(net(view), dim=1) for view in views)
        loss = F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def measure() -> list[Result]:
    """Both pipelines."""
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, PHOTOGRAPHS)
        for file in sorted(folder.iterdir()):
            for k in range(1, COPIES):
                os.link(file, folder / f"{file.stem}-{k}.jpg")
        source = open_source(
            DataConfig(dataset="folder", root=name, global_batch_size=BATCH, mean=(0.5,) * 3, std=(0.25,) * 3)
        )
        data = module(source, [replace(LARGE, count=2)], BATCH, WORKERS)
        photographs = Photographs(data, sorted(folder.iterdir()))

        def ours() -> None:
            train(data.finish(raw).global_views for raw in data.train_dataloader())

        def usual() -> None:
            train(iter(DataLoader(photographs, BATCH, shuffle=True, num_workers=WORKERS)))

        seconds = alternating({"usual": usual, "ours": ours}, ROUNDS, perf_counter)
    return [
        Result(
            work=f"an epoch of photographs, 224 px, {WORKERS} workers, wall time",
            baseline="usual pipeline of PIL images",
            value=ratio(seconds, "usual", "ours"),
            unit="x as fast",
            at_least=1,
        )
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
