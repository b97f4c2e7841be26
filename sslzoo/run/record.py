"""Read what a run directory says about its run. Importable without torch, and nothing is written."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sslzoo.evaluate.figures import FEATURES, LAYER, data_of, is_accuracy, layer_of
from sslzoo.exits import ExitCode
from sslzoo.run.lock import is_alive

State = Literal["running", "done", "pre-empted", "interrupted", "diverged", "failed", "killed"]
STATES: dict[int, State] = {
    ExitCode.DONE: "done",
    ExitCode.PREEMPTED: "pre-empted",
    ExitCode.NAN: "diverged",
    ExitCode.INTERRUPT: "interrupted",
}
COLUMNS = {
    "linear_top1": "linear top-1",
    "linear_top5": "top-5",
    "sgd_top1": "SGD top-1",
    "knn_top1": "k-NN",
    "online_top1": "online",
}
Series = dict[str, tuple[list[int], list[float]]]  # steps and values by metric


@dataclass(frozen=True)
class Record:
    """A run as its directory shows it now. Files are read when they are needed, once."""

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest; empty if it is missing or damaged."""
        return _json(self.path / "manifest.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``eval/summary.json``, which the final evaluation writes; empty before that."""
        return _json(self.path / "eval" / "summary.json")

    @cached_property
    def metrics(self) -> Series:
        """``metrics.csv`` by metric, without empty cells."""
        return read_metrics(self.path / "metrics.csv")

    @cached_property
    def system(self) -> Series:
        """``system.csv`` by metric."""
        return read_metrics(self.path / "system.csv")

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """The results of ``sslzoo eval`` and of ``eval.after``, as in their files."""
        found = (_json(path) for path in sorted((self.path / "eval").glob("*.json")))
        return [content for content in found if "results" in content and "how" in content]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's values by dotted key."""
        return self.manifest.get("recipe", {})

    @property
    def name(self) -> str:
        """Recipe and id, as in the path ``runs/<recipe>/<id>``."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def state(self) -> State:
        """How the run ended, or that it is running: its lock then belongs to a process that lives, or, on another
        machine, has been renewed within two minutes."""
        code = self.manifest.get("exit_code")
        if code is None:
            return "running" if is_alive(self.path) else "killed"
        return STATES.get(code, "failed")

    @property
    def reason(self) -> str:
        """Why the run ended before its time, in a sentence; empty if it did not."""
        if self.state == "killed":
            return "it ended without a word: killed, or its machine is gone"
        error = self.manifest.get("error")
        return error.get("message", "") if isinstance(error, dict) else ""

    @property
    def verdict(self) -> Mapping[str, Any]:
        """What the summary says about the health of the run: state, reason and since_epoch; empty without one."""
        verdict = self.summary.get("verdict")
        return verdict if isinstance(verdict, dict) else {}

    @property
    def step(self) -> int:
        """The last step in ``metrics.csv``."""
        return max((steps[-1] for steps, _ in self.metrics.values()), default=0)

    @property
    def seconds(self) -> float:
        """Training time over all starts of the run."""
        return sum(start.get("training_seconds") or 0.0 for start in self.manifest.get("sessions", []))

    @property
    def images_per_s(self) -> float | None:
        """The median over the intervals of ``system.csv``; None before the first."""
        _, values = self.system.get("sys/images_per_s", ([], []))
        return sorted(values)[len(values) // 2] if values else None

    @property
    def started(self) -> datetime | None:
        """When the run was first started."""
        with suppress(ValueError, KeyError, TypeError):
            return datetime.fromisoformat(self.manifest["started"])
        return None

    def figure(self, key: str) -> float | None:
        """An accuracy of the final evaluation, such as ``linear_top1``, or of the last in training; None without."""
        if isinstance(self.summary.get(key), float):
            return self.summary[key]
        _, values = self.metrics.get(f"val/{key}", ([], []))
        return values[-1] if values else None

    def best(self, key: str) -> float | None:
        """The largest value of an accuracy, of the final evaluation and those in training."""
        _, values = self.metrics.get(f"val/{key}", ([], []))
        known = [v for v in (*values, self.figure(key)) if v is not None and math.isfinite(v)]
        return max(known, default=None)

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of an accuracy of the final evaluation."""
        ends = self.summary.get("interval_95", {}).get(key)
        return (ends[0], ends[1]) if ends else None


def records(paths: Sequence[Path]) -> list[Record]:
    """The runs in ``paths``, each a run directory or a folder with runs at any depth, in order of their names.

    Raises ``ValueError`` if a path does not exist or contains no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = list(_runs_in(path)) if path.is_dir() else []
        if not runs:
            raise ValueError(f"{path} is no run directory and contains none; name one such as runs/RECIPE/ID")
        found |= dict.fromkeys(runs)
    return [Record(path) for path in found]


def _runs_in(folder: Path) -> Iterator[Path]:
    """Run directories contain no further ones."""
    with os.scandir(folder) as entries:
        children = {entry.name: entry for entry in entries}
    if "manifest.json" in children:
        yield folder.resolve()
        return
    for name in sorted(children):
        if children[name].is_dir():
            yield from _runs_in(folder / name)


def read_metrics(path: Path) -> Series:
    """Read ``metrics.csv``: optimiser steps and values by metric, without empty cells; empty if there is no file."""
    series: Series = {}
    with suppress(FileNotFoundError), path.open(newline="") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        columns = [(i, name) for i, name in enumerate(names) if name not in ("step", "epoch")]
        at = names.index("step") if names else 0
        for row in rows:
            if len(row) != len(names):  # the last line, of a run that is writing it
                continue
            for i, name in columns:
                if row[i]:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row[at]))
                    values.append(float(row[i]))
    return series


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """A kind of features in the table of a data set, with the key of each shown column."""

    title: str
    keys: tuple[str, ...]
    trained: bool  # whether it is the trained encoder


def figure_table(summary: Mapping[str, Any], data: str) -> tuple[list[str], list[FigureRow]]:
    """The columns and rows of the final table of one of the summary's data sets, without empty ones."""
    first = next(iter(summary["data_sets"]))
    keys = [key for key in summary if is_accuracy(key) and data_of(key, first) == data]
    rows = [
        FigureRow(
            title=words + (f", {layer}" if layer != LAYER else ""),
            keys=tuple(
                prefix + figure if (data, layer) == (first, LAYER) else f"{prefix}{figure}/{data}/{layer}"
                for figure in COLUMNS
            ),
            trained=not prefix,
        )
        for prefix, words in FEATURES.items()
        for layer in dict.fromkeys(map(layer_of, keys))
    ]
    shown = [i for i, _ in enumerate(COLUMNS) if any(row.keys[i] in summary for row in rows)]
    titles = [list(COLUMNS.values())[i] for i in shown]
    return titles, [
        FigureRow(title=row.title, keys=tuple(row.keys[i] for i in shown), trained=row.trained)
        for row in rows
        if any(key in summary for key in row.keys)
    ]


def percent(summary: Mapping[str, Any], key: str) -> str:
    """An accuracy of the summary with half of its interval, in per cent; ``-`` if it was not measured."""
    if key not in summary:
        return "-"
    low, high = summary["interval_95"][key]
    return f"{100 * summary[key]:.1f} ±{50 * (high - low):.1f}"


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
