"""Which files are images, and what is done where the disk does not give them."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sslzoo.data import disk
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import DataError, UnreadableImageError, read_file
from sslzoo.recipe.sections import SourceConfig

STRANGE = os.fsdecode(b"caf\xe9.png")  # latin-1


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30)).save(path, "PNG")


@pytest.mark.parametrize("dataset", ["folder", "imagefolder"])
def test_names_that_are_no_utf8(dataset: str, tmp_path: Path) -> None:
    picture(tmp_path / "train" / os.fsdecode(b"\xff") / STRANGE)
    source = open_source(SourceConfig(dataset=dataset, root=str(tmp_path)))
    assert source.read(0).shape == (3, 30, 20)
    assert source.where(0).endswith(r"train/\xff/caf\xe9.png") and source.where(0).encode()
    assert len(source.fingerprint) > 0


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        read_file(tmp_path / "a.png", tmp_path)


def test_a_socket_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", (0.01,))
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.png")
        with pytest.raises(UnreadableImageError, match="not a regular file"):
            read_file(tmp_path / "a.png", tmp_path)


def failing(number: int, times: int) -> tuple[Callable[..., int], list[float]]:
    """``os.preadv`` that fails so many times, and when it was asked."""
    read, asked = os.preadv, []

    def fail(*args: Any) -> int:
        asked.append(time.monotonic())
        if len(asked) <= times:
            raise OSError(number, os.strerror(number))
        return read(*args)

    return fail, asked


def test_a_disk_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    monkeypatch.setattr(disk, "PAUSES", (0.01, 0.02))
    for times in (1, 2):
        with monkeypatch.context() as patch:
            fail, asked = failing(errno.EIO, times)
            patch.setattr(os, "preadv", fail)
            assert read_file(tmp_path / "a.png", tmp_path) == b"content" and len(asked) == times + 1
    fail, asked = failing(errno.EIO, 3)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UnreadableImageError, match="Input/output error"):
        read_file(tmp_path / "a.png", tmp_path)
    assert len(asked) == 3


def test_what_will_not_come_back_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")

    def wait(seconds: float) -> None:
        raise AssertionError

    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_file(tmp_path / "b.png", tmp_path)
    fail, _ = failing(errno.EACCES, 9)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UnreadableImageError, match="Permission denied"):
        read_file(tmp_path / "a.png", tmp_path)


def test_a_root_that_is_gone_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    picture(root / "a.png")
    source = open_source(SourceConfig(dataset="folder", root=str(root)))
    root.rename(tmp_path / "away")
    back: Any = threading.Timer(0.3, lambda: (tmp_path / "away").rename(root))
    back.start()
    assert source.read(0).shape == (3, 30, 20)
    back.join()
    monkeypatch.setattr(disk, "PAUSES", (0.01, 0.02))
    root.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"the images are gone: .*/root has been missing or empty"):
        source.read(0)
    root.mkdir()  # what a lost mount leaves
    with pytest.raises(DataError, match="the images are gone"):
        source.read(0)
