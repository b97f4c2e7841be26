"""Draw the random parameters of views, and apply them to images.

Parameters are drawn on the CPU for a whole batch, as a function of (seed, epoch, sample_id, view) only, and
applied on the device of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.data import photometric as ph
from sslzoo.data.crops import CROP_DRAWS, padded_boxes, sample_boxes
from sslzoo.randomness import view_uniforms
from sslzoo.recipe.sections import ViewConfig

# Columns of a view's uniforms, after those used by the crop.
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
_COLOURLESS = ("brightness", "contrast")  # the jitter operations that affect single-channel images


class JitterPass(NamedTuple):
    """A jitter operation and the samples to which it is applied at this point, since the order is random."""

    operation: str
    rows: Tensor  # (n,) int64
    factor: Tensor  # (n,) float32


class ViewDraws(NamedTuple):
    """The random parameters of one view of N samples; index tensors (n,) are the rows to which an operation applies."""

    jitter: tuple[JitterPass, ...]
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor  # of the Gaussian in pixels, for each row in blur
    solarize: Tensor
    flip: Tensor
    boxes: Tensor  # crop boxes (N, 4), or (0, 4) if the images are already cropped


def expand_views(views: Sequence[ViewConfig]) -> tuple[ViewConfig, ...]:
    """One entry per crop. The index in this list is part of the key of the view's random numbers."""
    return tuple(replace(view, count=1) for view in views for _ in range(view.count))


def draw_uniforms(seed: int, epoch: int, view: int, sample_id: Tensor) -> Tensor:
    """All uniform random numbers of one view, (N, DRAWS) float64."""
    return view_uniforms(seed, epoch, view, sample_id, DRAWS)


def draw_boxes(cfg: ViewConfig, u: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop boxes (N, 4) in pixels, from the view's uniforms ``u`` (N, DRAWS) and the image sizes (N,)."""
    u = u[:, :CROP_DRAWS]
    if cfg.padding is not None:
        return padded_boxes(u, height, width, cfg.size, cfg.padding)
    assert cfg.scale is not None
    return sample_boxes(u, height, width, cfg.scale, cfg.ratio)


def jitter_factor(cfg: ViewConfig, name: str, u: Tensor) -> Tensor:
    """Uniform in [max(0, 1 - x), 1 + x], or [-x, x] for the hue, as in torchvision's ColorJitter."""
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
    rank = u[:, columns].argsort(dim=1, stable=True).argsort(dim=1)  # position of each operation in the order
    passes = []
    for place in range(len(active)):
        for k, (name, column) in enumerate(active):
            here = (rank[:, k] == place).nonzero()[:, 0]
            if len(here):
                passes.append(JitterPass(name, rows[here], jitter_factor(cfg, name, u[here, column])))
    return tuple(passes)


def draw_view(cfg: ViewConfig, u: Tensor, channels: int, boxes: Tensor | None = None) -> ViewDraws:
    """Parameters of all operations after the crop, from the view's uniforms ``u`` (N, DRAWS)."""

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
    """Apply jitter, grayscale, blur, solarisation and flip to float32 crops (N, C, S, S) in place."""
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
