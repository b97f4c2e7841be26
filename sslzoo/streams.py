"""Standard output and error that survive a closed terminal or pipe. Importable without torch."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


class _Outliving:
    """A text stream that drops output once its reader is gone (closed terminal or pipe) instead of raising."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, or drop it if the reader is gone."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the reader is gone."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Make stdout and stderr of this process drop output once their reader is gone.

    This is permanent: otherwise flushing a buffer at process exit would raise.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Outliving):
            setattr(sys, name, _Outliving(stream))
