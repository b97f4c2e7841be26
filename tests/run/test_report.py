"""Tables and pictures: right numbers in right places, files that are pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from sslzoo.batch import Batch
from sslzoo.callbacks.metrics_file import MetricsFile
from sslzoo.run.report import plot_curves, plot_views, read_metrics, results_table
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


def test_curves_are_drawn_with_and_without_accuracies(tmp_path: Path) -> None:
    plot_curves(_metrics(tmp_path), tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(PNG)
    (tmp_path / "empty.csv").write_text("step,epoch\n")
    plot_curves(tmp_path / "empty.csv", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_drawn_denormalised(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    shown = []
    original = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, image, **kwargs: (shown.append(image), original(self, image, **kwargs))
    )
    images = torch.rand(3, channels, 6, 6)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    normalised = (images - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    batch = Batch((normalised, normalised), (normalised[..., :3, :3],), torch.arange(3))
    plot_views(batch, tmp_path / "views.png", mean=mean, std=std, images=2)
    assert (tmp_path / "views.png").read_bytes().startswith(PNG)
    assert len(shown) == 2 * 3  # images x views
    torch.testing.assert_close(torch.from_numpy(shown[0]), images[0].permute(1, 2, 0).squeeze())


def test_the_table_shows_what_was_measured() -> None:
    summary = {
        "linear_top1": 0.8712,
        "linear_top5": 0.99,
        "knn_top1": 0.85,
        "pca_knn_top1": 0.837,
        "protocol": "frozen",
        "seconds": 200,
    }
    text = Console(width=120)
    with text.capture() as captured:
        text.print(results_table(summary))
    shown = captured.get()
    assert "87.1" in shown and "83.7" in shown and "3 min 20 s" in shown and "frozen" in shown
    assert "raw pixels" not in shown and "random" not in shown


def test_durations() -> None:
    assert [duration(s) for s in (9.6, 60, 3599.6, 7260)] == ["10 s", "1 min 0 s", "1 h 0 min", "2 h 1 min"]
