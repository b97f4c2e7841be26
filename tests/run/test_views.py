"""sslzoo views draws what the network will see, and says what was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslzoo.cli.main import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_folder_of_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "views.svg"
    overrides = ["views.0.flip_p=1", "views.0.size=16", "views.0.grayscale_p=1", "views.0.jitter_p=1"]
    code = main(["views", "simclr_in1k", *overrides, "--images", str(photos), "-n", "2", "-o", str(out)])
    assert (code, capsys.readouterr().out) == (0, f"{out}: 2 views of 2 images\n")
    text = " ".join(
        out.read_text().split()
    )  # matplotlib writes captions as comments, and draws their letters
    assert text.count("40 × 30") == 2 and text.count("global 16 px") == 4
    for word in ("crop", "hue", "grey", "flipped"):
        assert text.count(word) >= 4


def test_an_unreadable_image_hides_no_others(photos: Path, tmp_path: Path) -> None:
    (photos / "0.png").write_bytes(b"no image")
    out = tmp_path / "views.svg"
    arguments = ["views.0.size=16", "--images", str(photos), "-n", "2", "-o", str(out)]
    assert main(["views", "simclr_in1k", *arguments]) == 0
    assert "1.png" in out.read_text() and "0.png" not in out.read_text()


def test_embedded_images(tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    assert main(["views", "simclr_fashion_mnist", "-o", str(out)]) == 0
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "0", "-o", "a.png"], "--number must be at least 1, got 0"),
        (["-o", "a.txt"], "a.txt must end in .png, .pdf or .svg"),
        (["-o", "/nowhere/a.png"], "there is no folder /nowhere for a.png; make it first"),
        (["-o", "a.png", "--images", "/nowhere"], "'/nowhere' is not a folder"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["views", "simclr_in1k", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("sslzoo views: ")
