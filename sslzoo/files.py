"""Atomic file writes: a file is either complete or absent. Importable without torch."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomically(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path, ``path`` with ``.part``: write to it, and it is renamed to ``path`` on success.

    On any error ``path`` is unchanged and the temporary file is deleted. If ``path`` is ``shared``, several processes
    or machines may write it at the same time: the temporary path then names the process, and those that processes of
    this machine left behind when they were killed are deleted.
    """
    if shared:
        _delete_left_behind(path)
    part = path.with_name(f"{path.name}{f'.{_here()}.{os.getpid()}' if shared else ''}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the folder itself may be gone
            part.unlink(missing_ok=True)
        raise


def _delete_left_behind(path: Path) -> None:
    """Delete the temporary files beside the shared ``path`` whose processes no longer exist."""
    pattern = re.compile(re.escape(f"{path.name}.{_here()}.") + r"(\d+)\.part")
    with suppress(OSError):
        for other in list(path.parent.iterdir()):
            match = pattern.fullmatch(other.name)
            if match and not _exists(int(match[1])):
                other.unlink(missing_ok=True)


def _here() -> str:
    """Where ids of processes mean those of this machine: its name, and the number of the container's namespace."""
    number = re.sub(r"\D", "", pid_namespace())
    return f"{socket.gethostname()}.{number or 0}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; no id of this machine
        return True
    return True


def pid_namespace() -> str:
    """What distinguishes the ids of processes from those in other containers of this machine; empty if unknown."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write ``text`` to ``path`` as :func:`atomically` does, and flush it to disk."""
    with atomically(path, shared=shared) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
