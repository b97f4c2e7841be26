"""Keep what was found in the files of a data set, once per node, as long as the files do not change."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslzoo.files import atomically

FORMAT = 4  # of the kept files; raise it when something else is found, or kept in another way
WORTH_KEEPING = 10_000  # length of the longest array from which on it is kept
# A file or folder that changed this shortly before it was read (s) may have changed again without a new time. What was
# found then only serves the other processes of the same start.
UNCERTAIN = 60


class Found(NamedTuple):
    """What was found, and the state of every file and folder that was read for it."""

    arrays: Mapping[str, NDArray[Any]]
    paths: NDArray[np.bytes_]  # (D,) of these files and folders, relative to the root
    state: NDArray[np.int64]  # (D, 3): of each as state_of gives it
    began: float  # when reading began (s)


def state_of(status: os.stat_result) -> tuple[int, int, int]:
    """What changes with a file or folder: inode, size (bytes) and time of the last change (ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def as_bytes(paths: Sequence[str]) -> NDArray[np.bytes_]:
    """Names of files, which may be of any encoding, as one array."""
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def once_per_node(
    root: Path, kind: str, subject: Sequence[str], find: Callable[[], Found]
) -> Mapping[str, NDArray[Any]]:
    """The arrays that ``find`` finds in files under ``root``, or found earlier.

    Those of 10,000 items or more are kept beside ``root``, or if that cannot be written, in the user's cache folder.
    Their file is named after ``kind`` and a hash of ``subject``: what was looked for, and where. They are used while
    all files and folders are as they were. Processes of a node wait for the one that finds them first.
    """
    places = _places(root, kind, subject)
    with _alone(root):
        for place in places:
            known = _read(place)
            if known is not None and _unchanged(root, known):
                return known.arrays
        found = find()
        if max(map(len, found.arrays.values())) >= WORTH_KEEPING:
            for place in places:
                with suppress(OSError):
                    _write(place, found)
                    break
        return found.arrays


def _places(root: Path, kind: str, subject: Sequence[str]) -> list[Path]:
    """The files in which something may be kept, best first."""
    root = root.resolve()
    name = f"{_short_hash(chr(0).join((str(FORMAT), *subject)))}.{kind}.npz"
    places = [root.with_name(f".{root.name}.{name}")] if root.name else []
    with suppress(RuntimeError):  # no home
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        places.append(Path(cache) / "sslzoo" / f"{_short_hash(str(root))}.{name}")
    return places


def _short_hash(text: str) -> str:
    return sha256(os.fsencode(text)).hexdigest()[:12]


def _read(place: Path) -> Found | None:
    """What :func:`_write` wrote; None if there is nothing or something else."""
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            own = {name: kept[f"own_{name}"] for name in ("paths", "state", "began")}
            arrays = {name: kept[name] for name in kept.files if not name.startswith("own_")}
            return Found(arrays, own["paths"], own["state"], float(own["began"]))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(place: Path, found: Found) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    own = {"paths": found.paths, "state": found.state, "began": np.float64(found.began)}
    with atomically(place, shared=True) as part, part.open("wb") as file:
        np.savez(file, **found.arrays, **{f"own_{name}": array for name, array in own.items()})


def _unchanged(root: Path, known: Found) -> bool:
    """Whether all that was read is as it was, and whether the times prove it."""
    changed = known.state[:, 2].max(initial=0) / 1e9
    if changed > known.began - UNCERTAIN and time.time() > known.began + UNCERTAIN:
        return False
    try:
        return all(
            state_of((root / os.fsdecode(path)).stat()) == tuple(state)
            for path, state in zip(known.paths.tolist(), known.state.tolist(), strict=True)
        )
    except OSError:
        return False


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Wait until no other process of this user and node is in this context with the same ``root``."""
    with ExitStack() as stack:
        with suppress(OSError):  # without a folder for temporary files, each process finds for itself
            folder = Path(tempfile.gettempdir()) / f"sslzoo-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = stack.enter_context((folder / _short_hash(str(root.resolve()))).open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
