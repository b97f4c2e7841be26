"""Conversion of RGB to the colour spaces of the three-view set-up, as pure functions without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.nn.numerics import autocast_off, ieee_matmul
from sslzoo_methods.metaug.config import ColorSpace

# Linear sRGB to XYZ (IEC 61966-2-1), and the D65 white point for the 2 degree observer.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
# ITU-R BT.601 with offsets (16, 128, 128).
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
# Mean and standard deviation of the official code.
STATISTICS = {
    "lab": ((50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "ycbcr": ((116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
}


def _matrix(values: tuple[tuple[float, ...], ...], x: Tensor) -> Tensor:
    with ieee_matmul():
        return torch.einsum("dc,nchw->ndhw", torch.tensor(values, dtype=x.dtype, device=x.device), x)


def _channels(values: tuple[float, ...], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None]


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] (N, 3, H, W) to CIELAB, with L in [0, 100]."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _matrix(XYZ, linear) / _channels(WHITE, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """Convert RGB in [0, 1] (N, 3, H, W) to YCbCr, with Y in [16, 235]."""
    return _matrix(YCBCR, rgb) + _channels((16.0, 128.0, 128.0), rgb)


@torch.no_grad()
def normalized(rgb: Tensor, color_space: ColorSpace) -> Tensor:
    """Convert RGB in [0, 1] (N, 3, H, W) to ``lab`` or ``ycbcr`` and normalise with the official statistics."""
    with autocast_off(rgb):
        converted = rgb_to_lab(rgb) if color_space == "lab" else rgb_to_ycbcr(rgb)
        mean, std = STATISTICS[color_space]
        return (converted - _channels(mean, converted)) / _channels(std, converted)
