"""Random crop boxes, and the resampling of crops.

Shapes: N samples, C channels, H x W image, S side of the output crop. A box is (top, left, height, width)
in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from sslzoo.checks import require
from sslzoo.recipe.sections import PlainView

# Called by torch's interpolate too, but without a result to write to.
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
ATTEMPTS = 10
CROP_DRAWS = 2 * ATTEMPTS + 2


def sample_boxes(
    u: Tensor, height: Tensor, width: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes (N, 4) int64 as in torchvision's RandomResizedCrop, from uniforms ``u`` (N, CROP_DRAWS).

    Ten attempts draw an area and a log-uniform aspect ratio; the first box that fits is placed uniformly. If
    none fits, the box is the largest central one within the range of ``ratio``. ``height`` and ``width`` (N,)
    are the image sizes.
    """
    height, width = height.double(), width.double()
    fraction, aspect = _attempts(u, scale, ratio)
    area = (height * width)[:, None] * fraction
    w = (area * aspect).sqrt().round()  # (N, ATTEMPTS); rounds half to even, like Python
    h = (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = ((height - h + 1) * u[:, -2]).floor()
    left = ((width - w + 1) * u[:, -1]).floor()

    central_w = torch.where(width / height > ratio[1], (height * ratio[1]).round(), width)
    central_h = torch.where(width / height < ratio[0], (width / ratio[0]).round(), height)
    central = ((height - central_h) // 2, (width - central_w) // 2, central_h, central_w)
    any_fits = fits.any(dim=1)
    box = [torch.where(any_fits, a, b) for a, b in zip((top, left, h, w), central, strict=True)]
    return torch.stack(box, dim=1).long()


def _attempts(u: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The areas of the attempts, as fractions of the image's, and their aspect ratios, (N, ATTEMPTS)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    fraction = scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS]
    return fraction, torch.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])


class SampledBox(NamedTuple):
    """A box of :func:`sample_boxes` before the size of its image is known."""

    fractions: list[float]
    aspects: list[float]
    ratio: tuple[float, float]
    top: float  # its place, in [0, 1)
    left: float

    def on(self, height: int, width: int) -> list[int]:
        """The box on an image of this size: exactly that of :func:`sample_boxes`."""
        pixels = height * width
        for fraction, aspect in zip(self.fractions, self.aspects, strict=True):
            area = pixels * fraction
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return [int((height - h + 1) * self.top), int((width - w + 1) * self.left), h, w]
        low, high = self.ratio
        w = round(height * high) if width / height > high else width
        h = round(width / low) if width / height < low else height
        return [(height - h) // 2, (width - w) // 2, h, w]

    @classmethod
    def drawn(cls, u: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> list[SampledBox]:
        """The boxes of N images, from uniforms ``u`` (N, CROP_DRAWS)."""
        fractions, aspects = (x.tolist() for x in _attempts(u, scale, ratio))
        places = u[:, -2:].tolist()
        return [cls(f, a, ratio, *place) for f, a, place in zip(fractions, aspects, places, strict=True)]


def padded_boxes(u: Tensor, height: Tensor, width: Tensor, size: int, padding: int) -> Tensor:
    """Boxes (N, 4) int64 of ``size`` pixels at a random place of images padded on all sides, as in torchvision's
    RandomCrop, from uniforms ``u`` (N, CROP_DRAWS). Coordinates are those of the image without its padding.

    Raises ``ValueError`` if the padded image is smaller than ``size``.
    """
    _check_fits(size, int(torch.minimum(height, width).min()) if len(height) else size, padding)
    top = ((height + 2 * padding - size + 1) * u[:, -2]).floor() - padding
    left = ((width + 2 * padding - size + 1) * u[:, -1]).floor() - padding
    side = torch.full_like(top, size)
    return torch.stack([top, left, side, side], dim=1).long()


class PaddedBox(NamedTuple):
    """A box of :func:`padded_boxes` before the size of its image is known."""

    size: int
    padding: int
    top: float  # its place, in [0, 1)
    left: float

    def on(self, height: int, width: int) -> list[int]:
        """The box on an image of this size. Raises ``ValueError`` if the padded image is smaller than the box."""
        _check_fits(self.size, min(height, width), self.padding)
        room = 2 * self.padding - self.size + 1
        top, left = int((height + room) * self.top), int((width + room) * self.left)
        return [top - self.padding, left - self.padding, self.size, self.size]


def _check_fits(size: int, side: int, padding: int) -> None:
    require(
        side + 2 * padding >= size,
        f"a crop of {size} px does not fit into an image of {side} px with {padding} px of padding",
    )


def crop_into(crop: Tensor, image: Tensor, box: list[int], interpolation: str) -> None:
    """Fill ``crop`` (C, S, S) with an antialiased crop of ``image`` (C, H, W), both uint8; black where the box leaves
    the image.

    Fast if both are channels-last in memory: see :func:`channels_last`.
    """
    top, left, height, width = box
    bottom, right = top + height, left + width
    if min(top, left) < 0 or bottom > image.shape[1] or right > image.shape[2]:
        image = TF.crop_image(image, *box)
    else:
        image = image.narrow(1, top, height).narrow(2, left, width)
    if image.shape == crop.shape:
        crop.copy_(image)
    else:
        _RESIZE[interpolation](image[None], list(crop.shape[1:]), False, out=crop[None])


def channels_last(image: Tensor) -> Tensor:
    """The image (C, H, W) in the channels-last memory layout, in which resizing is fast."""
    return image[None].contiguous(memory_format=torch.channels_last)[0]


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], contiguous."""
    unit = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    return torch.div(images, 255, out=unit)


def _triangle(x: Tensor) -> Tensor:
    """Minus the triangle's height at ``x``, which is overwritten. The sign is lost when weights are divided by their
    sum."""
    return x.abs_().sub_(1).clamp_(max=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, as in PIL and torch's antialiased bicubic interpolation. Overwrites ``x``."""
    # Its two cubics, of 1 - x and 2 - x, without torch.where, which is slow on CPUs, and in place, as memory is too:
    # near^2 (1 - 2 near) + far^2 / 2 (far - 1)
    x.abs_()
    near, far = (1 - x).clamp_(min=0), (2 - x).clamp_(min=0)
    value = near.square().mul_(near.mul_(-2).add_(1))
    return value.add_(far.square().mul_(0.5).mul_(far.sub_(1)))


def interpolation_matrix(
    start: Tensor,
    length: Tensor,
    source: int,
    size: int,
    interpolation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Matrices (N, size, source) that resample ``[start, start + length)`` to ``size`` points, antialiased.

    ``start`` and ``length`` (N,) are in pixels of a line of ``source`` pixels; pixels outside have weight 0.
    """
    start, length = start.to(dtype)[:, None, None], length.to(dtype)[:, None, None]
    pixel = torch.arange(source, device=start.device, dtype=dtype) + 0.5 - start  # (N, 1, source)
    pixel = torch.where((pixel > 0) & (pixel < length), pixel, torch.inf)  # no kernel reaches those outside
    scale = length / size
    centre = scale * (torch.arange(size, device=start.device, dtype=dtype)[:, None] + 0.5)  # (N, size, 1)
    kernel = _triangle if interpolation == "bilinear" else _cubic
    weights = kernel((pixel - centre).div_(scale.clamp(min=1)))
    return weights.div_(weights.sum(dim=2, keepdim=True))


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply each image by its own matrices: ``rows @ image @ columns^T`` (N, C, S, T).

    ``images`` (N, C, H, W), ``rows`` (N, S, H), ``columns`` (N, T, W).
    """
    n, c, h, w = images.shape
    s, t = rows.shape[1], columns.shape[1]
    if c == 1:
        return (rows @ (images[:, 0] @ columns.mT))[:, None]
    # Stack the channels vertically, for one matrix product per sample instead of one per channel.
    wide = images.reshape(n, c * h, w) @ columns.mT  # (N, C H, T)
    tall = wide.view(n, c, h, t).transpose(2, 3).reshape(n, c * t, h)
    return (tall @ rows.mT).view(n, c, t, s).transpose(2, 3).contiguous()


def crop_batch(images: Tensor, boxes: Tensor, size: int, interpolation: str, padding: int = 0) -> Tensor:
    """Crops (K N, C, S, S), float32 in [0, 1] and not rounded to integer levels, of uint8 images (N, C, H, W), K times
    one after the other, for boxes (K N, 4).

    Computes the whole batch at once, with separate filter weights per crop. ``padding``: black pixels that are added
    on all sides first, for boxes that leave the image by up to so much.
    """
    if padding:
        images = F.pad(images, [padding] * 4)
        boxes = torch.cat([boxes[:, :2] + padding, boxes[:, 2:]], dim=1)
    starts, lengths = boxes[:, :2].T, boxes[:, 2:].T  # of rows and columns, (2, N)
    if images.shape[2] == images.shape[3]:
        both = interpolation_matrix(starts.flatten(), lengths.flatten(), images.shape[2], size, interpolation)
        rows, columns = both.chunk(2)
    else:
        rows, columns = (
            interpolation_matrix(start, length, side, size, interpolation)
            for start, length, side in zip(starts, lengths, images.shape[2:], strict=True)
        )
    if len(boxes) > len(images):
        images = images.repeat(len(boxes) // len(images), 1, 1, 1)
    out = resample(to_unit(images), rows, columns)
    return out.clamp_(0, 1) if interpolation == "bicubic" else out  # the cubic kernel overshoots


def evaluation_crop(images: Tensor, view: PlainView) -> Tensor:
    """Images (..., C, H, W) uint8 as ``view`` shows them: (..., C, S, S) uint8.

    Raises ``ValueError`` if the image is smaller than ``view.size`` and not resized.
    """
    mode, size, resize = InterpolationMode(view.interpolation), view.size, view.resize
    h, w = images.shape[-2:]
    if view.proportion is not None:
        sides = (
            [round(view.proportion * min(h, w))] * 2
            if view.square
            else [int(view.proportion * x) for x in (h, w)]
        )
        centre = TF.center_crop_image(images, sides)
        return TF.resize_image(centre, [size, size], interpolation=mode, antialias=True)
    if resize is not None and min(h, w) != resize:
        images = TF.resize_image(images, [resize], interpolation=mode, antialias=True)
    h, w = images.shape[-2:]
    if min(h, w) < size:
        raise ValueError(
            f"eval.size={size} is larger than an image of {h} x {w}; set eval.resize={size} or more"
        )
    return TF.center_crop_image(images, [size, size])


def reflected_index(size: int, pad: int, device: torch.device) -> Tensor:
    """Source indices (size + 2 pad,) of a line of ``size`` points padded by ``pad`` on both sides.

    The padding mirrors the line without repeating the edge, several times if it is longer than the line.
    """
    if size == 1:
        return torch.zeros(1 + 2 * pad, dtype=torch.long, device=device)
    period = 2 * (size - 1)
    index = torch.arange(-pad, size + pad, device=device) % period
    return torch.where(index < size, index, period - index)
