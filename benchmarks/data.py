"""Views per CPU-second of the input pipeline, relative to the usual one of PIL images.

    python benchmarks/data.py

The usual pipeline applies torchvision's transforms to one PIL image after the other, as solo-learn and lightly do. Both
decode an image once for all its views, have the same policy, and run in turn in one process and thread; medians of the
ratios of CPU time.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import Result, alternating, ratio, report
from photographs import write_photographs
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sslzoo.data.datasets import open_source
from sslzoo.data.loading import ViewDataset
from sslzoo.data.module import SSLDataModule
from sslzoo.data.pack_writer import PackOptions, write_split
from sslzoo.data.sources import FileSource, ImageSource, fake_source
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, ProbeConfig, SourceConfig, ViewConfig

ROUNDS = {True: 51, False: 11}  # by whether images are in memory, where a round takes a twentieth of a second
PHOTOGRAPHS = 128
JITTER: dict[str, Any] = {
    "flip_p": 0.5,
    "jitter_p": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_p": 0.2,
}
SMALL = ViewConfig(size=32, scale=(0.2, 1.0), **JITTER)
LARGE = ViewConfig(size=224, scale=(0.2, 1.0), blur_p=0.5, **JITTER)
MULTI_CROP = (
    replace(LARGE, count=2),
    *(replace(LARGE, size=size, scale=(0.05, 0.4)) for size in (192, 160, 128, 96)),
)


class PILBlur:
    """Gaussian blur with a random width."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """The blurred image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def usual_pipeline(
    view: ViewConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Image.Image], Tensor]:
    """The policy of ``view`` for one PIL image at a time."""
    assert view.scale is not None
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                view.size, view.scale, interpolation=InterpolationMode(view.interpolation)
            ),
            transforms.RandomApply([jitter], view.jitter_p),
            transforms.RandomGrayscale(view.grayscale_p),
            transforms.RandomApply([PILBlur(view.blur_sigma)], view.blur_p),
            transforms.RandomHorizontalFlip(view.flip_p),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def module(source: ImageSource, views: Sequence[ViewConfig], batch: int, workers: int = 0) -> SSLDataModule:
    """A data module that yields ``views`` of ``source``, without a Trainer."""
    channels = source.channels
    return SSLDataModule(
        DataConfig(
            dataset=source.name,
            global_batch_size=batch,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            workers=workers,
        ),
        views,
        EvalConfig(every_epochs=1, size=views[0].size, knn_k=20, knn_temperature=0.1),
        ProbeConfig(lrs=(0.1,)),
        TrainingPlan(dataset_size=len(source), global_batch_size=batch, max_epochs=1),
        seed=0,
        source=source,
    )


def compare(
    title: str,
    source: ImageSource,
    images: Callable[[int], Image.Image],
    views: Sequence[ViewConfig],
    batch: int,
    *,
    whole: float | None,
    worker: float | None = None,
) -> list[Result]:
    """The whole pipeline on a CPU and, if ``worker`` is given, the part that runs in workers where a GPU does the
    rest; with the bounds of both. ``images`` opens the images of ``source`` for the usual pipeline."""
    data = module(source, views, batch)
    dataset = ViewDataset(source, data.views, 0, batch)
    usual = [usual_pipeline(view, data.data.mean, data.data.std) for view in data.views]
    few = range(min(batch, 48))

    def plain() -> None:
        views: list[list[Tensor]] = [[] for _ in usual]
        for i in few:
            image = images(i)
            for view, pipeline in zip(views, usual, strict=True):
                view.append(pipeline(image))
        for view in views:
            torch.stack(view)

    def part() -> None:
        dataset.__getitems__([(0, i) for i in range(batch)])

    contenders: dict[str, Callable[[], object]] = {"plain": plain, "all": lambda: data.example_batch(batch)}
    if worker is not None:
        contenders["worker part"] = part
    seconds = alternating(contenders, ROUNDS[source.is_array])
    return [
        Result(
            work=f"{title}, {name}",
            baseline="usual pipeline of PIL images",
            value=ratio(seconds, "plain", name) * batch / len(few),
            unit="x as fast",
            at_least=bound,
        )
        for name, bound in (("all", whole), ("worker part", worker))
        if name in contenders
    ]


def packed_raw(photographs: Path) -> ImageSource:
    """The photographs in a folder, decoded and packed. What is read of them later is in the page cache."""
    files = open_source(SourceConfig(dataset="folder", root=str(photographs)), 3)
    assert isinstance(files, FileSource)
    write_split(files, photographs / "packed/train", PackOptions(raw=True), max_bad_fraction=0.0)
    return open_source(SourceConfig(dataset="folder", root=str(photographs / "packed")), 3)


def measure() -> list[Result]:
    """Images in memory and files, with the policies of common recipes."""
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    grey = open_source(
        DataConfig(dataset="fashion_mnist_12k", global_batch_size=256, mean=(0.286,), std=(0.353,))
    )
    colour = fake_source(256, 3, 32, 10)

    def grey_image(i: int) -> Image.Image:
        return Image.fromarray(grey.read(i)[0].numpy())

    def colour_image(i: int) -> Image.Image:
        return Image.fromarray(colour.read(i).permute(1, 2, 0).numpy())

    blurred = replace(SMALL, size=28, blur_p=0.5)
    results = compare("28 px grey in memory", grey, grey_image, [blurred] * 2, 256, whole=19)
    for title, view in {
        "32 px in memory": SMALL,
        "32 px, bicubic": replace(SMALL, interpolation="bicubic"),
        "32 px, bicubic, blur": replace(SMALL, interpolation="bicubic", blur_p=0.5),
    }.items():
        results += compare(title, colour, colour_image, [view] * 2, 256, whole=7.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, PHOTOGRAPHS)
        files = open_source(
            DataConfig(dataset="folder", root=name, global_batch_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        )

        def photograph(i: int) -> Image.Image:
            with Image.open(folder / f"{i:03}.jpg") as file:
                return file.convert("RGB")

        two = [replace(LARGE, count=2)]
        results += compare("224 px JPEG", files, photograph, two, PHOTOGRAPHS, whole=2.6, worker=5.8)
        packed = packed_raw(folder)
        results += compare("224 px packed raw", packed, photograph, two, PHOTOGRAPHS, whole=None, worker=10)
        results += compare(
            "multi-crop JPEG", files, photograph, MULTI_CROP, PHOTOGRAPHS, whole=2.7, worker=7.7
        )
    return results


if __name__ == "__main__":
    sys.exit(report(measure()))
