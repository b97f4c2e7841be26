"""From a view's declaration to its parameters, and from pixels to the view.

Draws are made on the CPU for a whole batch, from (seed, epoch, sample_id, view) alone; they are applied
where the images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.data import photometric as ph
from sslzoo.data.crops import CROP_DRAWS, sample_boxes
from sslzoo.randomness import view_uniforms
from sslzoo.recipe.sections import ViewConfig

# Columns of a view's uniforms after those of the crop.
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SIGMA, SOLARIZE, FLIP, ORDER = range(
    CROP_DRAWS, CROP_DRAWS + 11
)
DRAWS = ORDER + 4

_FACTORS = (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("saturation", SATURATION), ("hue", HUE))
_JITTER = {
    "brightness": ph.adjust_brightness,
    "contrast": ph.adjust_contrast,
    "saturation": ph.adjust_saturation,
    "hue": ph.adjust_hue,
}
_COLOURLESS = ("brightness", "contrast")  # what jitter does to one channel


class JitterPass(NamedTuple):
    """One operation on the samples whose order puts it at this point."""

    operation: str
    rows: Tensor  # (n,) int64
    factor: Tensor  # (n,) float32


class ViewDraws(NamedTuple):
    """What happens to one view of N samples. Rows are those that an operation applies to."""

    jitter: tuple[JitterPass, ...]
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor  # of the blurred rows
    solarize: Tensor
    flip: Tensor
    boxes: Tensor  # (N, 4), for images that are cropped with the rest; (0, 4) for those that come cropped


def expand_views(views: Sequence[ViewConfig]) -> tuple[ViewConfig, ...]:
    """One entry a crop. A view's index, in this order, is part of its random numbers' key."""
    return tuple(replace(view, count=1) for view in views for _ in range(view.count))


def draw_uniforms(seed: int, epoch: int, view: int, sample_id: Tensor) -> Tensor:
    """All uniforms behind one view (N, DRAWS) float64."""
    return view_uniforms(seed, epoch, view, sample_id, DRAWS)


def draw_boxes(cfg: ViewConfig, u: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop boxes (N, 4) from the view's uniforms and the images' sizes (N,)."""
    return sample_boxes(u[:, :CROP_DRAWS], height, width, cfg.scale, cfg.ratio)


def jitter_factor(cfg: ViewConfig, name: str, u: Tensor) -> Tensor:
    """Uniform in [max(0, 1 - x), 1 + x], and [-x, x] for the hue, as torchvision's ColorJitter."""
    x = getattr(cfg, name)
    low, high = (-x, x) if name == "hue" else (max(0.0, 1 - x), 1 + x)
    return (low + (high - low) * u).float()


def _draw_jitter(cfg: ViewConfig, u: Tensor, channels: int) -> tuple[JitterPass, ...]:
    active = [
        (name, column)
        for name, column in _FACTORS
        if getattr(cfg, name) > 0 and (channels > 1 or name in _COLOURLESS)
    ]
    rows = (u[:, JITTER] < cfg.jitter_p).nonzero()[:, 0]
    if not active or len(rows) == 0:
        return ()
    u = u[rows]
    columns = [ORDER + column - BRIGHTNESS for _, column in active]
    rank = u[:, columns].argsort(dim=1, stable=True).argsort(dim=1)  # place of each operation in the order
    passes = []
    for place in range(len(active)):
        for k, (name, column) in enumerate(active):
            here = (rank[:, k] == place).nonzero()[:, 0]
            if len(here):
                passes.append(JitterPass(name, rows[here], jitter_factor(cfg, name, u[here, column])))
    return tuple(passes)


def draw_view(cfg: ViewConfig, u: Tensor, channels: int, boxes: Tensor | None = None) -> ViewDraws:
    """Everything after the crop, from the view's uniforms ``u`` (N, DRAWS)."""

    def rows(column: int, p: float) -> Tensor:
        return (u[:, column] < p).nonzero()[:, 0]

    blur = rows(BLUR, cfg.blur_p)
    low, high = cfg.blur_sigma
    return ViewDraws(
        jitter=_draw_jitter(cfg, u, channels),
        grayscale=rows(GRAYSCALE, cfg.grayscale_p if channels > 1 else 0.0),
        blur=blur,
        sigma=(low + (high - low) * u[blur, SIGMA]).float(),
        solarize=rows(SOLARIZE, cfg.solarize_p),
        flip=rows(FLIP, cfg.flip_p),
        boxes=torch.empty((0, 4), dtype=torch.int64) if boxes is None else boxes,
    )


def apply_view(cfg: ViewConfig, images: Tensor, draws: ViewDraws) -> Tensor:
    """Jitter, grayscale, blur, solarise, flip of float32 crops (N, C, S, S), which are overwritten."""
    for operation, rows, factor in draws.jitter:
        images.index_copy_(0, rows, _JITTER[operation](images[rows], factor))
    if len(draws.grayscale):
        images.index_copy_(0, draws.grayscale, ph.to_grayscale(images[draws.grayscale]))
    if len(draws.blur):
        blurred = ph.gaussian_blur(images[draws.blur], draws.sigma, cfg.blur_kernel)
        images.index_copy_(0, draws.blur, blurred)
    if len(draws.solarize):
        images.index_copy_(0, draws.solarize, ph.solarize(images[draws.solarize], cfg.solarize_threshold))
    if len(draws.flip):
        images.index_copy_(0, draws.flip, ph.horizontal_flip(images[draws.flip]))
    return images
