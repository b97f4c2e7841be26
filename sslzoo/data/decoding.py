"""Decode the bytes of image files, including damaged ones, to pixels.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from math import inf

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from sslzoo.data.disk import UnreadableImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_START_OF_JPEG = b"\xff\xd8\xff"
# Markers of JPEG: sequential and progressive frames, and the first scan.
_FRAMES, _SCAN = (0xC0, 0xC1, 0xC2), 0xDA
# Tables, comments, and applications' data but those of EXIF and XMP.
_HARMLESS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)))
_GREY, _RGB = 1, 3  # of torchvision's ImageReadMode
_FRAME = struct.Struct(">BHHB")  # bits, height, width, channels
_ORIENTATION = 0x0112  # tag number in TIFF and EXIF
# Rec. 601 luma in units of 2^-15, rounded down, as libpng converts coloured PNG files.
_LUMA = (9794, 19234, 3740)


def decode(data: bytes | bytearray, channels: int) -> Tensor:
    """Decode the bytes of an image file to (C, H, W) uint8 with 1 or 3 channels, oriented by its EXIF tag.

    Uses the first frame of animations and the upper 8 of 16 bits, and drops transparency. Raises
    ``UnreadableImageError`` for damaged files, unknown formats, and images of more than Pillow's limit of 178,956,970
    pixels, which is checked in the header before decoding.
    """
    # For invalid files, the libraries raise many types of exceptions, and their warnings are not helpful.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _fast(data, channels, luma=channels == 1) if _is_plain_jpeg(data) else None
            if image is not None:
                return image
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                if _is_for_torchvision(file):
                    luma = channels == 1 and file.format in ("JPEG", "MPO")  # these formats store it
                    image = _fast(data, channels, luma=luma)
                image = _thorough(file, channels) if image is None else image
                return _upright(image, _orientation(file))
        except Image.UnidentifiedImageError as error:
            raise UnreadableImageError("in no known format" if data else "empty") from error
        except Exception as error:
            raise UnreadableImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _is_plain_jpeg(data: bytes | bytearray) -> bool:
    """Whether these bytes begin like a JPEG that needs nothing but decoding, which spares Pillow's slower look at them:
    grey or colour of 8 bits, within Pillow's limit of pixels, and without EXIF and XMP, which may rotate it."""
    if not data.startswith(_START_OF_JPEG):
        return False
    at, has_frame = 2, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == _SCAN:
            return has_frame
        if marker in _FRAMES:
            bits, height, width, channels = _FRAME.unpack_from(data, at + 4)
            if bits != 8 or channels not in (1, 3) or not 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                return False
            has_frame = True
        elif marker not in _HARMLESS or length < 2:
            return False
        at += 2 + length
    return False


def _is_for_torchvision(file: ImageFile.ImageFile) -> bool:
    """Whether torchvision should decode the file: not PNG, where it is not faster and may crash the process on damaged
    files, and no long animations, of which it would decode all frames."""
    pixels = file.width * file.height * getattr(file, "n_frames", 1) if file.format == "GIF" else 0
    return file.format in ("JPEG", "MPO", "WEBP", "GIF") and pixels <= 2 * (Image.MAX_IMAGE_PIXELS or inf)


def _fast(data: bytes | bytearray, channels: int, *, luma: bool) -> Tensor | None:
    """Decode with torchvision, which is faster than Pillow; None if it cannot. ``luma``: only the luma of a JPEG."""
    try:
        # What torchvision.io.decode_image calls, without its warning, which takes time: it is deprecated since
        # torchvision 0.29 in favour of a separate package. Once it is removed, Pillow decodes.
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        image = torch.ops.image.decode_image(encoded, _GREY if luma else _RGB, False)
    except (RuntimeError, AttributeError):
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
