"""Standard streams that outlive their reader. Importable without torch."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


class _Outliving:
    """A text stream whose reader may go away: a closed terminal, the other end of a pipe. What is written then is
    lost, and the run that wrote it goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` if anybody is there."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if anybody is there."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let stdout and stderr of this process go nowhere once nobody reads them. For good: what is still in a buffer
    would otherwise fail when the process ends."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Outliving):
            setattr(sys, name, _Outliving(stream))
