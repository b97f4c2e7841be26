"""Draw the random parameters of views, and apply them to images.

Parameters are drawn on the CPU for a whole batch, as a function of (seed, epoch, sample_id, view) only. They are
applied to the batch on its device (``draw_view``, ``apply_view``), or on the CPU to one image after the other, while it
is in the cache (``draw_images``, ``apply_to_image``). Both give the same views but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.data import photometric as ph
from sslzoo.data.crops import CROP_DRAWS, PaddedBox, SampledBox, padded_boxes, sample_boxes
from sslzoo.randomness import view_uniforms
from sslzoo.recipe.sections import ViewConfig

# Columns of a view's uniforms, after those used by the crop.
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SIGMA, SOLARIZE, FLIP, ORDER = range(
    CROP_DRAWS, CROP_DRAWS + 11
)
DRAWS = ORDER + 4

_FACTORS = (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("saturation", SATURATION), ("hue", HUE))
_COLOURLESS = ("brightness", "contrast")  # the jitter operations that affect single-channel images


class Blend(NamedTuple):
    """Changes of brightness, contrast and saturation, each image's own: the arguments of ``photometric.blend_`` for the
    images from ``start`` to ``stop``."""

    start: int
    stop: int
    factor: Tensor  # (n, 1, 1, 1), as the following
    luma: Tensor | None  # None: no saturation is changed
    mean: Tensor | None


class Jitter(NamedTuple):
    """The colour jitter of a batch. Its operations come in a random order, but the hue is shifted once, for all images
    together: they are sorted by the number of operations before that, the most first."""

    rows: Tensor  # (n,): the images with jitter, in this order
    before: tuple[Blend, ...]  # start and stop count the images with jitter
    hue: Tensor | None  # (n, 1, 1, 1)
    after: tuple[Blend, ...]


class ViewDraws(NamedTuple):
    """The random parameters of N images, those of one view or of several one after the other; index tensors (n,) are
    the rows to which an operation applies."""

    jitter: Jitter | None
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor  # of the Gaussian in pixels, for each row in blur
    solarize: Tensor
    flip: Tensor
    boxes: Tensor  # crop boxes (N, 4), or (0, 4) if the images are already cropped


class ImageDraws(NamedTuple):
    """The random parameters of one view of one image."""

    jitter: tuple[tuple[str, float], ...]  # operations and their factors, in order
    grayscale: bool
    sigma: float  # of the blur, in pixels; 0: none
    solarize: bool
    flip: bool


def expand_views(views: Sequence[ViewConfig]) -> tuple[ViewConfig, ...]:
    """One entry per crop. The index in this list is part of the key of the view's random numbers."""
    return tuple(replace(view, count=1) for view in views for _ in range(view.count))


def applied_together(views: Sequence[ViewConfig], channels: int) -> tuple[tuple[int, ...], ...]:
    """Groups of ``views`` (their indices) that :func:`apply_view` may take as one batch: of one size, resampled alike,
    with the same kinds of jitter. How likely and how strong a change is does not matter: it is drawn for each image."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, view in enumerate(views):
        crop = (view.size, view.interpolation, view.padding)
        alike = (*crop, view.blur_kernel, view.solarize_threshold, _active(view, channels))
        groups.setdefault(alike, []).append(k)
    return tuple(tuple(group) for group in groups.values())


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


def draw_image_boxes(cfg: ViewConfig, u: Tensor) -> list[SampledBox | PaddedBox]:
    """The same boxes for one image after the other, whose sizes are not known yet."""
    u = u[:, :CROP_DRAWS]
    if cfg.padding is not None:
        return [PaddedBox(cfg.size, cfg.padding, top, left) for top, left in u[:, -2:].tolist()]
    assert cfg.scale is not None
    return [*SampledBox.drawn(u, cfg.scale, cfg.ratio)]


def jitter_factor(cfg: ViewConfig, name: str, u: Tensor) -> Tensor:
    """Uniform in [max(0, 1 - x), 1 + x], or [-x, x] for the hue, as in torchvision's ColorJitter."""
    x = getattr(cfg, name)
    low, high = (-x, x) if name == "hue" else (max(0.0, 1 - x), 1 + x)
    return (low + (high - low) * u).float()


class _Operations(NamedTuple):
    """Jitter operations of N samples, A of them active: their factors and ranks in the random order."""

    factor: Tensor  # (N, A) float32
    rank: Tensor  # (N, A) int64


def _active(cfg: ViewConfig, channels: int) -> tuple[str, ...]:
    """The jitter operations of a view."""
    return tuple(
        name for name, _ in _FACTORS if getattr(cfg, name) > 0 and (channels > 1 or name in _COLOURLESS)
    )


def _operations(cfg: ViewConfig, u: Tensor, names: Sequence[str]) -> _Operations:
    active = [(name, column) for name, column in _FACTORS if name in names]
    factors = [jitter_factor(cfg, name, u[:, column]) for name, column in active]
    order = u[:, [ORDER + column - BRIGHTNESS for _, column in active]].argsort(dim=1, stable=True)
    return _Operations(torch.stack(factors, dim=1) if factors else u[:, :0], order.argsort(dim=1))


def _draw_jitter(views: Sequence[ViewConfig], u: Sequence[Tensor], channels: int) -> Jitter | None:
    names = _active(views[0], channels)
    chosen = [(part[:, JITTER] < view.jitter_p).nonzero()[:, 0] for view, part in zip(views, u, strict=True)]
    drawn = [_operations(view, part[rows], names) for view, part, rows in zip(views, u, chosen, strict=True)]
    factor, rank = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    rows = _joined(chosen, u)
    if not names or len(rows) == 0:
        return None
    hue = names.index("hue") if "hue" in names else None
    blends = [k for k in range(len(names)) if k != hue]
    place = torch.full_like(rows, len(blends)) if hue is None else rank[:, hue]  # blends before the hue
    order = place.argsort(descending=True, stable=True)
    rows, factor, rank, place = rows[order], factor[order], rank[order], place[order]
    sequence = rank[:, blends].argsort(dim=1)  # of each row, as indices into blends
    used = [names[k] for k in blends]

    def blend(start: int, stop: int, turn: Tensor) -> Blend:
        """The blend at each row's ``turn`` (n, 1)."""
        operation = sequence[start:stop].gather(1, turn)
        factors = factor[start:stop, blends].gather(1, operation)[:, :, None, None]
        operation = operation[:, :, None, None]

        def share(name: str) -> Tensor:
            return torch.where(operation == used.index(name), 1 - factors, 0.0)

        luma, mean = (share(name) if name in used else None for name in ("saturation", "contrast"))
        return Blend(start, stop, factors, luma, mean)

    n, before, after = len(rows), [], []
    for k in range(len(blends)):
        stop = int((place > k).sum())
        if stop:
            before.append(blend(0, stop, torch.full((stop, 1), k)))
    for k in range(len(blends)):
        start = int((place >= len(blends) - k).sum())
        if start < n:
            after.append(blend(start, n, place[start:, None] + k))
    shift = None if hue is None else factor[:, hue, None, None, None]
    return Jitter(rows, tuple(before), shift, tuple(after))


def _joined(rows: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
    """Rows of several views as rows of the batch in which these follow one another."""
    starts = accumulate((len(part) for part in u[:-1]), initial=0)
    return torch.cat([part + start for part, start in zip(rows, starts, strict=True)])


def draw_view(
    views: Sequence[ViewConfig], u: Sequence[Tensor], channels: int, boxes: Tensor | None = None
) -> ViewDraws:
    """Parameters of all operations after the crop, from the uniforms ``u`` (N, DRAWS) of each view: those of a single
    one, or of several that are :func:`applied_together`, as one batch in which they follow one another."""

    def rows(column: int, p: str) -> list[Tensor]:
        return [
            (part[:, column] < getattr(view, p)).nonzero()[:, 0] for view, part in zip(views, u, strict=True)
        ]

    blur = rows(BLUR, "blur_p")
    grey = rows(GRAYSCALE, "grayscale_p") if channels > 1 else [torch.empty(0, dtype=torch.int64)] * len(u)
    sigma = [_sigma(view, part[chosen]) for view, part, chosen in zip(views, u, blur, strict=True)]
    return ViewDraws(
        jitter=_draw_jitter(views, u, channels),
        grayscale=_joined(grey, u),
        blur=_joined(blur, u),
        sigma=torch.cat(sigma),
        solarize=_joined(rows(SOLARIZE, "solarize_p"), u),
        flip=_joined(rows(FLIP, "flip_p"), u),
        boxes=torch.empty((0, 4), dtype=torch.int64) if boxes is None else boxes,
    )


def draw_images(cfg: ViewConfig, u: Tensor, channels: int) -> list[ImageDraws]:
    """The same for one image after the other."""
    names = _active(cfg, channels)
    factor, rank = _operations(cfg, u, names)
    chosen = [(u[:, column] < p).tolist() for column, p in (
        (JITTER, cfg.jitter_p), (GRAYSCALE, cfg.grayscale_p if channels > 1 else 0.0), (BLUR, cfg.blur_p),
        (SOLARIZE, cfg.solarize_p), (FLIP, cfg.flip_p),
    )]  # fmt: skip
    order, factors, sigmas = rank.argsort(dim=1).tolist(), factor.tolist(), _sigma(cfg, u).tolist()
    return [
        ImageDraws(
            jitter=tuple((names[k], factors[i][k]) for k in order[i]) if jitter else (),
            grayscale=grey,
            sigma=sigmas[i] if blur else 0.0,
            solarize=solarize,
            flip=flip,
        )
        for i, (jitter, grey, blur, solarize, flip) in enumerate(zip(*chosen, strict=True))
    ]


def _sigma(cfg: ViewConfig, u: Tensor) -> Tensor:
    low, high = cfg.blur_sigma
    return (low + (high - low) * u[:, SIGMA]).float()


def apply_view(cfg: ViewConfig, images: Tensor, draws: ViewDraws) -> Tensor:
    """Apply jitter, grayscale, blur, solarisation and flip to float32 crops (N, C, S, S) in place."""
    if draws.jitter is not None:
        rows, before, hue, after = draws.jitter
        jittered = images[rows]
        for blend in before:
            _apply_blend(jittered, blend)
        if hue is not None:
            ph.shift_hue_(jittered, hue)
        for blend in after:
            _apply_blend(jittered, blend)
        images.index_copy_(0, rows, jittered)
    if len(draws.grayscale):
        grey = ph.grayscale(images[draws.grayscale])
        images.index_copy_(0, draws.grayscale, grey.expand(-1, images.shape[1], -1, -1))
    if len(draws.blur):
        blurred = ph.gaussian_blur(images[draws.blur], draws.sigma, cfg.blur_kernel)
        images.index_copy_(0, draws.blur, blurred)
    if len(draws.solarize):
        images.index_copy_(0, draws.solarize, ph.solarize(images[draws.solarize], cfg.solarize_threshold))
    if len(draws.flip):
        images.index_copy_(0, draws.flip, images[draws.flip].flip(-1))
    return images


def _apply_blend(images: Tensor, blend: Blend) -> None:
    ph.blend_(images[blend.start : blend.stop], blend.factor, luma=blend.luma, mean=blend.mean)


def apply_to_image(cfg: ViewConfig, image: Tensor, draws: ImageDraws) -> Tensor:
    """The same for one crop (C, S, S), in place."""
    for name, factor in draws.jitter:
        if name == "brightness":
            ph.blend_(image, factor)
        elif name == "contrast":
            ph.blend_(image, factor, mean=1 - factor)
        elif name == "saturation":
            ph.blend_(image, factor, luma=1 - factor)
        else:
            ph.shift_hue_(image, factor)
    if draws.grayscale:
        image.copy_(ph.grayscale(image).expand_as(image))
    if draws.sigma:
        ph.blur_(image, draws.sigma, cfg.blur_kernel)
    if draws.solarize:
        image.copy_(ph.solarize(image, cfg.solarize_threshold))
    if draws.flip:
        image.copy_(image.flip(-1))
    return image
