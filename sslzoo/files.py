"""Files that are whole or absent. Importable without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """``with atomically(path) as part: ...`` writes ``part``, which becomes ``path`` if all went well.

    Whatever goes wrong leaves ``path`` as it was and no ``part`` behind.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the folder may be what is wrong
            part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` is never half written, and force it to disk."""
    with atomically(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` is never half written."""
    write_text(path, json.dumps(value, indent=2) + "\n")
