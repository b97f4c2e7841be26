"""List image files, once per node: the result is kept in a file and read again as long as no folder has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslzoo.data.kept import Found, as_bytes, once_per_node, state_of

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class Listing(NamedTuple):
    """The image files under several folders."""

    paths: NDArray[np.bytes_]  # (N,), relative to the root and sorted within each folder
    counts: NDArray[np.int64]  # number of files under each folder


def image_files(root: Path, folders: Sequence[str] = ("",)) -> Listing:
    """Image files under each of ``folders`` (relative to ``root``), at any depth.

    Links to folders are followed unless they lead to a parent folder. Includes regular files, and links whose target
    is missing (reported as unreadable later), but not pipes, nor files that macOS adds to archives (``__MACOSX``,
    ``._*``). Names are bytes of any encoding.

    The listing is made once per node and kept while all folders are unchanged (:func:`sslzoo.data.kept.once_per_node`).
    """
    arrays = once_per_node(root, "listing", folders, lambda: _walk_all(root, folders))
    return Listing(arrays["paths"], arrays["counts"])


def class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the subfolders of ``folder``."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and entry.name != "__MACOSX"))


def has_images(folder: Path) -> bool:
    """Whether there is an image file under ``folder``."""
    return next(_walk(folder, "", (), {}), None) is not None


def _walk_all(root: Path, folders: Sequence[str]) -> Found:
    began = time.time()
    read: dict[str, tuple[int, int, int]] = {}
    paths: list[str] = []
    counts = []
    for folder in folders:
        found = sorted(_walk(root / folder, f"{folder}/" if folder else "", (), read))
        paths += found
        counts.append(len(found))
    arrays = {"paths": as_bytes(paths), "counts": np.array(counts, dtype=np.int64)}
    state = np.array(list(read.values()), dtype=np.int64).reshape(-1, 3)
    return Found(arrays, as_bytes(list(read)), state, began)


def _walk(
    folder: Path, within: str, above: tuple[tuple[int, int], ...], read: dict[str, tuple[int, int, int]]
) -> Iterator[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    read[within] = state_of(status)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__MACOSX":
                    yield from _walk(Path(entry.path), f"{within}{entry.name}/", (*above, here), read)
            elif _is_named_as_image(entry.name) and (entry.is_file() or not Path(entry.path).exists()):
                yield within + entry.name


def _is_named_as_image(name: str) -> bool:
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in EXTENSIONS and not name.startswith("._")
