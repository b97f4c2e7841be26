"""A picture of the views of a recipe, as the network sees them, with the drawn parameters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sslzoo.checks import require
from sslzoo.data.datasets import open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.data.views import ImageDraws, draw_boxes, draw_images, draw_uniforms
from sslzoo.files import atomically
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Recipe, ViewConfig

_SIDE = 2.0  # inches of a picture


def draw_views(recipe: Recipe, out: Path, count: int, folder: str | None = None) -> list[int]:
    """Draw the views of ``count`` images to the file ``out``, in the format of its suffix; returns their sample ids.

    The images are training images, or those in ``folder``, or all if there are fewer. Their views are those of the
    first epoch. ``ValueError`` if there are none.
    """
    if folder is not None:
        data = replace(recipe.data, dataset="folder", root=folder, split="train", classes=())
        recipe = replace(recipe, data=data)
    source = open_source(recipe.data)
    count = min(count, len(source))
    require(count > 0, f"{source.name} split {source.split!r} has no images to show; see data.root")
    # The batch decides on nothing but what may stand in for unreadable images.
    plan = TrainingPlan(dataset_size=len(source), global_batch_size=1, max_epochs=1)
    data = SSLDataModule(
        replace(recipe.data, workers=0, max_bad_fraction=1.0),  # one that is unreadable hides no others
        recipe.views,
        recipe.eval,
        recipe.probe,
        plan,
        recipe.seed,
        source=source,
    )
    batch = data.batch_of(data.varied_samples(count))
    ids = batch.sample_id.tolist()
    originals = [source.read(i) for i in ids]
    order = {
        role: iter(views) for role, views in (("global", batch.global_views), ("local", batch.local_views))
    }
    shown = [next(order[view.role]) for view in data.views]
    figure = Figure((_SIDE * (1 + len(shown)), 1.4 * _SIDE * count), layout="constrained")
    axes = figure.subplots(count, 1 + len(shown), squeeze=False)
    for row, i, image in zip(axes, ids, originals, strict=True):
        _show(row[0], image.float() / 255, f"{source.where(i)[-60:]}\n{image.shape[2]} × {image.shape[1]}")
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.data.mean, recipe.data.std))
    for k, (view, images) in enumerate(zip(data.views, shown, strict=True)):
        captions = _captions(view, k, recipe.seed, ids, originals)
        for row, image, caption in zip(axes, images, captions, strict=True):
            _show(row[1 + k], image * std + mean, caption)
    with atomically(out) as file:
        figure.savefig(file, format=out.suffix[1:], dpi=120)
    return ids


def _captions(
    view: ViewConfig, k: int, seed: int, ids: Sequence[int], originals: Sequence[Tensor]
) -> list[str]:
    """What was drawn for the ``k``-th view of each image."""
    u = draw_uniforms(seed, 0, k, torch.tensor(ids))
    height, width = (torch.tensor([image.shape[dim] for image in originals]) for dim in (1, 2))
    boxes = draw_boxes(view, u, height, width).tolist()
    return [
        f"{view.role} {view.size} px\n{_caption(box, draws)}"
        for box, draws in zip(boxes, draw_images(view, u, len(originals[0])), strict=True)
    ]


def _caption(box: list[int], draws: ImageDraws) -> str:
    top, left, height, width = box
    parts = [f"crop {width} × {height} at {left}, {top}"]
    parts += [
        f"{name} {factor:+.2f}" if name == "hue" else f"{name} {factor:.2f}" for name, factor in draws.jitter
    ]
    if draws.grayscale:
        parts.append("grey")
    if draws.sigma:
        parts.append(f"blur {draws.sigma:.2f} px")
    parts += [word for word, on in (("solarised", draws.solarize), ("flipped", draws.flip)) if on]
    return textwrap.fill(", ".join(parts), 30)


def _show(axes: Axes, image: Tensor, caption: str) -> None:
    """Draw an image (C, H, W) in [0, 1]."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(caption, fontsize=6, parse_math=False)
