"""Decode the bytes of image files, including damaged ones, to pixels.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import warnings
from math import inf

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from sslzoo.data.disk import UnreadableImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112  # tag number in TIFF and EXIF
# Rec. 601 luma in units of 2^-15, rounded down, as libpng converts coloured PNG files.
_LUMA = (9794, 19234, 3740)


def decode(data: bytes, channels: int) -> Tensor:
    """Decode the bytes of an image file to (C, H, W) uint8 with 1 or 3 channels, oriented by its EXIF tag.

    Uses the first frame of animations and the upper 8 of 16 bits, and drops transparency. Raises
    ``UnreadableImageError`` for damaged files, unknown formats, and images of more than Pillow's limit of 178,956,970
    pixels, which is checked in the header before decoding.
    """
    # For invalid files, the libraries raise many types of exceptions, and their warnings are not helpful.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                image = _fast(file, data, channels) if _is_for_torchvision(file) else None
                image = _thorough(file, channels) if image is None else image
                return _upright(image, _orientation(file))
        except Image.UnidentifiedImageError as error:
            raise UnreadableImageError("in no known format" if data else "empty") from error
        except Exception as error:
            raise UnreadableImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _is_for_torchvision(file: ImageFile.ImageFile) -> bool:
    """Whether torchvision should decode the file: not PNG, where it is not faster and may crash the process on damaged
    files, and no long animations, of which it would decode all frames."""
    pixels = file.width * file.height * getattr(file, "n_frames", 1) if file.format == "GIF" else 0
    return file.format in ("JPEG", "MPO", "WEBP", "GIF") and pixels <= 2 * (Image.MAX_IMAGE_PIXELS or inf)


def _fast(file: ImageFile.ImageFile, data: bytes, channels: int) -> Tensor | None:
    """Decode with torchvision, which is twice as fast as Pillow for JPEG; None if it cannot."""
    try:
        # Deprecated since torchvision 0.29 in favour of a separate package; once it is removed, Pillow decodes.
        from torchvision.io import ImageReadMode, decode_image

        grey = channels == 1 and file.format in ("JPEG", "MPO")  # these formats store luma
        mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
        image = decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
    except (RuntimeError, ImportError):
        return None
    if image.ndim == 4:  # an animation: its first frame
        image = image[0]
    if image.dtype != torch.uint8:
        image = TF.to_dtype(image, torch.uint8, scale=True)
    return _luma(image) if len(image) > channels else image


def _thorough(file: ImageFile.ImageFile, channels: int) -> Tensor:
    """Decode with Pillow."""
    if file.mode.startswith("I;16"):
        grey = torch.from_numpy((np.asarray(file) >> 8).astype(np.uint8))[None]
        return grey.expand(channels, -1, -1)
    if channels == 1 and file.format != "PNG":
        return torch.from_numpy(np.array(file.convert("L")))[None]
    image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    return _luma(image) if channels == 1 else image


def _luma(image: Tensor) -> Tensor:
    """Convert RGB (3, H, W) uint8 to grey (1, H, W)."""
    red, green, blue = image.int()
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]) >> 15).to(torch.uint8)[None]


def _orientation(file: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8; 1 (unchanged) if there is no valid tag."""
    try:
        return file.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged tags do not make the pixels unusable
        return 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Rotate and mirror ``image`` (C, H, W) according to its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return image.flip(flipped) if flipped else image
