"""Atomic file writes: a file is either complete or absent. Importable without torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomically(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """Yield a temporary path, ``path`` with ``suffix``: write to it, and it is renamed to ``path`` on success.

    On any error ``path`` is unchanged and the temporary file is deleted.
    """
    part = path.with_name(path.name + suffix)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the folder itself may be gone
            part.unlink(missing_ok=True)
        raise


def own_part() -> str:
    """A suffix for temporary files that several processes or machines may write at the same time."""
    return f".{socket.gethostname()}.{os.getpid()}.part"


def write_text(path: Path, text: str, suffix: str = ".part") -> None:
    """Write ``text`` to ``path`` as :func:`atomically` does, and flush it to disk."""
    with atomically(path, suffix) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
