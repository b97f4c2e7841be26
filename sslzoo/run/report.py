"""What a run leaves for the eye: the final table, the curves, a grid of augmented views."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sslzoo.evaluate.metrics import FEATURES
from sslzoo.terminal import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sslzoo.batch import Batch

COLUMNS = {
    "linear_top1": "linear top-1",
    "linear_top5": "top-5",
    "logistic_top1": "logistic",
    "knn_top1": "k-NN",
}
# Okabe and Ito's colours: apart for every kind of colour vision, and in grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def results_table(summary: Mapping[str, Any]) -> Table | str:
    """The figures of ``summary.json`` in percent, one row for each kind of features that was measured; a sentence
    where nothing was."""
    if not any(prefix + key in summary for prefix in FEATURES for key in COLUMNS):
        return f"What the features are worth was not measured: {summary['protocol']}"
    table = Table(title="What the features are worth (%)", caption=str(summary["protocol"]))
    table.add_column("features")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    table.add_column("training", justify="right")
    for prefix, title in FEATURES.items():
        figures = [summary.get(prefix + key) for key in COLUMNS]
        if any(figure is not None for figure in figures):
            cells = ["-" if figure is None else f"{100 * figure:.1f}" for figure in figures]
            time = duration(summary["seconds"]) if prefix == "" else "-"
            table.add_row(title, *cells, time, style="bold" if prefix == "" else "")
    return table


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """``metrics.csv`` by metric: optimiser steps and values, without the empty cells."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch"):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(cell))
    return series


def plot_curves(metrics: Path, path: Path) -> None:
    """Loss above, online accuracies below, over optimiser steps, from ``metrics.csv`` to a PNG."""
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    figure = Figure(figsize=(6.4, 5.6), dpi=150, layout="constrained")
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    _draw(loss, series, {"train/loss": ("loss", BLUE)}, label="pre-training loss", percent=False)
    accuracies = {"val/linear_top1": ("linear probe", BLUE), "val/knn_top1": ("k-NN", ORANGE)}
    _draw(accuracy, series, accuracies, label="top-1 on test images (%)", percent=True)
    accuracy.set_xlabel("optimiser step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(
    axes: Axes,
    series: Mapping[str, tuple[list[int], list[float]]],
    curves: Mapping[str, tuple[str, str]],
    *,
    label: str,
    percent: bool,
) -> None:
    drawn = [(name, title, colour) for name, (title, colour) in curves.items() if name in series]
    for (name, title, colour), marker in zip(drawn, "os", strict=False):
        steps, values = series[name]
        shown = [100 * v for v in values] if percent else values
        sparse = marker if len(steps) <= 40 else ""
        axes.plot(steps, shown, color=colour, label=title, linewidth=1.6, marker=sparse, markersize=4)
    if not drawn:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.4")
    if len(drawn) > 1:
        axes.legend(frameon=False, loc="lower right")
    axes.set_ylabel(label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_views(
    batch: Batch, path: Path, *, mean: Sequence[float], std: Sequence[float], images: int = 6
) -> None:
    """A PNG with a row for each of the first ``images`` samples of a training batch and a column a view,
    normalisation by ``mean`` and ``std`` undone."""
    import torch
    from matplotlib.figure import Figure

    views = [("global", i + 1, view) for i, view in enumerate(batch.global_views)]
    views += [("local", i + 1, view) for i, view in enumerate(batch.local_views)]
    count = min(images, len(batch.sample_id))
    figure = Figure(figsize=(1.3 * len(views) + 0.3, 1.3 * count + 0.4), dpi=150, layout="constrained")
    grid = figure.subplots(count, len(views), squeeze=False)
    for column, (role, number, view) in enumerate(views):
        shape = (1, -1, 1, 1)
        pixels = view[:count].detach().float().cpu()
        pixels = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        pixels = pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        for row, axes in enumerate(grid[:, column]):
            axes.imshow(pixels[row].squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        size = f"{view.shape[-1]} px"
        grid[0, column].set_title(f"{role} view {number}\n{size}", fontsize=8)
    for row, axes in enumerate(grid[:, 0]):
        axes.set_ylabel(f"image {int(batch.sample_id[row])}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
