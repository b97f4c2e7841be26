"""A CSV file of metrics that can be truncated to the rows of a checkpoint."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sslzoo.files import write_text

log = logging.getLogger(__name__)

AXES = ("step", "epoch")  # the columns that say where a row belongs


class MetricsFile:
    """A CSV file with columns ``step, epoch`` and one per metric, in order of first appearance.

    For a new metric, the file is rewritten atomically with a wider header. Cells without a value are empty.
    Row count and columns identify an earlier state of the file, which :meth:`rewind` restores.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = [*AXES]
        self.rows = 0
        self.writes = True  # False on ranks other than 0, which only count rows
        self._file: Any = None

    def rewind(self, rows: int, columns: Sequence[str]) -> None:
        """Truncate the file to its first ``rows`` rows and to ``columns``, and open it for appending. If it has fewer
        rows, as in the directory of a new run that continues another one, only those that it has count."""
        self.columns, self.rows = list(columns), rows
        if self.writes:
            old = self._read()[1 : rows + 1]
            self.rows = len(old)
            if self.rows < rows:
                log.warning("%s lacks %d rows from before the checkpoint", self.path, rows - self.rows)
            self._replace([row[: len(columns)] for row in old])

    def resume(self) -> None:
        """Open the file for appending without truncating it."""
        header, *rows = self._read() or [self.columns]
        self.rewind(len(rows), header)

    def append(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one row and flush, so that other processes can read it at once."""
        new = [key for key in values if key not in self.columns]
        self.columns += new
        self.rows += 1
        if not self.writes:
            return
        if new:
            self._replace(self._read()[1:])
        # repr gives the shortest exact form of a float, so equal text means equal bits.
        row = {"step": step, "epoch": epoch} | {key: repr(value) for key, value in values.items()}
        self._file.write(_line([row.get(key, "") for key in self.columns]))
        self._file.flush()

    def sync(self) -> None:
        """Flush everything written to disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.reader(file))

    def _replace(self, rows: list[list[str]]) -> None:
        self.close()
        width = len(self.columns)
        text = "".join(_line([*row, *[""] * (width - len(row))]) for row in [self.columns, *rows])
        write_text(self.path, text)
        self._file = self.path.open("a", newline="")


@dataclass
class Position:
    """How far a file of metrics has been read."""

    rows: int = 0
    header: bytes = b""
    end: int = 0  # of the last row, in bytes


def read_rows(path: Path, position: Position | None = None) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Step, epoch and values by column of every row of the file ``path``, without empty cells; only those after
    ``position``, which moves along.

    Damaged rows, and the last one of a run that is writing it, are passed over; there are none without a file.
    """
    at = Position() if position is None else position
    with suppress(FileNotFoundError, csv.Error), path.open("rb") as file:
        header = file.readline()
        names = next(csv.reader([header.decode(errors="replace")]), [])
        columns = [(i, name) for i, name in enumerate(names) if name not in AXES]
        if not header.endswith(b"\n") or not set(AXES) <= set(names):
            return
        step, epoch = map(names.index, AXES)
        number = at.rows
        if header == at.header:
            file.seek(at.end)
        else:  # not read before, or written anew with a further column
            number, at.header, at.end = 0, header, len(header)
        for row in csv.reader(_lines(file, at)):
            if len(row) == len(names):
                try:
                    found = int(row[step]), int(row[epoch]), {n: float(row[i]) for i, n in columns if row[i]}
                except ValueError:  # such as NULs, where the machine crashed
                    continue
                number += 1
                if number > at.rows:
                    at.rows = number
                    yield found


def _lines(file: BinaryIO, at: Position) -> Iterator[str]:
    """The complete lines from here on."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        at.end += len(line)
        yield line.decode(errors="replace")


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
