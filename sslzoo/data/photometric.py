"""Colour changes, blur, solarisation and flip of batches, with separate parameters per sample.

Images are float32 (N, C, H, W) in [0, 1]; parameters are (N,). Every operation equals the functional one of
torchvision v2 with the same parameter. Saturation, hue and grayscale do not change single-channel images.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.data.crops import reflected_index, resample

_LUMA = (0.2989, 0.587, 0.114)


def _per_sample(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]


def grayscale(images: Tensor) -> Tensor:
    """Luma (N, 1, H, W); single-channel images are returned unchanged."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, clamped to [0, 1]."""
    factor = _per_sample(factor)
    return torch.addcmul(other * (1 - factor), images, factor).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the brightness; factor 0 is black."""
    return (images * _per_sample(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image, which is the result for factor 0."""
    return _blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of the image, which is the result for factor 0."""
    return images if images.shape[1] == 1 else _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV by ``shift``, as a fraction of a full circle; value and saturation do not change."""
    if images.shape[1] == 1:
        return images
    low, high = images.aminmax(dim=1)
    chroma = high - low  # value times saturation
    red, green, blue = images.unbind(dim=1)
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector = sector + 6 * shift[:, None, None]
    # Red, green, blue from hue without branches: value - chroma * trapezium(n + sector).
    offset = torch.arange(5.0, 0.0, -2.0, device=images.device)[:, None, None]  # 5, 3, 1
    k = sector[:, None] + offset
    k = torch.sub(k, (k / 6).floor_(), alpha=6)  # k modulo 6; remainder() is slow
    return torch.addcmul(high[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), chroma[:, None], value=-1)


def to_grayscale(images: Tensor) -> Tensor:
    """The luma in every channel."""
    return grayscale(images).expand_as(images)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert values at or above ``threshold``."""
    return torch.where(images >= threshold, 1 - images, images)


def horizontal_flip(images: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(-1)


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


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images - mean) / std`` per channel."""
    return (images - _per_channel(mean, images.device)) / _per_channel(std, images.device)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` as a tensor (C, 1, 1), copied to the device only once, because each copy would synchronise."""
    with torch.inference_mode(False):  # training may reuse a tensor first created in an evaluation
        return torch.tensor(values, device=device)[:, None, None]
