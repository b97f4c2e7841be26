"""Final table and curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sslzoo.evaluate.figures import FEATURES
from sslzoo.evaluate.task import Samples
from sslzoo.files import atomically
from sslzoo.panels import FRAMEWORK
from sslzoo.records.record import equal_intervals, figure_table, percent, read_metrics
from sslzoo.terminal import captioned, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours of the Okabe-Ito palette, distinguishable for colour-blind readers and in greyscale.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
NARROW = 5.0  # minimum range of an axis in percentage points, so that noise does not look like a trend


def results_tables(summary: Mapping[str, Any]) -> list[Group | str]:
    """The figures of ``summary.json`` in per cent, one table per data set, each with a caption. Without labels, a
    sentence and the representation metrics."""
    if "not_measured" in summary:
        sentence = f"The features were not evaluated: {summary['not_measured']}"
        return [sentence, *_representation_table(summary.get("representation", {}))]
    return [_results_table(summary, name) for name in summary["data_sets"]]


def _results_table(summary: Mapping[str, Any], name: str) -> Group:
    data_set = summary["data_sets"][name]
    samples = Samples(*(data_set[field] for field in Samples._fields))
    lines = [
        f"{samples.in_words()}.",
        data_set["protocol"],
        "±: half of the 95 % confidence interval (Wilson).",
    ]
    if name == next(iter(summary["data_sets"])):
        lines.append(f"Trained in {duration(summary['seconds'])}.")
    table = Table(title=f"Evaluation of the features on {escape(data_set['dataset'])} (%)")
    columns, rows = figure_table(summary, name)
    table.add_column("features", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        style = "bold" if row.trained else ""
        table.add_row(escape(row.title), *(percent(summary, key) for key in row.keys), style=style)
    return captioned(table, " ".join(lines))


def _representation_table(figures: Mapping[str, float]) -> list[Group]:
    """One table, or none without ``figures``."""
    panels = next(section.panels for section in FRAMEWORK if section.name == "representation")
    table = Table(title="Representation of the plain training images", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    notes = []
    for panel in panels:
        value = figures.get(panel.curves[0].key.partition("/")[2])
        if value is not None:
            shown = f"{100 * value:.1f} %" if panel.unit == "%" else f"{value:.4g}"
            table.add_row(panel.title, shown)
            notes.append(f"{panel.title[:1].upper()}{panel.title[1:]}: {panel.note}")
    return [captioned(table, " ".join(notes))] if figures else []


class _Name(NamedTuple):
    """A label at the right edge of a panel, and the height of the line that it names."""

    height: float
    text: str
    colour: str


def plot_curves(metrics: Path, path: Path, summary: Mapping[str, Any]) -> None:
    """Plot the curves of a run to a PNG file: the loss at the top; below it, one panel each for linear probe and k-NN,
    with the final figure as a marker and the baselines as lines.

    ``metrics`` is the run's ``metrics.csv``, ``summary`` the content of its ``summary.json``.
    """
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    judges = {"linear_top1": ("linear probe", BLUE), "knn_top1": ("k-NN", ORANGE)}
    shown = [key for key in judges if f"val/{key}" in series or key in summary]
    figure = Figure(figsize=(8, 5.6 if shown else 3), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + (len(shown) > 0), max(1, len(shown)))
    last = max((steps[-1] for steps, _ in series.values()), default=1)
    loss = figure.add_subplot(grid[0, :])
    loss.plot(*equal_intervals(*series.get("train/loss", ([], []))), color=BLUE, linewidth=1.6)
    _finish(loss, "pre-training loss", last, ticks=8)
    panels = [figure.add_subplot(grid[1, column]) for column in range(len(shown))]
    names = [
        _draw_accuracy(axes, series, summary, key, judges[key][1], last)
        for axes, key in zip(panels, shown, strict=True)
    ]
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes, key, own in zip(panels, shown, names, strict=True):
        axes.set_ylim(max(0, min(limits)), min(100, max(limits)))  # the same scale for all panels
        _finish(axes, f"{judges[key][0]}, top-1 on test images (%)", last, ticks=4)
        _write_names(axes, own)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, and nothing if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as part:
        figure.savefig(part, format="png")


def _draw_accuracy(
    axes: Axes,
    series: Mapping[str, tuple[list[int], list[float]]],
    summary: Mapping[str, Any],
    key: str,
    colour: str,
    last: int,
) -> list[_Name]:
    """Draw the curve of one accuracy, its final figure and the baselines; returns their labels."""
    steps, values = series.get(f"val/{key}", ([], []))
    marker = "o" if len(steps) <= 40 else ""
    course = [100 * value for value in values]
    axes.plot(steps, course, color=colour, linewidth=1.6, marker=marker, markersize=4, clip_on=False)
    names: list[_Name] = []
    for prefix, title in FEATURES.items():
        figure = summary.get(prefix + key, values[-1] if values and not prefix else None)
        if figure is None:
            continue
        height = 100 * figure
        names.append(_Name(height, f"{title} {height:.1f}", "0.35" if prefix else colour))
        if prefix:
            axes.axhline(height, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        else:
            axes.plot(last, height, "D", color=colour, markersize=8, mec="white", clip_on=False, zorder=4)
    low, high = axes.get_ylim()
    if high - low < NARROW:
        axes.set_ylim((low + high - NARROW) / 2, (low + high + NARROW) / 2)
    return names


def _finish(axes: Axes, title: str, last: int, *, ticks: int) -> None:
    """Set title, axes and ticks, with integer steps and without offset notation."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, last)
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize=9)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_names(axes: Axes, names: Sequence[_Name]) -> None:
    """Write the labels beside the right edge, spread so that they do not overlap."""
    low, high = axes.get_ylim()
    names = sorted(names)
    for name, at in zip(names, spread([name.height for name in names], 0.08 * (high - low)), strict=True):
        axes.annotate(
            name.text,
            (1.05, at),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=name.colour,
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The closest heights to the increasing ``heights`` that are at least ``gap`` apart."""
    blocks: list[tuple[float, int]] = []  # mean height minus the gaps below, and number of labels
    for i, height in enumerate(heights):
        mean, count = height - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [height + i * gap for i, height in enumerate(flat)]
