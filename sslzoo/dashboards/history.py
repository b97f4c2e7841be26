"""The history of a run as dashboards show it, read from the files of its directory. Importable without torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sslzoo import pictures
from sslzoo.callbacks import metrics_file
from sslzoo.callbacks.histograms import Histogram, Histograms
from sslzoo.panels import OF_EPOCHS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of ``metrics.csv``, and what else belongs to its optimiser step."""

    step: int
    epoch: int
    values: dict[str, float]
    histograms: list[Histogram] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)  # by key


class History:
    """The rows of a run, read from its files while it writes them, each once.

    Values have the names of their columns; empty cells and means over epochs are left out. The first row of a step
    also has that step's throughput, the last that ``system.csv`` has for it. Histograms and pictures belong to the
    first row at their step or later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._system = metrics_file.Position(), metrics_file.Position()
        self._histograms = Histograms(folder)
        # What was read, and belongs to later rows.
        self._throughput: dict[int, dict[str, float]] = {}
        self._waiting: list[Histogram] = []
        self._step = -1  # of the last row

    def read(self, count: int | None = None) -> list[Row]:
        """The rows of ``metrics.csv`` that were not read before, in order, up to its first ``count`` rows; by default
        all."""
        system = metrics_file.read_rows(self.folder / "system.csv", self._system)
        self._throughput |= {step: values for step, _, values in system}
        left = None if count is None else max(0, count - self._metrics.rows)
        measured = metrics_file.read_rows(self.folder / "metrics.csv", self._metrics)
        rows: list[Row] = []
        before = self._step
        for step, epoch, values in islice(measured, left):
            throughput = {} if step == self._step else self._throughput.get(step, {})
            rows.append(Row(step=step, epoch=epoch, values=_shown(values) | throughput))
            self._step = step
        if rows:
            self._add_media(rows, before)
        return rows

    def _add_media(self, rows: Sequence[Row], before: int) -> None:
        """Add to ``rows``, which come after step ``before``, what belongs to them."""
        self._throughput = {step: values for step, values in self._throughput.items() if step > self._step}
        waiting, self._waiting = [*self._waiting, *self._histograms.read()], []
        for histogram in waiting:
            if histogram.step > self._step:
                self._waiting.append(histogram)
            else:
                _first_at(rows, histogram.step).histograms.append(histogram)
        for step, name, path in read_pictures(self.folder, after=before):
            if step <= self._step:
                _first_at(rows, step).pictures[f"{pictures.FOLDER}/{name}"] = path


def read_rows(folder: Path, count: int | None = None) -> list[Row]:
    """The first ``count`` rows of ``folder/metrics.csv``, by default all, as in :class:`History`."""
    return History(folder).read(count)


def read_pictures(folder: Path, *, after: int = -1) -> list[tuple[int, str, Path]]:
    """Step, name and file of the pictures of a run later than step ``after``, in the order of steps. ``views.png`` is
    of step 0."""
    views = folder / "views.png"
    return [(0, "views", views)] * (after < 0 and views.exists()) + pictures.numbered(folder, after=after)


def current_pictures(folder: Path) -> dict[str, Path]:
    """By key, the pictures in ``pictures/`` that are not of a certain step."""
    of_steps = {path for *_, path in pictures.numbered(folder)}
    paths = sorted((folder / pictures.FOLDER).glob("*.png"))
    return {f"{pictures.FOLDER}/{path.stem}": path for path in paths if path not in of_steps}


def last_values(rows: Sequence[Row]) -> dict[str, float]:
    """The last value of every column."""
    latest: dict[str, float] = {}
    for row in rows:
        latest |= row.values
    return latest


def _first_at(rows: Sequence[Row], step: int) -> Row:
    return rows[bisect_left(rows, step, key=lambda row: row.step)]


def _shown(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.endswith(OF_EPOCHS)}
