"""The history of a run as dashboards show it, read from the files of its directory. Importable without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sslzoo import pictures
from sslzoo.callbacks import metrics_file

# Ending of means over an epoch, which stay in metrics.csv because they repeat other columns.
OF_EPOCHS = "_epoch"
HISTOGRAMS = "histograms.jsonl"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values between ``edges``, which are one more than the counts."""

    name: str
    step: int
    counts: Sequence[int]
    edges: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of ``metrics.csv``, and what else belongs to its optimiser step."""

    step: int
    epoch: int
    values: dict[str, float]
    histograms: list[Histogram] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)  # by key


def read_rows(folder: Path, count: int | None = None) -> list[Row]:
    """The first ``count`` rows of ``folder/metrics.csv``, by default all, in order.

    Values have the names of their columns; empty cells and means over epochs are left out. The first row of a step
    also has that step's throughput, the last that ``system.csv`` has for it. Histograms and pictures belong to the
    first row at their step or later.
    """
    system = {step: values for step, _, values in metrics_file.read_rows(folder / "system.csv")}
    rows: list[Row] = []
    for step, epoch, values in islice(metrics_file.read_rows(folder / "metrics.csv"), count):
        measured = {} if rows and rows[-1].step == step else system.get(step, {})
        rows.append(Row(step=step, epoch=epoch, values=_shown(values) | measured))
    for histogram in read_histograms(folder):
        if (row := _first_at(rows, histogram.step)) is not None:
            row.histograms.append(histogram)
    for step, name, path in read_pictures(folder):
        if (row := _first_at(rows, step)) is not None:
            row.pictures[f"{pictures.FOLDER}/{name}"] = path
    return rows


def read_pictures(folder: Path) -> list[tuple[int, str, Path]]:
    """Step, name and file of the pictures of a run, in the order of steps. ``views.png`` is of step 0."""
    views = folder / "views.png"
    return [(0, "views", views)] * views.exists() + pictures.numbered(folder)


def current_pictures(folder: Path) -> dict[str, Path]:
    """By key, the pictures in ``pictures/`` that are not of a certain step."""
    of_steps = {path for *_, path in pictures.numbered(folder)}
    paths = sorted((folder / pictures.FOLDER).glob("*.png"))
    return {f"{pictures.FOLDER}/{path.stem}": path for path in paths if path not in of_steps}


def read_histograms(folder: Path) -> list[Histogram]:
    """The histograms that methods have logged, in order; a line that a killed run left unfinished is ignored."""
    path = folder / HISTOGRAMS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Histogram(**json.loads(line)) for line in lines if line.endswith("\n")]


def last_values(rows: Sequence[Row]) -> dict[str, float]:
    """The last value of every column."""
    latest: dict[str, float] = {}
    for row in rows:
        latest |= row.values
    return latest


def _first_at(rows: Sequence[Row], step: int) -> Row | None:
    return next((row for row in rows if row.step >= step), None)


def _shown(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.endswith(OF_EPOCHS)}
