"""Pictures of a run, as PNG files that contain their captions. Importable without torch.

``pictures/NAME-step=N.png`` in a run directory is what NAME looked like after N optimiser steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sslzoo.files import atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

FOLDER = "pictures"
NAMES = ("views", "neighbours", "embedding_map")  # drawn at every evaluation
CAPTION = "Description"  # the keyword of PNG's standard
# Side of an image in a sheet, height of its text and width of its frame, in pixels.
CELL, TEXT, FRAME = 96, 11, 3
COLOURED = 10  # classes with a colour of their own
_NUMBERED = re.compile(r"(?P<name>.+)-step=(?P<step>\d+)\.png")


class Drawing(NamedTuple):
    """A picture that is not written yet."""

    picture: Image.Image | Figure
    caption: str


class Tile(NamedTuple):
    """An image of a sheet, None if it cannot be shown, with a line of text below it and a frame."""

    image: Image.Image | None
    text: str = ""
    frame: str = "white"


def sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Images in rows, each as large as fits in a square. Small ones are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = CELL + 3 * FRAME, CELL + 3 * FRAME + TEXT + 3
    out = Image.new("RGB", (width * max(map(len, rows), default=0), height * len(rows)), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(TEXT)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            x, y = j * width, i * height
            end = CELL + 2 * FRAME - 1
            draw.rectangle((x, y, x + end, y + end), outline=tile.frame, width=FRAME)
            if tile.image is not None:
                image = _fitted(tile.image)
                left, top = (CELL - image.width) // 2, (CELL - image.height) // 2
                out.paste(image, (x + FRAME + left, y + FRAME + top))
            text = tile.text
            while font.getlength(text) > width - FRAME:
                text = text[:-2] + "…"
            draw.text((x + FRAME, y + end + 1), text, fill="black", font=font)
    return out


def _fitted(image: Image.Image) -> Image.Image:
    from PIL import Image

    factor = CELL / max(image.size)
    size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
    filtering = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, filtering)


def coloured(labels: Sequence[int]) -> list[int]:
    """The classes among ``labels``, at most ``COLOURED`` of them, evenly from all; negative labels are none."""
    present = sorted({label for label in labels if label >= 0})
    return present[:: max(1, -(-len(present) // COLOURED))]


def save(drawing: Drawing, path: Path) -> None:
    """Write ``drawing`` to the PNG file ``path`` atomically and flush it to disk."""
    from PIL import Image, PngImagePlugin

    path.parent.mkdir(parents=True, exist_ok=True)
    picture, caption = drawing
    with atomically(path) as part, part.open("wb") as file:
        if isinstance(picture, Image.Image):
            note = PngImagePlugin.PngInfo()
            note.add_itxt(CAPTION, caption)
            picture.save(file, format="PNG", pnginfo=note)
        else:
            picture.savefig(file, format="png", metadata={CAPTION: caption})
        file.flush()
        os.fsync(file.fileno())


def caption_of(path: Path) -> str:
    """The caption in a PNG file; empty without one."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get(CAPTION, ""))


def path_of(run: Path, name: str, step: int) -> Path:
    """The file of the picture ``name`` after ``step`` optimiser steps."""
    return run / FOLDER / f"{name}-step={step}.png"


def name_of(analysis: str, drawing: str) -> str:
    """The name of a picture that an analysis draws, in which ``/`` becomes ``_`` because it is that of a file."""
    return f"{analysis.replace(':', '.')}_{drawing}".replace("/", "_")


def numbered(run: Path, *, after: int = -1) -> list[tuple[int, str, Path]]:
    """Step, name and file of the pictures of a step later than ``after``, in the order of steps."""
    folder = run / FOLDER
    found = ((_NUMBERED.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    steps = ((int(match["step"]), match["name"], path) for match, path in found if match)
    return sorted(entry for entry in steps if entry[0] > after)


def delete_after(run: Path, step: int) -> None:
    """Delete the pictures of steps later than ``step``, which a run that continues there makes again."""
    for *_, path in numbered(run, after=step):
        with suppress(OSError):
            path.unlink()
