"""List image files, once per node: the result is kept in a file and read again as long as no folder has changed."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslzoo.files import atomically

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
FORMAT = 1  # of kept listings; raise it when other files are listed
WORTH_KEEPING = 10_000  # number of files from which a listing is kept
# A folder that changed this shortly before it was listed (s) may have changed again without a new time. Such a listing
# only serves the other processes of the same start.
UNCERTAIN = 60


class Listing(NamedTuple):
    """The image files under several folders."""

    paths: NDArray[np.bytes_]  # (N,), relative to the root and sorted within each folder
    counts: NDArray[np.int64]  # number of files under each folder


class _Walked(NamedTuple):
    """A listing and the state of every folder that was read for it."""

    listing: Listing
    folders: NDArray[np.bytes_]  # (D,), relative to the root
    state: NDArray[np.int64]  # (D, 2): inode and time of the last change (ns)
    began: float  # time of the listing (s)


def image_files(root: Path, folders: Sequence[str] = ("",)) -> Listing:
    """Image files under each of ``folders`` (relative to ``root``), at any depth.

    Links to folders are followed unless they lead to a parent folder. Includes regular files, and links whose target
    is missing (reported as unreadable later), but not pipes, nor files that macOS adds to archives (``__MACOSX``,
    ``._*``). Names are bytes of any encoding.

    A listing of many files is kept beside ``root``, or if that cannot be written, in the user's cache folder. It is
    used while all folders have their inodes and times of change. Processes of a node wait for the one that lists first.
    """
    places = _places(root, folders)
    with _alone(root):
        for place in places:
            known = _read(place)
            if known is not None and _unchanged(root, known):
                return known.listing
        walked = _walk_all(root, folders)
        if len(walked.listing.paths) >= WORTH_KEEPING:
            for place in places:
                with suppress(OSError):
                    _write(place, walked)
                    break
        return walked.listing


def class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the subfolders of ``folder``."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and entry.name != "__MACOSX"))


# -- listing ---------------------------------------------------------------------------------------------


def _walk_all(root: Path, folders: Sequence[str]) -> _Walked:
    began = time.time()
    read: dict[str, tuple[int, int]] = {}
    paths: list[str] = []
    counts = []
    for folder in folders:
        found = sorted(_walk(root / folder, f"{folder}/" if folder else "", (), read))
        paths += found
        counts.append(len(found))
    return _Walked(
        Listing(_encoded(paths), np.array(counts, dtype=np.int64)),
        _encoded(read),
        np.array(list(read.values()), dtype=np.int64),
        began,
    )


def _walk(
    folder: Path, within: str, above: tuple[tuple[int, int], ...], read: dict[str, tuple[int, int]]
) -> Iterator[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    read[within] = (status.st_ino, status.st_mtime_ns)
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


def _encoded(paths: Sequence[str] | dict[str, tuple[int, int]]) -> NDArray[np.bytes_]:
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


# -- kept listings ---------------------------------------------------------------------------------------


def _places(root: Path, folders: Sequence[str]) -> list[Path]:
    """The files in which a listing may be kept, best first."""
    root = root.resolve()
    what = _short_hash("\0".join((str(FORMAT), *folders)))
    places = [root.with_name(f".{root.name}.{what}.listing.npz")] if root.name else []
    with suppress(RuntimeError):  # no home
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        places.append(Path(cache) / "sslzoo" / f"{_short_hash(str(root))}.{what}.listing.npz")
    return places


def _short_hash(text: str) -> str:
    return sha256(os.fsencode(text)).hexdigest()[:12]


def _read(place: Path) -> _Walked | None:
    """What :func:`_write` wrote; None if there is nothing or something else."""
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            listing = Listing(kept["paths"], kept["counts"])
            return _Walked(listing, kept["folders"], kept["state"], float(kept["began"]))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(place: Path, walked: _Walked) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomically(place) as part, part.open("wb") as file:
        np.savez(
            file,
            paths=walked.listing.paths,
            counts=walked.listing.counts,
            folders=walked.folders,
            state=walked.state,
            began=np.float64(walked.began),
        )


def _unchanged(root: Path, known: _Walked) -> bool:
    """Whether all folders of a listing are as they were, and whether their times prove it."""
    changed = known.state[:, 1].max(initial=0) / 1e9
    if changed > known.began - UNCERTAIN and time.time() > known.began + UNCERTAIN:
        return False
    try:
        for folder, inode, modified in zip(known.folders.tolist(), *known.state.T.tolist(), strict=True):
            status = (root / os.fsdecode(folder)).stat()
            if (status.st_ino, status.st_mtime_ns) != (inode, modified):
                return False
    except OSError:
        return False
    return True


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Wait until no other process of this user and node is in this context with the same ``root``."""
    with ExitStack() as stack:
        with suppress(OSError):  # without a folder for temporary files, each process lists
            folder = Path(tempfile.gettempdir()) / f"sslzoo-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = stack.enter_context((folder / _short_hash(str(root.resolve()))).open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
