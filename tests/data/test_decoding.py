"""From bytes to pixels: right for every format, and no byte ends the process."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from sslzoo.data import decoding
from sslzoo.data.decoding import decode
from sslzoo.data.disk import UnreadableImageError

DRAW = np.random.default_rng(0)
COLOUR = Image.fromarray(DRAW.integers(0, 256, (24, 30, 3), dtype=np.uint8))
GREY = Image.fromarray(DRAW.integers(0, 256, (24, 30), dtype=np.uint8))


def stored(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as file:
        upright = ImageOps.exif_transpose(file)
        assert upright is not None
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_images_stand_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(COLOUR, format, exif=exif)
    assert torch.equal(decode(data, 3), by_pillow(data))


def test_damaged_tags_leave_the_image_as_it_is() -> None:
    data = stored(COLOUR, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9))
    assert decode(data, 3).shape == (3, 24, 30)


PALETTE = COLOUR.quantize(60)


@pytest.mark.parametrize(
    "image",
    [
        COLOUR,
        GREY,
        PALETTE,
        GREY.convert("1"),
        COLOUR.convert("RGBA"),
        GREY.convert("LA"),
        COLOUR.quantize(4),
    ],
    ids=["colour", "grey", "palette", "two levels", "transparent", "transparent grey", "two bits"],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_png_as_torchvision_reads_it(image: Image.Image, channels: int) -> None:
    """Which recipes were measured with; it is only not fit for damaged files."""
    data = stored(image, "PNG")
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    want = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    assert torch.equal(decode(data, channels), want)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_count(format: str) -> None:
    sixteen = np.array(GREY).astype(np.uint16) * 256 + 200
    for channels in (1, 3):
        image = decode(stored(Image.fromarray(sixteen), format), channels)
        assert torch.equal(image, torch.from_numpy(np.array(GREY)).expand(channels, -1, -1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_in_grey(format: str) -> None:
    colour = decode(stored(COLOUR, format), 3).float()
    luma = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    grey = decode(stored(COLOUR, format), 1)
    assert grey.shape == (1, 24, 30)
    assert (grey[0] - luma).abs().max() < (40 if format == "JPEG" else 1.1)  # JPEG's noise is coloured
    assert decode(stored(COLOUR.convert("RGBA"), "WEBP"), 1).shape == (1, 24, 30)


def with_right_sums(png: bytes, flip: int) -> bytes:
    """``png`` with bit ``flip`` of its pixels' stream turned over, and check sums that fit."""
    start = png.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", png[start - 8 : start - 4])
    body = bytearray(png[start : start + length])
    body[flip // 8 % length] ^= 1 << flip % 8
    return png[:start] + body + struct.pack(">I", zlib.crc32(b"IDAT" + body)) + png[start + length + 4 :]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def test_no_damage_ends_the_process() -> None:
    """Each in a process that a fault may end: pixels, or the one exception."""
    damaged: list[bytes] = []
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = stored(COLOUR, format)
        bits = DRAW.integers(0, len(whole) * 8, 30)
        damaged += [flipped(whole, int(bit)) for bit in bits] + [whole[: int(bit) // 8] for bit in bits]
    whole = stored(COLOUR, "PNG")
    damaged += [with_right_sums(whole, int(bit)) for bit in DRAW.integers(0, 8000, 60)]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for data in damaged:
                try:
                    image = decode(data, 3)
                    assert image.dtype == torch.uint8 and image.shape[0] == 3
                except UnreadableImageError:
                    pass
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for data in damaged[-60:]:
        with pytest.raises(UnreadableImageError):
            decode(data, 3)


def test_bombs_are_refused_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    photograph = bytearray(stored(COLOUR, "JPEG"))
    frame = photograph.index(b"\xff\xc0") + 5
    photograph[frame : frame + 4] = struct.pack(">HH", 30_000, 30_000)
    for data in (bomb, bytes(photograph)):
        with pytest.raises(UnreadableImageError, match="900000000 pixels"):
            decode(data, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_not_looked_at_by_pillow_is_decoded_alike(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain JPEG files, and those that only seem to be."""
    files = [stored(image, "JPEG", progressive=True, comment=b"!") for image in (COLOUR, GREY)]
    files += [stored(COLOUR, "JPEG", icc_profile=bytes(200), restart_marker_rows=1)]
    turned = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    files += [stored(COLOUR.convert("CMYK"), "JPEG"), stored(COLOUR, "JPEG", xmp=turned)]
    files += [file[:-100] for file in files]
    found = [outcome(file, channels) for file in files]
    monkeypatch.setattr(decoding, "_is_plain_jpeg", lambda data: False)
    assert found == [outcome(file, channels) for file in files]
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", None)
    assert [isinstance(outcome(file, channels), str) for file in files] == [False] * 3 + [True] * 7


def outcome(data: bytes, channels: int) -> Any:
    """The pixels, or the reason why there are none."""
    try:
        return decode(data, channels).tolist()
    except UnreadableImageError as error:
        return str(error)


def test_of_a_long_animation_only_the_first_frame_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90), PALETTE.rotate(180)])
    first = decode(data, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30)  # three frames are more than twice as many
    monkeypatch.setattr(torch.ops.image, "decode_image", None)
    assert torch.equal(decode(data, 3), first)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"<html>", "in no known format")])
def test_what_is_no_image_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode(data, 3)
