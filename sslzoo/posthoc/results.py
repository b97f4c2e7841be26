"""Results of an evaluation: their files, and their table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sslzoo.evaluate.figures import LAYER, OWN, data_of, is_empty_top5
from sslzoo.evaluate.metrics import interval
from sslzoo.files import write_json, write_text
from sslzoo.terminal import captioned


@dataclass(frozen=True, kw_only=True)
class Row:
    """The accuracies (fractions) of one classifier on the test set of one data set."""

    key: str  # of its figures in summaries: honest for honest_top1
    title: str = ""  # what tells it from the other rows, such as "k=20, T=0.07"
    data: str = OWN  # the data set, as named by sslzoo.evaluate.figures.figure_name
    layer: str = LAYER
    top1: float
    top5: float | None = None
    n: int  # test images
    chosen: str = ""  # what was chosen on held-out training images, such as the rate
    holdout_top1: float | None = None  # on these
    n_held_out: int = 0  # their number
    converged: str = ""  # which of the fits that were compared converged
    published: str = ""  # top-1 in per cent as the source gives it; empty: no figure
    gap: float | None = None  # percentage points above it; None: it was measured under other conditions

    @property
    def accuracies(self) -> dict[str, float]:
        """By name, those that were measured."""
        known = {"top1": self.top1, "top5": self.top5}
        return {name: value for name, value in known.items() if value is not None}

    def plain(self) -> dict[str, Any]:
        """Plain values, with the 95 % interval of each accuracy."""
        values: dict[str, Any] = {
            "key": self.key,
            "title": self.title,
            "data": self.data,
            "layer": self.layer,
        }
        for name, value in self.accuracies.items():
            values |= _with_interval(name, value, self.n)
        values |= {"n_test": self.n} | ({"chosen": self.chosen} if self.chosen else {})
        if self.holdout_top1 is not None:
            values |= _with_interval("holdout_top1", self.holdout_top1, self.n_held_out)
            values["n_held_out"] = self.n_held_out
        values |= {"converged": self.converged} if self.converged else {}
        values |= {"published": self.published} if self.published else {}
        values |= {} if self.gap is None else {"gap": round(self.gap, 2)}
        return values


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one evaluation found, on all data sets and layers."""

    name: str  # of the evaluation and of its files
    how: str  # how it was measured, in sentences
    rows: Sequence[Row]
    counts: Mapping[str, Mapping[str, int]]  # numbers of images by data set: n_train, n_test, ...
    datasets: Mapping[str, str]  # names of the data sets by how rows name them
    identity: Mapping[str, Any]  # what the result depends on, to recognise it when a run continues
    about: Mapping[str, Any] = field(default_factory=dict)  # encoder, recipe, seconds

    def plain(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        return {
            "name": self.name,
            "how": self.how,
            **self.about,
            "data_sets": {
                name: {"dataset": self.datasets[name], **counts} for name, counts in self.counts.items()
            },
            "results": [row.plain() for row in self.rows],
            "identity": dict(self.identity),
        }

    @staticmethod
    def read(path: Path) -> Results:
        """What :meth:`write` wrote; ``ValueError`` if it is something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = {f.name for f in fields(Row)}
            rows = [
                Row(**{name: row[name] for name in names & row.keys()}, n=row["n_test"])
                for row in values["results"]
            ]
            sets = values["data_sets"]
            return Results(
                name=values["name"],
                how=values["how"],
                rows=rows,
                counts={
                    name: {key: count for key, count in of.items() if key != "dataset"}
                    for name, of in sets.items()
                },
                datasets={name: of["dataset"] for name, of in sets.items()},
                identity=values["identity"],
                about={
                    key: value
                    for key, value in values.items()
                    if key not in ("name", "how", "data_sets", "results", "identity")
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no result of an evaluation ({error})") from error

    def write(self, folder: Path) -> Path:
        """Write ``<name>.csv`` and then ``<name>.json``, each atomically; returns the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"evaluation": self.name} | row.plain() for row in self.rows]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / f"{self.name}.csv", text.getvalue())
        path = folder / f"{self.name}.json"
        write_json(path, self.plain())
        return path

    def figures(self) -> dict[str, float]:
        """The accuracies by key, as in ``summary.json``: ``honest_top1``, on other data or layers
        ``honest_top1/<data>/<layer>``."""
        first = next(iter(self.counts))
        found = {}
        for row in self.rows:
            of = "" if (row.data, row.layer) == (first, LAYER) else f"/{row.data}/{row.layer}"
            found |= {f"{row.key}_{name}{of}": value for name, value in row.accuracies.items()}
        return found

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of each of :meth:`figures`."""
        first = next(iter(self.counts))
        n = {name: of["n_test"] for name, of in self.counts.items()}
        return {
            key: [round(end, 4) for end in interval(value, n[data_of(key, first)])]
            for key, value in self.figures().items()
        }

    def tables(self) -> list[Group]:
        """A table for each data set, in per cent."""
        return [self._table(name) for name in self.counts]

    def _table(self, name: str) -> Group:
        rows = [row for row in self.rows if row.data == name]
        caption = (
            f"{in_words(self.counts[name])} {self.how} ±: half of the 95 % confidence interval (Wilson)."
        )
        title = escape(f"{self.name} on {self.datasets[name]} (%)")
        table = Table(title=title, min_width=64)
        empty = is_empty_top5("_top5", [row.top5 for row in rows if row.top5 is not None])
        columns = {
            "features": lambda row: row.layer,
            "": lambda row: row.title,
            "top-1": lambda row: _percent(row.top1, row.n),
            "top-5": lambda row: "" if empty else _percent(row.top5, row.n),
            "classifier": _chosen,
            "converged": lambda row: row.converged,
            "published": lambda row: row.published + ("" if row.gap is None else f" ({row.gap:+z.1f})"),
        }
        cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
        shown = [title for title, column in cells.items() if any(column)]
        for title in shown:
            table.add_column(title, justify="right" if title.startswith(("top", "published")) else "left")
        for row in zip(*(cells[title] for title in shown), strict=True):
            table.add_row(*map(escape, row))
        return captioned(table, caption)


def _with_interval(name: str, value: float, n: int) -> dict[str, float]:
    low, high = interval(value, n)
    return {name: value, f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}


def _chosen(row: Row) -> str:
    held_out = _percent(row.holdout_top1, row.n_held_out)
    return f"{row.chosen} (held-out {held_out})" if held_out else row.chosen


def in_words(counts: Mapping[str, int]) -> str:
    """The numbers of images as text."""
    uses = {
        "n_train": "for training",
        "n_held_out": "for selection",
        "n_bank": "to search for neighbours",
        "n_test": "for testing",
        "n_unreadable": "unreadable",
    }
    parts = [f"{counts[name]:,} {use}" for name, use in uses.items() if name in counts]
    return f"Images: {', '.join(parts)}."


def _percent(value: float | None, n: int) -> str:
    if value is None:
        return ""
    low, high = interval(value, n)
    return f"{100 * value:.1f} ±{50 * (high - low):.1f}"
