"""List and read image files, with retries on unreliable disks."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds between attempts to read a file
# Permanent errors. Any other error may come from a server or mount that recovers.
_FINAL = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class UnreadableImageError(OSError):
    """An image is missing, damaged, too large or in an unknown format; the message says which."""


class DataError(RuntimeError):
    """The images, or too many of them, cannot be loaded; the message says why and what to do."""


def image_files(folder: Path, root: Path) -> list[str]:
    """Image files under ``folder``, at any depth, as sorted paths relative to ``root``.

    Links to folders are followed unless they lead to a parent folder. Includes regular files, and links whose target
    is missing (reported as unreadable later), but not pipes, nor files that macOS adds to archives (``__MACOSX``,
    ``._*``). Bytes of names that are not UTF-8 are represented by surrogates.
    """
    within = folder.relative_to(root).as_posix()
    return sorted(_walk(folder, "" if within == "." else f"{within}/", ()))


def _walk(folder: Path, within: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                if entry.name != "__MACOSX":
                    yield from _walk(path, f"{within}{entry.name}/", (*above, here))
            elif _is_named_as_image(path) and (entry.is_file() or not path.exists()):
                yield within + entry.name


def _is_named_as_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith("._")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the subfolders of ``folder``."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "__MACOSX"))


def legible(path: object) -> str:
    """``path`` as printable text; bytes that are not UTF-8 are shown as ``\\xff``."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_file(path: Path, root: Path) -> bytes:
    """Read the file ``path`` of a data set in ``root``, retrying after temporary errors.

    Raises:
        UnreadableImageError: the file is missing, is not a regular file, or cannot be read.
        DataError: the folder of the images is gone.
    """
    for pause in (*PAUSES, None):
        try:
            if not S_ISREG(path.stat().st_mode):
                raise UnreadableImageError("not a regular file")
            return path.read_bytes()
        except UnreadableImageError:
            raise
        except OSError as error:
            gone = error.errno == errno.ENOENT and not _has_entries(root)
            if pause is None and gone:
                raise DataError(
                    f"the images are gone: {legible(root)} has been missing or empty for {sum(PAUSES):.0f} s; "
                    "restore it"
                ) from error
            if pause is None or error.errno in _FINAL or (error.errno == errno.ENOENT and not gone):
                raise UnreadableImageError(error.strerror) from error
            time.sleep(pause)
    raise AssertionError


def _has_entries(folder: Path) -> bool:
    """Whether ``folder`` exists and is not empty; a lost mount leaves an empty folder or none."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False
