"""Tables and pictures: right numbers in right places, files that are pictures."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from sslzoo.callbacks.metrics_file import MetricsFile
from sslzoo.evaluate.task import Samples
from sslzoo.records.record import equal_intervals, read_metrics
from sslzoo.records.report import plot_curves, results_tables, spread
from sslzoo.terminal import duration

PNG = b"\x89PNG\r\n"


def _metrics(folder: Path) -> Path:
    file = MetricsFile(folder / "metrics.csv")
    file.rewind(0, ["step", "epoch"])
    file.append(10, 0, {"train/loss": 2.5, "opt/lr": 0.1})
    file.append(20, 0, {"val/linear_top1": 0.5})
    file.append(20, 0, {"val/knn_top1": 0.25})
    file.append(30, 1, {"train/loss": 2.0})
    file.close()
    return file.path


def test_series_skip_empty_cells(tmp_path: Path) -> None:
    series = read_metrics(_metrics(tmp_path))
    assert series["train/loss"] == ([10, 30], [2.5, 2.0])
    assert series["val/linear_top1"] == ([20], [0.5])
    assert "step" not in series and "epoch" not in series


def _drawn(
    monkeypatch: pytest.MonkeyPatch, metrics: Path, out: Path, summary: dict[str, float]
) -> list[Axes]:
    """The panels of the picture."""
    figures: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **keys: (figures.append(self), original(self, *args, **keys))
    )
    plot_curves(metrics, out, summary)
    assert out.read_bytes().startswith(PNG)
    figures[0].draw_without_rendering()
    return figures[0].axes


def _heights(axes: Axes) -> list[list[float]]:
    return [np.asarray(line.get_ydata()).tolist() for line in axes.lines]


def test_curves_have_baselines_as_lines_and_the_final_figure_as_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = {
        "linear_top1": 0.86,
        "knn_top1": 0.82,
        "raw_pixels_linear_top1": 0.829,
        "pca_linear_top1": 0.825,
        "random_init_knn_top1": 0.778,
    }
    loss, linear, knn = _drawn(monkeypatch, _metrics(tmp_path), tmp_path / "new" / "curves.png", summary)
    assert _heights(loss) == [[2.5, 2.0]]
    assert _heights(linear) == [[50.0], [86.0], pytest.approx([82.9] * 2), pytest.approx([82.5] * 2)]
    assert _heights(knn) == [[25.0], [82.0], pytest.approx([77.8] * 2)]
    mark = linear.lines[1]
    assert mark.get_marker() == "D" and np.asarray(mark.get_xdata()).tolist() == [30]
    assert {t.get_text() for t in linear.texts} == {"trained encoder 86.0", "raw pixels 82.9", "PCA-64 82.5"}
    assert linear.get_ylim() == knn.get_ylim()
    heights = sorted(text.get_window_extent().y0 for text in linear.texts)
    assert all(b - a > 10 for a, b in pairwise(heights)), "names on top of one another"


def test_curves_of_what_was_not_measured_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.csv").write_text("step,epoch\n")
    assert len(_drawn(monkeypatch, tmp_path / "empty.csv", tmp_path / "empty.png", {})) == 1


def test_ticks_say_the_whole_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No offset to add, no factor to multiply by."""
    (tmp_path / "flat.csv").write_text("step,epoch,train/loss\n5000,0,6.23811\n10000,1,6.23807\n")
    (loss,) = _drawn(monkeypatch, tmp_path / "flat.csv", tmp_path / "flat.png", {})
    assert not loss.yaxis.get_offset_text().get_text() and not loss.xaxis.get_offset_text().get_text()
    assert all(label.get_text().startswith("6.238") for label in loss.get_yticklabels())
    assert "10,000" in [label.get_text() for label in loss.get_xticklabels()]


def test_parts_of_an_interval_are_one_again() -> None:
    """Rows at every 50th step and at the end of each epoch, of 93 steps."""
    steps = [50, 93, 100, 150, 186, 200, 250, 279]
    values = [5.0, 4.0, 2.0, 3.5, 3.0, 2.0, 2.5, 2.0]
    got = equal_intervals(steps, values)
    assert got[0] == [50, 100, 150, 200, 250, 279]
    assert got[1] == pytest.approx([5.0, (43 * 4 + 7 * 2) / 50, 3.5, (36 * 3 + 14 * 2) / 50, 2.5, 2.0])
    assert equal_intervals([50, 100, 110], [1.0, 2.0, 8.0]) == ([50, 110], [1.0, 3.0])
    assert equal_intervals([], []) == ([], [])


def test_names_are_spread_about_their_heights() -> None:
    assert spread([1.0, 5.0], 2.0) == [1.0, 5.0]
    assert spread([1.0, 1.0, 1.5, 9.0], 1.0) == pytest.approx([1 / 6, 7 / 6, 13 / 6, 9.0])


SUMMARY = {
    "linear_top1": 0.8712,
    "linear_top5": 0.99,
    "linear_l2": 0.003,
    "pca_linear_top1": 0.837,
    "linear_top1/data/projector": 0.5,
    "linear_top1/stl10/backbone": 0.75,
    "knn_top1/stl10/backbone": 0.625,
    "interval_95": {
        "linear_top1": [0.856, 0.884],
        "linear_top5": [0.984, 0.994],
        "pca_linear_top1": [0.820, 0.852],
        "linear_top1/data/projector": [0.478, 0.522],
        "linear_top1/stl10/backbone": [0.74, 0.76],
        "knn_top1/stl10/backbone": [0.614, 0.636],
    },
    "data_sets": {
        "data": {"dataset": "cifar10", "protocol": "Fitted to it."}
        | Samples(45_000, 5_000, 50_000, 10_000, 3)._asdict(),
        "stl10": {"dataset": "stl10", "protocol": "And to that."}
        | Samples(4_500, 500, 5_000, 8_000, 0)._asdict(),
    },
    "seconds": 200,
}


def shown(summary: Mapping[str, Any]) -> list[str]:
    """The tables as they are printed, each in one line."""
    texts = []
    for table in results_tables(summary):
        console = Console(width=80)
        with console.capture() as captured:
            console.print(table)
        texts.append(" ".join(captured.get().split()))
    return texts


def test_each_data_set_has_a_table_of_what_was_measured_on_it() -> None:
    own, other = shown(SUMMARY)
    assert "features on cifar10 (%)" in own and "features on stl10 (%)" in other
    for text in ("87.1 ±1.4 │ 99.0 ±0.5", "projector │ 50.0 ±2.2 │ -", "PCA-64 │ 83.7 ±1.6", "Fitted to it."):
        assert text in own
    assert (
        "45,000 images for training, 5,000 for selection" in own and "10,000 for testing, 3 unreadable" in own
    )
    assert "Trained in 3 min 20 s" in own and "Trained" not in other
    assert "75.0 ±1.0 │ 62.5 ±1.1" in other and "And to that." in other
    assert not any(word in own for word in ("raw pixels", "random", "k-NN │", "SGD"))
    assert "top-5" in own
    assert "top-5" not in shown(SUMMARY | {"linear_top5": 1.0})[0], "of five classes or fewer"


def test_unlabelled_data_says_what_was_not_measured() -> None:
    assert shown({"not_measured": "linear probe and k-NN: no labels"}) == [
        "The features were not evaluated: linear probe and k-NN: no labels"
    ]


def test_the_table_of_unlabelled_data_is_the_representation() -> None:
    figures = {"width": 16.0, "std": 0.081234, "rankme": 2.77, "overlap": 0.775}
    said, table = shown({"not_measured": "no labels", "representation": figures})
    assert said.startswith("The features were not evaluated")
    for text in ("feature deviation", "0.08123", "(RankMe)", "2.77", "77.5 %", "number of features"):
        assert text in table
    assert "LiDAR" not in table and table.endswith("their rank can be.")


def test_captions_have_the_width_of_the_terminal() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(results_tables(SUMMARY)[0])
    caption = captured.get().splitlines()[-2:]
    assert caption[0].startswith("45,000 images for training, ") and len(caption[0].rstrip()) > 80


def test_durations() -> None:
    assert [duration(s) for s in (9.6, 60, 3599.6, 7260)] == ["10 s", "1 min 0 s", "1 h 0 min", "2 h 1 min"]


def test_percentages_end_at_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("sslzoo.records.report._save", lambda figure, _: figures.append(figure))
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss,val/linear_top1\n5,0,2.0,\n10,1,1.0,1.0\n")
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", {"linear_top1": 1.0})
    low, high = figures[0].axes[1].get_ylim()
    assert 0 <= low < high == 100
