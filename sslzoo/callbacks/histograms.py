"""The histograms that methods log, one per line of ``histograms.jsonl``. Importable without torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from sslzoo.files import write_text

log = logging.getLogger(__name__)

FILE = "histograms.jsonl"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values between ``edges``, which are one more than the counts."""

    name: str
    step: int
    counts: Sequence[int]
    edges: Sequence[float]

    def __post_init__(self) -> None:
        numbers = [*self.counts, *self.edges]
        if (
            not isinstance(self.name, str)
            or not isinstance(self.step, int)
            or not all(isinstance(number, int | float) for number in numbers)
            or not 0 < len(self.counts) == len(self.edges) - 1
        ):
            raise ValueError("no histogram")


class Histograms:
    """The histograms of the run in ``folder``, read while it writes them, each once.

    A damaged line is left out, with a warning. The last line is ignored as long as it is unfinished.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lines = self._end = 0  # that were read: their number, and where they end in bytes

    def read(self) -> list[Histogram]:
        """Those that were not read before, in order."""
        if not self._path.exists():
            return []
        found: list[Histogram] = []
        with self._path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                self._lines += 1
                try:
                    found.append(Histogram(**json.loads(line)))
                except (ValueError, TypeError):
                    _warn(self._path, self._lines)
        return found


@cache  # W&B and TensorBoard read the same file
def _warn(path: Path, line: int) -> None:
    log.warning("line %d of %s is damaged and left out", line, path)


def append(folder: Path, histogram: Histogram) -> None:
    """Add ``histogram`` to those of the run in ``folder``."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(histogram)) + "\n")


def delete_after(folder: Path, step: int) -> None:
    """Delete the histograms of steps later than ``step``, which a run that continues there logs again, and what is
    damaged."""
    path = folder / FILE
    if path.exists():
        kept = [histogram for histogram in Histograms(folder).read() if histogram.step <= step]
        write_text(path, "".join(json.dumps(asdict(histogram)) + "\n" for histogram in kept))
