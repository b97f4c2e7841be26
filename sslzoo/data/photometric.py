"""Colour changes, blur and solarisation of images in float32 with values in [0, 1].

Images are (..., C, H, W); functions ending in ``_`` change them in place. A parameter is a number, for all images, or a
tensor that broadcasts, such as (N, 1, 1, 1) for N images. Every operation equals the functional one of torchvision v2
with the same parameter. Saturation and hue need RGB images.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.data.crops import reflected_index, resample

_LUMA = (0.2989, 0.587, 0.114)
# In standard deviations: where a Gaussian is cut off, which leaves out 7e-6 of its sum.
_CUT = 4.5
# Of red, green and blue: the hue, in sixths of a circle, at which red is lowest, and green and blue are highest.
_HUES = (3.0, 2.0, 4.0)

Parameter = float | Tensor


def grayscale(images: Tensor) -> Tensor:
    """Luma (..., 1, H, W); single-channel images are returned unchanged."""
    if images.shape[-3] == 1:
        return images
    red, green, blue = images.unbind(dim=-3)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(-3)


def blend_(
    images: Tensor, factor: Parameter, *, luma: Parameter | None = None, mean: Parameter | None = None
) -> Tensor:
    """``factor`` times the images, plus ``luma`` times the luma of each pixel and ``mean`` times the mean luma of each
    image, clamped to [0, 1].

    ``factor`` alone changes the brightness, with ``luma`` = 1 - factor the saturation, with ``mean`` = 1 - factor the
    contrast.
    """
    if luma is not None:
        grey = grayscale(images)
        other = grey * luma if mean is None else _plus(_mean(grey) * mean, grey, luma)
    elif mean is not None:
        other = grayscale(_mean(images)) * mean
    else:
        return images.mul_(factor).clamp_(0, 1)
    return _plus(other, images, factor, out=images).clamp_(0, 1)


def _plus(other: Tensor, images: Tensor, factor: Parameter, out: Tensor | None = None) -> Tensor:
    """``other + factor * images`` in a single pass."""
    if isinstance(factor, Tensor):
        return torch.addcmul(other, images, factor, out=out)
    return torch.add(other, images, alpha=factor, out=out)


def _mean(images: Tensor) -> Tensor:
    """The mean of each channel of each image, (..., C, 1, 1)."""
    if images.ndim == 3:
        # Torch divides the sum over a whole tensor among threads, and its rounding depends on their number.
        return images.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
    return images.mean(dim=(-2, -1), keepdim=True)


def shift_hue_(images: Tensor, shift: Parameter) -> Tensor:
    """Shift the hue in HSV by ``shift``, as a fraction of a full circle; value and saturation do not change.
    Results may leave [0, 1] by rounding errors.

    Without ``where`` and reductions over the channels, which are slow on CPUs.
    """
    red, green, blue = images.unbind(dim=-3)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high - low  # value times saturation
    # The distance from red is 1 + (green + blue - red - low) / chroma sixths of the circle, on either green's side or
    # blue's. A grey pixel has no hue, and any will do.
    distance, side = (green - low).add_(blue - red), green - blue
    sixth = _per_channel((1 / 6,), images.device)[0]
    torch.addcdiv(sixth, distance, chroma.clamp(min=1e-30), value=1 / 6, out=distance)
    hue = distance.copysign_(side).unsqueeze(-3).add_(shift + 1).frac_()  # of a circle, from 0
    # From low to high: red |6 hue - 3| - 1, green 2 - |6 hue - 2|, blue 2 - |6 hue - 4|.
    torch.sub(_per_channel(_HUES, images.device), hue, alpha=6, out=images).abs_().clamp_(1, 2)
    others = images.narrow(-3, 1, 2)
    torch.addcmul(high.add_(chroma).unsqueeze(-3), others, chroma.unsqueeze(-3), value=-1, out=others)
    torch.addcmul(low.sub_(chroma), red, chroma, out=red)
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert values at or above ``threshold``."""
    return torch.where(images >= threshold, 1 - images, images)


@lru_cache(maxsize=32)
def _tap_sources(size: int, taps: int, device: torch.device) -> Tensor:
    """One-hot matrix (taps, size * size): 1 where tap t of output i reads pixel j of a line with mirrored borders."""
    sources = reflected_index(size, taps // 2, device).unfold(0, taps, 1)  # (size, taps)
    return F.one_hot(sources, size).transpose(0, 1).reshape(taps, size * size).float()


def blur_matrix(sigma: Tensor, size: int, taps: int) -> Tensor:
    """Gaussian filters on a line of ``size`` pixels with mirrored borders, as matrices (N, size, size)."""
    x = torch.arange(taps, device=sigma.device, dtype=sigma.dtype) - (taps - 1) / 2
    weights = torch.softmax(-0.5 * (x / sigma[:, None]) ** 2, dim=1)  # (N, taps)
    return (weights @ _tap_sources(size, taps, sigma.device)).view(-1, size, size)


def gaussian_blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blur with a Gaussian kernel of ``taps`` pixels and ``sigma`` (N,) pixels, with mirrored borders.

    If the kernel is larger than the image, the image is mirrored repeatedly (torchvision refuses that).
    """
    height, width = images.shape[-2:]
    rows = blur_matrix(sigma, height, taps)
    return resample(images, rows, rows if height == width else blur_matrix(sigma, width, taps))


def blur_(image: Tensor, sigma: float, taps: int) -> Tensor:
    """The same for one image (C, H, W), in place: one dimension after the other, with the taps that matter. Faster than
    :func:`gaussian_blur` on a CPU."""
    reach = min(taps // 2, math.ceil(_CUT * sigma))
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(reach + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (-1, -2):
        size = image.shape[dim]
        if reach < size:
            pad = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
            padded = F.pad(image[None], pad, mode="reflect")[0]
        else:
            padded = image.index_select(dim, reflected_index(size, reach, image.device))
        torch.mul(padded.narrow(dim, reach, size), weights[0] / total, out=image)
        for i in range(1, reach + 1):
            for start in (reach - i, reach + i):
                image.add_(padded.narrow(dim, start, size), alpha=weights[i] / total)
    return image


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images - mean) / std`` per channel."""
    return (images - _per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def normalize_(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The same in place."""
    return images.sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` as a tensor (C, 1, 1), copied to the device only once, because each copy would synchronise."""
    with torch.inference_mode(False):  # training may reuse a tensor first created in an evaluation
        return torch.tensor(values, device=device)[:, None, None]
