"""Read image files, with retries on unreliable disks."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds between attempts to read a file
# Permanent errors. Any other error may come from a server or mount that recovers.
_FINAL = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class UnreadableImageError(OSError):
    """An image is missing, damaged, too large or in an unknown format; the message says which."""


class DataError(RuntimeError):
    """The images, or too many of them, cannot be loaded; the message says why and what to do."""


def legible(path: object) -> str:
    """``path`` as printable text on one line; bytes that are not UTF-8 are ``\\xff``, line breaks ``\\n``."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def read_file(path: Path, root: Path, offset: int = 0, length: int | None = None) -> bytearray:
    """Read the file ``path`` of a data set in ``root``, or ``length`` bytes of it from ``offset`` on, retrying after
    temporary errors.

    Raises:
        UnreadableImageError: the file is missing, is not a regular file, cannot be read, or ends too early.
        DataError: the folder of the images is gone.
    """

    def read() -> bytearray:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket cannot be opened
                raise UnreadableImageError("not a regular file") from error
            raise
        try:
            status = os.fstat(file)
            if not S_ISREG(status.st_mode):
                raise UnreadableImageError("not a regular file")
            return _part(file, offset, status.st_size if length is None else length)
        finally:
            os.close(file)

    return _patiently(read, root)


def read_part(file: int, root: Path, offset: int, length: int) -> bytearray:
    """Read ``length`` bytes from ``offset`` on of an open ``file`` in ``root``, as :func:`read_file` does.

    Processes may share the file.
    """
    return _patiently(lambda: _part(file, offset, length), root)


def _part(file: int, offset: int, length: int) -> bytearray:
    data, done = bytearray(length), 0
    while done < length:
        count = os.preadv(file, [memoryview(data)[done:]], offset + done)
        if not count:
            raise UnreadableImageError(f"the file has ended after {done} of its {length} bytes")
        done += count
    return data


def _patiently(read: Callable[[], bytearray], root: Path) -> bytearray:
    """What ``read`` returns, after temporary errors in another attempt."""
    for pause in (*PAUSES, None):
        try:
            return read()
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
