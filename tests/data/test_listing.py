"""Listing image files, and keeping the list."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sslzoo.data import kept, listing
from sslzoo.data.datasets import open_source
from sslzoo.data.listing import image_files
from sslzoo.recipe.sections import SourceConfig


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30)).save(path, "PNG")


def _listed(root: Path, *folders: str) -> list[str]:
    return [os.fsdecode(path) for path in image_files(root, folders or ("",)).paths.tolist()]


def test_only_regular_image_files_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b/2.png", "b/1.JPG", "a.png", "__MACOSX/b/._2.png", "b/._1.JPG", "b/__MACOSX/3.png"):
        picture(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    assert _listed(root) == ["a.png", "b/1.JPG", "b/2.png"]
    assert _listed(root, "b") == ["b/1.JPG", "b/2.png"]


def test_links_are_followed_and_loops_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    picture(root / "a/1.png")
    picture(other / "2.png")
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "a/loop").symlink_to(root)
    (other / "self").symlink_to(".")
    (root / "file.png").symlink_to(other / "2.png")
    (root / "lost.png").symlink_to(other / "3.png")  # will be reported as unreadable
    expected = ["a/1.png", "again/2.png", "file.png", "linked/2.png", "lost.png"]
    assert _listed(root) == expected
    monkeypatch.chdir(root)
    assert _listed(Path()) == expected


def test_a_class_of_archives_is_none(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/__MACOSX/cat/._1.png"):
        picture(tmp_path / name)
    assert open_source(SourceConfig(dataset="imagefolder", root=str(tmp_path))).class_names == ("cat",)


# -- kept listings ---------------------------------------------------------------------------------------

ANCIENT = (1_000_000_000, 1_000_000_000)  # seconds


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders that have not changed for long; listings of any size are kept."""
    monkeypatch.setattr(kept, "WORTH_KEEPING", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("cat/1.png", "cat/more/2.png", f"dog/{os.fsdecode(bytes([255]))}.png"):
        (tmp_path / "data/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/train" / name).touch()
    _age(tmp_path / "data/train")
    return tmp_path / "data/train"


def _age(root: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ANCIENT)


def _walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The roots that are listed from now on."""
    walked: list[Path] = []
    original = listing._walk_all

    def spy(root: Path, folders: Any) -> Any:
        walked.append(root)
        time.sleep(0.05)
        return original(root, folders)

    monkeypatch.setattr(listing, "_walk_all", spy)
    return walked


def _opened(root: Path) -> tuple[Any, ...]:
    source = open_source(SourceConfig(dataset="imagefolder", root=str(root.parent)))
    assert source.labels is not None
    return source.fingerprint, source.labels.tolist(), [source.where(i) for i in range(len(source))]


def test_a_listing_is_read_again_until_a_folder_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = _walks(monkeypatch)
    first = _opened(root)
    assert [Path(where).name for where in first[2]] == ["1.png", "2.png", r"\xff.png"]
    assert _opened(root) == first and len(walked) == 1
    assert [path.suffix for path in root.parent.iterdir() if path.is_file()] == [".npz"]

    (root / "cat/more/3.png").touch()
    assert len(_opened(root)[1]) == 4 and len(walked) == 2
    (root / "cat/more/3.png").unlink()
    _age(root)
    assert _opened(root) == first and len(walked) == 3
    assert _opened(root) == first and len(walked) == 3
    copy = root.parent.parent / "other/train"  # with the times of its origin, but with inodes of its own
    copy.parent.mkdir()
    os.system(f"cp -a '{root.parent}/.' '{copy.parent}'")
    (copy / "cat/1.png").unlink()
    _age(copy)
    assert len(_opened(copy)[1]) == 2 and walked[-1] == copy


def test_a_damaged_listing_is_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _opened(root)
    file = next(path for path in root.parent.iterdir() if path.is_file())
    content = file.read_bytes()
    walked = _walks(monkeypatch)
    for damaged in (
        b"",
        b"no archive",
        content[: len(content) // 2],
        content.replace(b"cat/1.png", b"cat/7.png"),
    ):
        file.write_bytes(damaged)
        assert _opened(root) == first
    assert len(walked) == 4
    assert _opened(root) == first and len(walked) == 4


def test_data_that_cannot_be_written_to_have_their_listing_in_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kept, "_places", lambda *_: [Path("/proc/none.npz"), root.parents[1] / "cache/a/b.npz"]
    )
    walked = _walks(monkeypatch)
    assert _opened(root) == _opened(root) and len(walked) == 1


def test_a_folder_that_has_just_changed_is_listed_again_later(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes within the resolution of the clock does not change the time of its folder."""
    os.utime(root / "dog")
    walked = _walks(monkeypatch)
    assert _opened(root) == _opened(root) and len(walked) == 1  # the processes of one start
    now = time.time()
    monkeypatch.setattr(kept.time, "time", lambda: now + 2 * kept.UNCERTAIN)
    _opened(root)
    assert len(walked) == 2
    _opened(root)
    assert len(walked) == 2


def test_processes_wait_for_the_one_that_lists(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = _walks(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_opened, [root] * 4))
    assert found == [found[0]] * 4 and len(walked) == 1


def test_short_listings_leave_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "WORTH_KEEPING", 4)
    _opened(root)
    assert list(root.parent.iterdir()) == [root] and not (root.parents[1] / "cache").exists()


def test_two_nodes_may_keep_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, save = tmp_path / "a.npz", np.savez
    found = kept.Found({"x": np.arange(3)}, kept.as_bytes([""]), np.zeros((1, 3), np.int64), 0.0)

    def meanwhile(file: Any, **arrays: Any) -> None:
        monkeypatch.setattr(kept.np, "savez", save)
        with monkeypatch.context() as other:
            other.setattr(kept.os, "getpid", lambda: 1)
            kept._write(place, found)
        save(file, **arrays)

    monkeypatch.setattr(kept.np, "savez", meanwhile)
    kept._write(place, found)
    assert list(tmp_path.iterdir()) == [place] and kept._read(place) is not None
