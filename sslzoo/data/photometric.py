"""Colour, blur, solarisation and flip of a whole batch, each sample with its own parameters.

Images are float32 (N, C, H, W) in [0, 1]; parameters are (N,). Every operation equals torchvision's
v2 functional one for the same parameter. On one channel saturation, hue and grayscale change nothing.
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
    """Luma (N, 1, H, W); one channel comes back as it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, clamped."""
    factor = _per_sample(factor)
    return torch.addcmul(other * (1 - factor), images, factor).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black (factor 0)."""
    return (images * _per_sample(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luma (factor 0)."""
    return _blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma (factor 0)."""
    return images if images.shape[1] == 1 else _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by ``shift`` of a full circle, value and saturation kept."""
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
    k = torch.sub(k, (k / 6).floor_(), alpha=6)  # modulo 6; remainder() is slow
    return torch.addcmul(high[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), chroma[:, None], value=-1)


def to_grayscale(images: Tensor) -> Tensor:
    """Luma in every channel."""
    return grayscale(images).expand_as(images)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert what is at or above ``threshold``."""
    return torch.where(images >= threshold, 1 - images, images)


def horizontal_flip(images: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(-1)


@lru_cache(maxsize=32)
def _tap_sources(size: int, taps: int, device: torch.device) -> Tensor:
    """One where tap t of point i reads pixel j of a mirrored line (taps, size * size)."""
    sources = reflected_index(size, taps // 2, device).unfold(0, taps, 1)  # (size, taps)
    return F.one_hot(sources, size).transpose(0, 1).reshape(taps, size * size).float()


def blur_matrix(sigma: Tensor, size: int, taps: int) -> Tensor:
    """A Gaussian filter as a matrix over a mirrored line of ``size``, one a sample (N, size, size)."""
    x = torch.arange(taps, device=sigma.device, dtype=sigma.dtype) - (taps - 1) / 2
    weights = torch.softmax(-0.5 * (x / sigma[:, None]) ** 2, dim=1)  # (N, taps)
    return (weights @ _tap_sources(size, taps, sigma.device)).view(-1, size, size)


def gaussian_blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blur with ``taps`` weights exp(-x^2 / 2 sigma^2) in each direction and mirrored borders.

    A filter longer than the image mirrors it repeatedly (torchvision refuses that).
    """
    height, width = images.shape[-2:]
    rows = blur_matrix(sigma, height, taps)
    return resample(images, rows, rows if height == width else blur_matrix(sigma, width, taps))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images - mean) / std`` per channel."""
    return (images - _per_channel(mean, images.device)) / _per_channel(std, images.device)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), sent to the device once: at each batch the host would wait for the copy."""
    with torch.inference_mode(False):  # evaluation may be the first to ask, and training the next
        return torch.tensor(values, device=device)[:, None, None]
