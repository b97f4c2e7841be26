"""Compare runs: seeds of the same recipe are one group, and only what differs between groups is shown.

Importable without torch. Of a group of one run, an accuracy has its 95 % interval on the test images; of several, mean
and sample standard deviation over runs. Groups with the same seeds are compared with the first one seed by seed: the
mean of the differences with a 95 % t-interval, which does not contain what seeds have in common.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from sslzoo import panels
from sslzoo.evaluate.figures import FEATURES, evaluation_title, is_accuracy, is_empty_top5
from sslzoo.pages.page import Block, Chart, Line, Section, Table, Text, render
from sslzoo.records.page import run_panels
from sslzoo.records.record import COLUMNS, Record

# Keys that tell runs apart, but not what they try: runs that differ in these alone are of one group.
ASIDE = (
    "seed",
    "name",
    "data.root",
    "data.workers",
    "data.timeout",
    "logging.",
    "eval.after",
    "analyses",
    "trainer.devices",
    "trainer.num_nodes",
)
SHORT = 48  # characters of a value
FEW = 6  # keys that may stand beside the figures
IN_LABEL = 3  # keys in the label of a group, unless it takes more to tell it apart
Grid = tuple[list[str], list[list[str]]]  # head and rows of a table
# Student's t: the 97.5 % quantile by degrees of freedom from 1 on; a series from T's length on.
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z = 1.959964


@dataclass(frozen=True)
class Spread:
    """A figure over the runs of a group."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None of a single value."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of the differences of pairs, and half of its 95 % t-interval; None of a single pair."""

    mean: float
    half: float | None
    n: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """``second`` minus ``first`` for the seeds of both; None if there is no common seed."""
    gaps = [second[seed] - first[seed] for seed in first if seed in second]
    if not gaps:
        return None
    n = len(gaps)
    half = None if n == 1 else t_quantile(n - 1) * stdev(gaps) / math.sqrt(n)
    return Difference(mean=fmean(gaps), half=half, n=n)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with ``freedom`` degrees of freedom, to three digits (beyond the table by the
    expansion in Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(T):
        return T[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Group:
    """Runs whose recipes differ at most in the seed and in what does not matter."""

    label: str
    runs: tuple[Record, ...]
    superseded: int = 0  # unfinished runs of seeds that a finished one has, which are not in runs

    def spread(self, measure: Callable[[Record], float | None]) -> Spread | None:
        """A figure of all runs that have it; None if none has."""
        values = tuple(v for run in self.runs if (v := measure(run)) is not None)
        return Spread(values) if values else None

    def by_seed(self, measure: Callable[[Record], float | None]) -> dict[int, float]:
        """The same by seed; the mean of several runs of a seed."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            seed, value = run.recipe.get("seed"), measure(run)
            if seed is not None and value is not None:
                found.setdefault(seed, []).append(value)
        return {seed: fmean(values) for seed, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure in the comparison; ``key`` of an accuracy is that of the summary."""

    title: str
    measure: Callable[[Record], float | None]
    factor: float = 1.0
    digits: int | None = 1  # after the point; None: three significant ones
    key: str = ""
    name: str = ""  # in CSV, if neither key nor title


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, side by side."""

    groups: tuple[Group, ...]
    differing: tuple[str, ...]  # keys of the recipe

    @cached_property
    def columns(self) -> list[Column]:
        """The figures that at least one run has: accuracies, representation, then what training costs."""
        keys = dict.fromkeys(k for group in self.groups for run in group.runs for k in _accuracies(run))
        order = list(COLUMNS)
        ranked = sorted(keys, key=lambda key: order.index(key) if key in order else len(order))
        titles = {
            f"{row.get('key')}_top1": evaluation_title(
                result.get("name") or row.get("key", ""), row.get("title", "")
            )
            for group in self.groups
            for run in group.runs
            for result in run.results
            for row in result["results"]
        }
        columns = [
            Column(title=_title(key, titles), measure=_figure(key), factor=100.0, key=key) for key in ranked
        ]
        columns += [
            Column(
                title=f"{panel.title} (%)" if panel.unit == "%" else panel.title,
                measure=_last(panel.curves[0].key),
                factor=100.0 if panel.unit == "%" else 1.0,
                digits=1 if panel.unit == "%" else None,
            )
            for section in panels.FRAMEWORK
            if section.name == "representation"
            for panel in section.panels
        ]
        columns += [
            Column(title="images/s", measure=lambda run: run.images_per_s, digits=0),
            self._duration(),
            Column(title="GPU memory (GiB)", measure=_peak("sys/gpu_mem")),
        ]
        return [c for c in columns if any(group.spread(c.measure) for group in self.groups)]

    def _duration(self) -> Column:
        """Hours of training, or minutes if none took an hour."""
        most = max(run.seconds for group in self.groups for run in group.runs)
        title, factor, digits = ("hours", 1.0, 2) if most >= 3600 else ("minutes", 60.0, None)
        return Column(
            title=title,
            measure=lambda run: run.seconds / 3600 if run.seconds else None,
            factor=factor,
            digits=digits,
            name="hours",
        )

    @property
    def beside(self) -> tuple[str, ...]:
        """Keys that stand beside the figures: all that differ, unless these are too many, as between methods."""
        return self.differing if len(self.differing) <= FEW else ()

    def table(self) -> Grid:
        """The figures, a row for each group."""
        head = ["", *self.beside, "runs", *(column.title for column in self.columns)]
        return head, [self._row(group) for group in self.groups]

    def recipes(self) -> Grid:
        """What differs between the recipes, a row for each key, where that is too much for the table of figures."""
        rows = [
            [key, *(_short(group.runs[0].recipe.get(key, "-")) for group in self.groups)]
            for key in self.differing
        ]
        return ["", *(group.label for group in self.groups)], [] if self.beside else rows

    def _row(self, group: Group) -> list[str]:
        recipe = group.runs[0].recipe
        unfinished = sum(run.state != "done" for run in group.runs)
        runs = str(len(group.runs)) + (f" ({unfinished} unfinished)" if unfinished else "")
        cells = [_cell(group, column) for column in self.columns]
        return [group.label, *(_short(recipe.get(key, "-")) for key in self.beside), runs, *cells]

    def differences(self) -> Grid:
        """Head and rows: accuracies of the other groups minus those of the first. No rows without common seeds."""
        first, *others = self.groups
        columns = [column for column in self.columns if column.key]
        rows: list[list[str]] = []
        for group in others:
            cells = [
                _gap(paired(first.by_seed(column.measure), group.by_seed(column.measure)))
                if _same_test_images(column.key, first, group)
                else ""
                for column in columns
            ]
            if any(cells):
                rows.append([f"{group.label} - {first.label}", *cells])
        return ["", *(column.title for column in columns)], rows

    @property
    def tested_otherwise(self) -> list[str]:
        """The other groups that have an accuracy in common with the first, measured on other test images."""
        first, *others = self.groups
        columns = [column for column in self.columns if column.key and first.by_seed(column.measure)]
        return [
            group.label
            for group in others
            if any(
                group.by_seed(column.measure) and not _same_test_images(column.key, first, group)
                for column in columns
            )
        ]

    def notes(self) -> list[str]:
        """How to read the tables."""
        notes = ["Accuracies in per cent."]
        sizes = {len(group.runs) for group in self.groups}
        if 1 in sizes:
            notes.append("±: half of the 95 % interval on the test images (Wilson), of a single run.")
        if max(sizes, default=0) > 1:
            notes.append("± of several runs: their sample standard deviation.")
        if self.differences()[1]:
            notes.append(
                "Differences are paired by seed, with half of the 95 % t-interval over the seeds, which says nothing "
                "about other test images."
            )
        if self.tested_otherwise:
            notes.append(
                f"No differences where the test images are others than those of {self.groups[0].label}: "
                f"{'; '.join(self.tested_otherwise)}."
            )
        superseded = sum(group.superseded for group in self.groups)
        if superseded:
            notes.append(f"Unfinished runs left out, because a finished one has their seed: {superseded}.")
        return notes


def compare(records: Sequence[Record]) -> Comparison:
    """Group the runs, in order of their first appearance."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        kept = {key: value for key, value in record.recipe.items() if not key.startswith(ASIDE)}
        grouped.setdefault(repr(sorted(kept.items())), []).append(record)
    groups = list(grouped.values())
    keys = dict.fromkeys(key for runs in groups for key in runs[0].recipe if not key.startswith(ASIDE))
    differing = [key for key in keys if len({repr(runs[0].recipe.get(key)) for runs in groups}) > 1]
    labels = _labels([runs[0] for runs in groups])
    return Comparison(
        tuple(_group(label, runs) for label, runs in zip(labels, groups, strict=True)), tuple(differing)
    )


def _group(label: str, runs: Sequence[Record]) -> Group:
    """Without unfinished runs of seeds that a finished run has."""
    done = {run.recipe.get("seed") for run in runs if run.state == "done"}
    kept = tuple(run for run in runs if run.state == "done" or run.recipe.get("seed") not in done)
    return Group(label, kept, superseded=len(runs) - len(kept))


def _labels(firsts: Sequence[Record]) -> list[str]:
    """A label for each group, by its first run, all different: the recipe's name, and where several groups have it, the
    keys in which these differ."""
    names = [str(run.recipe.get("name") or run.name) for run in firsts]
    labels = list(names)
    for name in set(names):
        places = [i for i, other in enumerate(names) if other == name]
        if len(places) > 1:
            values = _told_apart([firsts[i] for i in places])
            for i, value in zip(places, values, strict=True):
                labels[i] = f"{name} {value}" if len(places) < len(names) else value
    for further in (lambda run: run.name, lambda run: str(run.path)):
        labels = [
            label if label and labels.count(label) == 1 else f"{label} {further(run)}".strip()
            for label, run in zip(labels, firsts, strict=True)
        ]
    return labels


def _told_apart(runs: Sequence[Record]) -> list[str]:
    """The values in which the runs differ: of up to three keys, or of as many as it takes to tell them apart."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    kinds = {key: len({repr(run.recipe.get(key)) for run in runs}) for key in keys}
    differing = [key for key in keys if kinds[key] > 1 and not key.startswith(ASIDE)]
    telling: list[str] = []
    apart = 1
    for key in sorted(differing, key=lambda key: -kinds[key]):
        found = {tuple(repr(run.recipe.get(k)) for k in (*telling, key)) for run in runs}
        if len(found) > apart:
            telling, apart = [*telling, key], len(found)
    telling += [key for key in differing if key not in telling][: max(0, IN_LABEL - len(telling))]
    endings = [key.rpartition(".")[2] for key in keys]
    titles = {key: end if endings.count(end) == 1 else key for key, end in zip(keys, endings, strict=True)}
    return [
        ", ".join(f"{titles[key]}={_short(run.recipe.get(key, '-'))}" for key in differing if key in telling)
        for run in runs
    ]


def _same_test_images(key: str, first: Group, second: Group) -> bool:
    """Whether all runs of both groups have an accuracy on the same images, as far as their directories say."""
    tested = [
        run.tested_on(key) for group in (first, second) for run in group.runs if run.figure(key) is not None
    ]
    return all(
        one[fact] == other[fact] for one in tested for other in tested for fact in one.keys() & other.keys()
    )


def _accuracies(run: Record) -> Iterator[str]:
    """Keys of the trained encoder's top-1 accuracies, in the summary, by ``sslzoo eval`` and in training."""
    prefixes = tuple(filter(None, FEATURES))
    for key in (
        *run.summary,
        *run.later,
        *(k.removeprefix("val/") for k in run.metrics if k.startswith("val/")),
    ):
        if is_accuracy(key) and "_top1" in key and not key.startswith(prefixes):
            yield key


def _title(key: str, titles: Mapping[str, str]) -> str:
    """Of an accuracy; ``titles`` are those of ``sslzoo eval``, by figure."""
    figure, _, place = key.partition("/")
    words = COLUMNS.get(figure) or titles.get(figure) or figure.removesuffix("_top1")
    return words + (f" ({place.replace('/', ', ')})" if place else "")


def _figure(key: str) -> Callable[[Record], float | None]:
    return lambda run: run.figure(key)


def _last(key: str) -> Callable[[Record], float | None]:
    def last(run: Record) -> float | None:
        _, values = run.metrics.get(key, ([], []))
        return values[-1] if values else None

    return last


def _peak(key: str) -> Callable[[Record], float | None]:
    return lambda run: max(run.system.get(key, ([], []))[1], default=None)


def _cell(group: Group, column: Column) -> str:
    spread = group.spread(column.measure)
    if spread is None:
        return "-"
    text = _number(column, spread.mean)
    if spread.sd is not None:
        return f"{text} ± {_number(column, spread.sd)}"
    ends = group.runs[0].interval(column.key) if column.key and len(group.runs) == 1 else None
    return f"{text} ±{50 * (ends[1] - ends[0]):.1f}" if ends else text


def _number(column: Column, value: float) -> str:
    value *= column.factor
    return f"{value:.3g}" if column.digits is None else f"{value:z,.{column.digits}f}"


def _gap(difference: Difference | None) -> str:
    if difference is None:
        return ""
    half = "" if difference.half is None else f" ± {100 * difference.half:.1f}"
    return f"{100 * difference.mean:+z.1f}{half} (n={difference.n})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"


# -- forms --------------------------------------------------------------------------------------------


def as_csv(comparison: Comparison) -> str:
    """One row per group and figure, with numbers that programs can read; accuracies as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", *comparison.differing, "figure", "mean", "sd", "n", "low", "high"])
    for group in comparison.groups:
        recipe = group.runs[0].recipe
        for column in comparison.columns:
            spread = group.spread(column.measure)
            if spread is None:
                continue
            ends = group.runs[0].interval(column.key) if column.key and len(group.runs) == 1 else None
            writer.writerow(
                [
                    group.label,
                    *(recipe.get(key, "") for key in comparison.differing),
                    column.key or column.name or column.title,
                    spread.mean,
                    "" if spread.sd is None else spread.sd,
                    len(spread.values),
                    *(ends or ("", "")),
                ]
            )
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The tables for a document."""
    grids = (comparison.table(), comparison.differences(), comparison.recipes())
    parts = [_markdown(head, rows) for head, rows in grids if rows]
    return "\n\n".join([*parts, " ".join(comparison.notes())]) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_page(comparison: Comparison) -> str:
    """One HTML page: the tables, and curves with a band from the lowest to the highest run of a group."""
    tables: list[Block] = []
    for head, rows in (comparison.table(), comparison.differences()):
        if rows:
            tables.append(Table(head=head, rows=rows))
    tables.append(Text(" ".join(comparison.notes())))
    head, rows = comparison.recipes()
    if rows:
        tables.append(Table(head=head, rows=rows, numbers=False, caption="What differs between the recipes"))
    sections = [Section(title="Figures", blocks=tables)]
    shown = _panels(comparison)
    for title in dict.fromkeys(title for title, _, _ in shown):
        charts = [_chart(comparison, groups, panel) for name, panel, groups in shown if name == title]
        sections.append(Section(title=title, blocks=[chart for chart in charts if chart is not None]))
    runs = [[group.label, run.name, run.state] for group in comparison.groups for run in group.runs]
    sections.append(
        Section(title="Runs", blocks=[Table(head=["group", "run", "state"], rows=runs, numbers=False)])
    )
    groups = len(comparison.groups)
    subtitle = f"{len(runs)} runs in {groups} group{'s' * (groups > 1)}"
    return render("Comparison", subtitle, [section for section in sections if section.blocks])


def _panels(comparison: Comparison) -> list[tuple[str, panels.Panel, list[Group]]]:
    """Title of the section, panel, and the groups whose runs have it, in the order of ``sslzoo.panels.ORDER``."""
    order: dict[str, int] = {}
    found: dict[tuple[str, str], tuple[panels.Panel, list[Group]]] = {}
    for group in comparison.groups:
        for section in run_panels(group.runs[0]):
            order[section.title] = panels.ORDER.index(section.name)
            for panel in section.panels:
                found.setdefault((section.title, panel.title), (panel, []))[1].append(group)
    places = sorted(found, key=lambda place: order[place[0]])
    return [(place[0], *found[place]) for place in places]


def _chart(comparison: Comparison, groups: Sequence[Group], panel: panels.Panel) -> Chart | None:
    """The curves of ``groups``; with one curve each, a group has the same colour in all charts."""
    factor = 100.0 if panel.unit == "%" else 1.0
    lines: list[Line] = []
    for group in groups:
        recorded = dict.fromkeys(key for run in group.runs for key in run.metrics)
        for key, label in panel.lines(recorded):
            line = _line(group, key, factor, f"{group.label}: {label}" if label else group.label)
            if line is not None and not is_empty_top5(key, [y / factor for y in line.y]):
                lines.append(line)
    if not lines:
        return None
    colours = {group.label: number for number, group in enumerate(comparison.groups)}
    if {line.label for line in lines} <= colours.keys():
        lines = [replace(line, colour=colours[line.label]) for line in lines]
    return Chart(title=panel.title, lines=lines, unit=panel.unit, log_scale=panel.log_scale, note=panel.note)


def _line(group: Group, key: str, factor: float, label: str) -> Line | None:
    """Mean of the runs at the steps that all of them have, and a band of several runs."""
    series = [run.system.get(key) or run.metrics.get(key) for run in group.runs]
    known = [dict(zip(*both, strict=True)) for both in series if both is not None]
    if not known:
        return None
    steps = sorted(set.intersection(*(set(values) for values in known)))
    rows = [[factor * values[step] for values in known] for step in steps]
    band = len(known) > 1
    return Line(
        label=label,
        x=steps,
        y=[fmean(row) for row in rows],
        low=[min(row) for row in rows] if band else (),
        high=[max(row) for row in rows] if band else (),
    )
