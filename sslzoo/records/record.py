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
from typing import Any, Literal, get_args

from sslzoo.callbacks.metrics_file import read_rows
from sslzoo.evaluate.figures import (
    FEATURES,
    LAYER,
    OWN,
    data_of,
    figure_key,
    is_accuracy,
    is_empty_top5,
    layer_of,
)
from sslzoo.exits import ExitCode
from sslzoo.records.lock import is_alive
from sslzoo.verdict import State as Health
from sslzoo.verdict import judge_file

State = Literal["running", "done", "pre-empted", "interrupted", "diverged", "collapsed", "failed", "killed"]
STATE_NAMES: tuple[State, ...] = get_args(State)
STATES: dict[int, State] = {
    ExitCode.DONE: "done",
    ExitCode.PREEMPTED: "pre-empted",
    ExitCode.NAN: "diverged",
    ExitCode.COLLAPSED: "collapsed",
    ExitCode.INTERRUPT: "interrupted",
}
HEALTH: tuple[Health, ...] = get_args(Health)  # from good to bad
COLUMNS = {
    "linear_top1": "linear top-1",
    "linear_top5": "top-5",
    "sgd_top1": "SGD top-1",
    "knn_top1": "k-NN",
    "online_top1": "online",
}
TAIL = 65_536  # bytes at the end of a file that surely hold its last line
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
        """The results of ``sslzoo eval`` and of ``eval.after``, as in their files: first those of checkpoints that were
        named, which have folders of their own."""
        folder = self.path / "eval"
        found = (_json(path) for path in (*sorted(folder.glob("*=*/*.json")), *sorted(folder.glob("*.json"))))
        return [content for content in found if "results" in content and "how" in content]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's values by dotted key."""
        recipe = self.manifest.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

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
        return str(error.get("message") or "") if isinstance(error, dict) else ""

    @cached_property
    def final(self) -> Mapping[str, Any]:
        """The summary; empty if the run has been continued since, or trained on, and not finished again."""
        path = self.path / "eval" / "summary.json"
        if self.summary and self.manifest.get("exit_code") != ExitCode.DONE:
            with suppress(OSError):
                if path.stat().st_mtime_ns < (self.path / "metrics.csv").stat().st_mtime_ns:
                    return {}
        return self.summary

    @property
    def final_verdict(self) -> Mapping[str, Any]:
        """What the final summary says about the health of the run: state, reason and since_epoch; empty without one."""
        verdict = self.final.get("verdict")
        return verdict if isinstance(verdict, dict) else {}

    @cached_property
    def verdict(self) -> Mapping[str, Any]:
        """The final verdict, or before it that of ``metrics.csv``; empty before the first evaluation."""
        if self.final_verdict:
            return self.final_verdict
        with suppress(OSError, ValueError, KeyError, TypeError, csv.Error):
            verdict = judge_file(self.path / "metrics.csv")
            return verdict.as_json() if verdict is not None else {}
        return {}

    @property
    def step(self) -> int:
        """The last step in ``metrics.csv``."""
        return max((steps[-1] for steps, _ in self.metrics.values()), default=0)

    @cached_property
    def last_step(self) -> int:
        """The step of the newest checkpoint, or, without checkpoints, the last in ``metrics.csv``."""
        names = (path.stem.partition("=")[2] for path in (self.path / "checkpoints").glob("step=*.ckpt"))
        return max((int(name) for name in names if name.isdecimal()), default=self.step)

    @property
    def newest(self) -> tuple[int, int]:
        """Step and epoch, from 0, of the last complete row in ``metrics.csv``; zeros without. Reads only its end."""
        with suppress(OSError, ValueError, IndexError), (self.path / "metrics.csv").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            step, epoch, *_ = file.read().rpartition(b"\n")[0].splitlines()[-1].split(b",")
            return int(step), int(epoch)
        return 0, 0

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that the recipe gives the run, for W&B and for lists of runs."""
        return tuple(self.recipe.get("logging.wandb.tags") or ())

    @property
    def notes(self) -> str:
        """The notes in the recipe, likewise."""
        return str(self.recipe.get("logging.wandb.notes") or "")

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

    @cached_property
    def later(self) -> dict[str, tuple[float, float, float]]:
        """Accuracies of the last checkpoint by ``sslzoo eval`` and ``eval.after`` and the ends of their 95 % intervals,
        by key as in the summary."""
        found: dict[str, tuple[float, float, float]] = {}
        for result in self.results:
            if result.get("step") != self.last_step:
                continue
            with suppress(KeyError, TypeError, AttributeError, StopIteration):
                first = next(iter(result["data_sets"]))
                for row in result["results"]:
                    for name in ("top1", "top5"):
                        if name in row:
                            key = figure_key(f"{row['key']}_{name}", row["data"], row["layer"], first=first)
                            found[key] = (row[name], row[f"{name}_low"], row[f"{name}_high"])
        return found

    @property
    def accuracies(self) -> dict[str, float]:
        """All accuracies of the last checkpoint, and of what it is compared with, by key: of the final evaluation and
        of ``sslzoo eval``. Without those in training."""
        later = {key: value for key, (value, _, _) in self.later.items()}
        return later | {key: value for key, value in self.final.items() if is_accuracy(key)}

    def figure(self, key: str) -> float | None:
        """An accuracy of the final evaluation, such as ``linear_top1``, of ``sslzoo eval`` of the last checkpoint, or
        of the last evaluation in training; None without."""
        _, values = self.metrics.get(f"val/{key}", ([], []))
        return next(iter([*self._final(key), *self.later.get(key, ())[:1], *values[-1:]]), None)

    def best(self, *keys: str) -> list[float | None]:
        """The largest value of each accuracy, of the final evaluation and those in training. Fast for many runs."""
        columns = _columns(self.path / "metrics.csv", [f"val/{key}" for key in keys])
        final = [[value] if isinstance(value := self.summary.get(key), float) else [] for key in keys]
        return [
            max(filter(math.isfinite, [*values, *last]), default=None)
            for values, last in zip(columns, final, strict=True)
        ]

    @property
    def at_a_glance(self) -> dict[str, float]:
        """The figures ``sslzoo.panels.AT_A_GLANCE``, as far as they are known."""
        linear, knn = self.best("linear_top1", "knn_top1")
        state = self.verdict.get("state")
        found = {
            "best/linear_top1": linear,
            "best/knn_top1": knn,
            "verdict/severity": HEALTH.index(state) if state in HEALTH else None,
            "median/images_per_s": self.images_per_s,
        }
        return {key: value for key, value in found.items() if value is not None}

    def _final(self, key: str) -> list[float]:
        value = self.final.get(key)
        return [value] if isinstance(value, float) else []

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of an accuracy of the final evaluation or of ``sslzoo eval``."""
        ends = self.final.get("interval_95", {}).get(key)
        if not ends and not self._final(key):
            ends = self.later.get(key, ())[1:]
        return (ends[0], ends[1]) if ends else None

    def tested_on(self, key: str) -> dict[str, Any]:
        """What the directory says about the test images of an accuracy: name of the data set, number of images, and so
        on. Two runs tested on the same images agree in all that both have."""
        evaluations = [of for of in (self.final, *self.results) if of.get("data_sets")]
        name = data_of(key, next(iter(evaluations[0]["data_sets"])) if evaluations else OWN)
        facts: dict[str, Any] = {"name": name}
        if name == OWN:
            keys = ("data.dataset", "data.classes", "eval.test_split")
            facts |= {key: self.recipe[key] for key in keys if key in self.recipe}
        for of in evaluations:
            about = of["data_sets"].get(name, {})
            facts |= {fact: about[fact] for fact in ("dataset", "n_test") if fact in about}
            # Fingerprints of the training and test images of the first data set, then those of others.
            images = of.get("identity", {}).get("images", ())
            if len(images) > 1 and name == next(iter(of["data_sets"])):
                facts["test images"] = images[1]
        if "n_test" not in facts and name == OWN:
            facts[f"images of {self.recipe.get('data.split')}"] = self.manifest.get("data_fingerprint")
        return facts


def records(paths: Sequence[Path]) -> list[Record]:
    """The runs in ``paths``: run directories, folders with runs at any depth, or patterns such as ``runs/*/a*``.

    Raises ``ValueError`` if a path does not exist or contains no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        root = Path(path.anchor)
        folders = [path] if path.exists() else sorted(root.glob(str(path.relative_to(root))))
        runs = [run for folder in folders if folder.is_dir() for run in _runs_in(folder.resolve(), set())]
        if not runs:
            raise ValueError(f"{path} is no run directory and contains none; name one such as runs/RECIPE/ID")
        found |= dict.fromkeys(runs)
    return [Record(path) for path in found]


def _runs_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Run directories in ``folder``, a resolved path; they contain no further ones. A subfolder that cannot be read, or
    that is deleted meanwhile, is passed over, and one in ``seen``, to which links lead again, too."""
    if folder in seen:
        return
    seen.add(folder)
    with os.scandir(folder) as entries:
        children = {entry.name: entry for entry in entries}
    if "manifest.json" in children:
        yield folder
        return
    for name in sorted(children):
        with suppress(OSError):
            if children[name].is_dir():
                yield from _runs_in(Path(os.path.realpath(children[name])), seen)


def read_metrics(path: Path) -> Series:
    """Read ``metrics.csv``: optimiser steps and values by metric, without empty cells and damaged
    rows; empty if there is no file."""
    series: Series = {}
    for step, _, row in read_rows(path):
        for name, value in row.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return series


def equal_intervals(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Means over intervals of equal length, from the rows of a metrics file.

    The end of an epoch splits an interval into two rows, whose means are over fewer steps and thus noisier. Such rows
    are merged again, and a short interval at the end is merged with the one before it.
    """
    lengths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    whole = max(lengths, default=1)
    joined: list[tuple[int, int, float]] = []  # last step, length and sum of each interval
    for step, length, value in zip(steps, lengths, values, strict=True):
        row = (step, length, length * value)
        if joined and joined[-1][1] + length <= whole:
            _, before, total = joined.pop()
            row = (step, before + length, total + length * value)
        joined.append(row)
    if len(joined) > 1 and 2 * joined[-1][1] < whole:
        step, length, rest = joined.pop()
        _, before, total = joined.pop()
        joined.append((step, before + length, total + rest))
    return [step for step, _, _ in joined], [total / length for _, length, total in joined]


def _columns(path: Path, names: Sequence[str]) -> list[list[float]]:
    """The values in these columns of a metrics file, whose cells contain no commas, in a tenth of the time of
    :func:`read_metrics`; incomplete and damaged lines are left out."""
    found: list[list[float]] = [[] for _ in names]
    with suppress(OSError):
        head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
        header = head.split(",")
        places = [
            (header.index(name), values) for name, values in zip(names, found, strict=True) if name in header
        ]
        for line in lines if places else ():
            cells = line.split(",")
            if len(cells) != len(header):
                continue
            for place, values in places:
                if cells[place]:
                    try:
                        values.append(float(cells[place]))
                    except ValueError:
                        break
    return found


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
    found = {
        i: [summary[row.keys[i]] for row in rows if row.keys[i] in summary] for i, _ in enumerate(COLUMNS)
    }
    shown = [i for i, key in enumerate(COLUMNS) if found[i] and not is_empty_top5(key, found[i])]
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
