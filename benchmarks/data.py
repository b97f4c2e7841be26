"""Views per CPU-second of the input pipeline, compared with a per-sample torchvision v2 pipeline.

Both run alternately in the same process; medians and ratios of CPU time on one thread.

    python benchmarks/data.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from sslzoo.data.datasets import open_source
from sslzoo.data.loading import ViewDataset
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import ImageSource, fake_source
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, ProbeConfig, ViewConfig

ROUNDS = 7
COLOUR: dict[str, Any] = {
    "jitter_p": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_p": 0.2,
    "blur_p": 0.5,
    "flip_p": 0.5,
}


def torchvision_pipeline(view: ViewConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    """The same augmentation policy in torchvision, applied to one uint8 tensor at a time."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.size, view.scale or (1.0, 1.0), antialias=True),
            v2.RandomApply(
                [v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)], view.jitter_p
            ),
            v2.RandomGrayscale(view.grayscale_p),
            v2.RandomApply([v2.GaussianBlur(view.blur_kernel, view.blur_sigma)], view.blur_p),
            v2.RandomHorizontalFlip(view.flip_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )


def module(source: ImageSource, view: ViewConfig, batch: int) -> SSLDataModule:
    """A data module that yields two views of ``source``, without a Trainer."""
    channels = source.channels
    return SSLDataModule(
        DataConfig(
            dataset=source.name, global_batch_size=batch, mean=(0.5,) * channels, std=(0.25,) * channels
        ),
        [view, view],
        EvalConfig(every_epochs=1, size=view.size, knn_k=20, knn_temperature=0.1),
        ProbeConfig(lrs=(0.1,)),
        TrainingPlan(dataset_size=len(source), global_batch_size=batch, max_epochs=1),
        seed=0,
        source=source,
    )


def alternating(contenders: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median views per CPU-second of each pipeline, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(ROUNDS + 1):
        for name, work in contenders.items():
            start = time.process_time()
            views = work()
            if k:
                rates[name].append(views / (time.process_time() - start))
    return {name: median(values) for name, values in rates.items()}


def compare(title: str, source: ImageSource, view: ViewConfig, batch: int) -> list[str]:
    """Rates of the whole pipeline and, for files, of the part that runs in workers."""
    data = module(source, view, batch)
    dataset = ViewDataset(source, data.views, 0, batch)
    items = [(0, i) for i in range(batch)]
    reference = torchvision_pipeline(view, data.data.mean, data.data.std)
    few = range(min(batch, 64))

    def plain() -> int:
        for i in few:
            image = source.read(i)
            for _ in range(2):
                reference(image)
        return 2 * len(few)

    def ours() -> int:
        data.example_batch(batch)
        return 2 * batch

    def worker() -> int:
        dataset.__getitems__(items)
        return 2 * batch

    contenders = {"torchvision v2 a sample": plain, "sslzoo, all on this CPU": ours}
    if not source.is_array:
        contenders["sslzoo, worker part"] = worker
    rates = alternating(contenders)
    base = rates["torchvision v2 a sample"]
    return [f"{title}: {name}: {rate:.0f} views/CPU-s, {rate / base:.1f}x" for name, rate in rates.items()]


def photographs(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375 pixels with about the file size and spectrum of photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 18, (375, 500, 1)).astype(np.float32)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=92)


def run() -> list[str]:
    """Print one line per measurement."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grey = open_source(
        DataConfig(dataset="fashion_mnist_12k", global_batch_size=256, mean=(0.286,), std=(0.353,))
    )
    small, large = (ViewConfig(size=s, scale=(0.2, 1.0), **COLOUR) for s in (28, 224))
    lines = compare("28 px grey array", grey, small, 256)
    colour = ViewConfig(size=32, scale=(0.2, 1.0), **COLOUR)
    lines += compare("32 px colour array", fake_source(256, 3, 32, 10), colour, 256)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), 32)
        files = open_source(
            DataConfig(dataset="folder", root=folder, global_batch_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        )
        lines += compare("224 px JPEG", files, large, 32)
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(run()) + "\n")
