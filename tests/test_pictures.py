"""Pictures of a run are PNG files with their captions, and sheets show every image in its place."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from sslzoo.pictures import (
    CELL,
    FRAME,
    Drawing,
    Tile,
    caption_of,
    coloured,
    delete_after,
    name_of,
    numbered,
    path_of,
    save,
    sheet,
)


def test_a_sheet_shows_each_image_as_large_as_its_place() -> None:
    red, wide = Image.new("L", (4, 4), 90), Image.new("RGB", (2 * CELL, CELL), "red")
    drawn = sheet([[Tile(red, "a", "blue"), Tile(wide, "a very long name of a class")], [Tile(None, "gone")]])
    width, height = drawn.width // 2, drawn.height // 2
    middle = CELL // 2 + FRAME
    assert drawn.getpixel((middle, middle)) == (90, 90, 90)
    assert drawn.getpixel((FRAME - 1, middle)) == (0, 0, 255)
    assert drawn.getpixel((width + middle, middle)) == (255, 0, 0)
    assert drawn.getpixel((width + middle, 4 * FRAME)) == (255, 255, 255)  # half as high as wide
    assert drawn.getpixel((middle, height + middle)) == (255, 255, 255)


def test_files_have_their_captions_and_steps(tmp_path: Path) -> None:
    late, early = path_of(tmp_path, "views", 12), path_of(tmp_path, "map-of-step", 9)
    save(Drawing(Image.new("RGB", (2, 2)), "τ = 0.1"), late)
    save(Drawing(Figure((1, 1)), "a plot"), early)
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / "mine.png")
    assert numbered(tmp_path) == [(9, "map-of-step", early), (12, "views", late)]
    assert [caption_of(path) for path in (late, early, tmp_path / "pictures/mine.png")] == [
        "τ = 0.1",
        "a plot",
        "",
    ]
    assert numbered(tmp_path, after=9) == [(12, "views", late)]
    delete_after(tmp_path, 9)
    assert numbered(tmp_path) == [(9, "map-of-step", early)]
    assert numbered(tmp_path / "nothing") == []
    assert name_of("mine:Look", "layer/angles") == "mine.Look_layer_angles", "a file, and no folder"


def test_at_most_ten_classes_have_a_colour() -> None:
    assert coloured([3, 1, -1, 3]) == [1, 3] and coloured([-1]) == []
    assert coloured(range(10)) == list(range(10)) and coloured(range(25)) == list(range(0, 25, 3))
