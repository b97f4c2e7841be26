"""Conversion of RGB to the colour spaces of the three-view set-up, without gradients."""

from __future__ import annotations

from typing import Any

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


class Constants:
    """The constants above as tensors of any type on any device, each made once: on a GPU the host waits for it."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def matrix(self, values: tuple[tuple[float, ...], ...], x: Tensor) -> Tensor:
        """``x`` (N, 3, H, W) with the matrix ``values`` applied to its channels."""
        with ieee_matmul():
            return torch.einsum("dc,nchw->ndhw", self._tensor(values, x), x)

    def channels(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        """One value for each channel, (3, 1, 1), for images like ``x``."""
        return self._tensor(values, x)[:, None, None]

    def _tensor(self, values: Any, x: Tensor) -> Tensor:
        key = values, x.dtype, x.device
        if key not in self._made:
            self._made[key] = torch.tensor(values, dtype=x.dtype, device=x.device)
        return self._made[key]


def rgb_to_lab(rgb: Tensor, constants: Constants) -> Tensor:
    """Convert sRGB in [0, 1] (N, 3, H, W) to CIELAB, with L in [0, 100]."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = constants.matrix(XYZ, linear) / constants.channels(WHITE, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def rgb_to_ycbcr(rgb: Tensor, constants: Constants) -> Tensor:
    """Convert RGB in [0, 1] (N, 3, H, W) to YCbCr, with Y in [16, 235]."""
    return constants.matrix(YCBCR, rgb) + constants.channels((16.0, 128.0, 128.0), rgb)


@torch.no_grad()
def normalized(rgb: Tensor, color_space: ColorSpace, constants: Constants) -> Tensor:
    """Convert RGB in [0, 1] (N, 3, H, W) to ``lab`` or ``ycbcr`` and normalise with the official statistics."""
    with autocast_off(rgb):
        converted = (rgb_to_lab if color_space == "lab" else rgb_to_ycbcr)(rgb, constants)
        mean, std = STATISTICS[color_space]
        return (converted - constants.channels(mean, converted)) / constants.channels(std, converted)
