"""Representation metrics of a run: the same on any number of ranks, with and without labels, and after a resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.callbacks import evaluation as module
from sslzoo.callbacks.evaluation import FeatureEvaluation
from sslzoo.callbacks.representation import FIGURES, Representation
from sslzoo.data.disk import UnreadableImageError
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import FakeSource, ImageSource
from sslzoo.evaluate.representation import measure_plain
from sslzoo.method import SSLMethod
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, MethodConfig, ProbeConfig, ViewConfig
from sslzoo.testing.ranks import run_ranks
from tests.command import fork, write_recipe

SIZE = 97  # no multiple of ranks or batches
EVAL = EvalConfig(every_epochs=1, size=8, knn_k=5, knn_temperature=0.1, batch_size=10)


class Tiny(SSLMethod[MethodConfig]):
    Config = MethodConfig

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x)
        return {"backbone": h, "projector": h[:, :4] * torch.tensor([1.0, 2.0, 3.0, 4.0])}


class Torn(ImageSource):
    """Images without labels, the fourth of which cannot be read."""

    is_array = False

    def __init__(self) -> None:
        super().__init__("torn", "train", 1, None, ())
        self._images = FakeSource(SIZE, 1, 8, 0)

    def __len__(self) -> int:
        return SIZE

    def _identity(self) -> bytes:
        return b""

    def read(self, sample_id: int) -> Tensor:
        if sample_id == 3:
            raise UnreadableImageError("torn")
        return self._images.read(sample_id)


def _evaluated(
    rank: int, world: int, folder: Path, classes: int = 4, state: dict[str, Any] | None = None, step: int = 12
) -> tuple[dict[str, float], dict[str, Any]]:
    """The representation at an evaluation after ``step`` steps, whose weights are a function of the step, and the
    state afterwards."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(step)
    source = FakeSource(SIZE, 1, 8, classes) if classes else Torn()
    plan = TrainingPlan(dataset_size=SIZE, global_batch_size=12, max_epochs=3, world_size=world)
    view = ViewConfig(size=8, scale=(0.3, 1.0), count=2, flip_p=0.5)
    data = DataConfig(dataset="fake", global_batch_size=12, mean=(0.5,), std=(0.25,), max_bad_fraction=0.1)
    datamodule = SSLDataModule(data, (view,), EVAL, ProbeConfig(), plan, 0, source)
    method = Tiny(MethodConfig(name="tiny"), nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), 6)
    method.optimizer_steps = step
    trainer: Any = SimpleNamespace(
        datamodule=datamodule,
        is_global_zero=rank == 0,
        current_epoch=step // 4,
        precision_plugin=Precision(),
    )
    callback = FeatureEvaluation([], Representation(folder, seed=0), ProbeConfig(), EVAL, seed=0)
    callback.load_state_dict(state or {})
    logged: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "log_metrics", lambda trainer, values: logged.update(values))
        callback.setup(trainer, method, "fit")
        callback.on_validation_start(trainer, method)
        for i, loader in enumerate(datamodule.val_dataloader()):
            for n, raw in enumerate(loader):
                batch = datamodule.on_after_batch_transfer(datamodule.on_before_batch_transfer(raw, i), i)
                method.validation_step(batch, n, i)
                callback.on_validation_batch_end(trainer, method, None, batch, n, i)
        callback.on_validation_epoch_end(trainer, method)
    assert callback.latest is not None
    found = callback.latest.representation
    assert logged == {f"repr/{name}": value for name, value in found.items()}
    return found, callback.state_dict()


def test_all_figures_are_measured(tmp_path: Path) -> None:
    _, state = _evaluated(0, 1, tmp_path)
    assert set(_evaluated(0, 1, tmp_path, 4, state, 24)[0]) == set(FIGURES)
    found, state = _evaluated(0, 1, tmp_path, 0)
    assert set(found) == set(FIGURES) - {"separation", "overlap"}
    assert set(_evaluated(0, 1, tmp_path, 0, state, 24)[0]) == set(FIGURES) - {"separation"}


@pytest.mark.parametrize("classes", [4, 0])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_what_one_process_does(world: int, classes: int, tmp_path: Path) -> None:
    _, state = _evaluated(0, 1, tmp_path / "before", classes)
    alone, wanted = _evaluated(0, 1, tmp_path / "alone", classes, state, 24)
    for found, after in run_ranks(world, _evaluated, tmp_path / "ranks", classes, state, 24):
        assert found == pytest.approx(alone, rel=1e-6)
        for name, ids in wanted["neighbours"].items():
            assert torch.equal(after["neighbours"][name], ids)
    assert wanted["neighbours"]["sample_id"].tolist() == [i for i in range(SIZE) if classes or i != 3]
    assert _spectrum(tmp_path / "ranks") == pytest.approx(_spectrum(tmp_path / "alone"), rel=1e-4)


def _spectrum(folder: Path) -> list[float]:
    """All numbers of the file."""
    with (folder / "spectrum.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    return [float(cell) for row in rows for cell in row]


def test_the_plain_images_are_measured(tmp_path: Path) -> None:
    """Against the features of all images at once."""
    found, _ = _evaluated(0, 1, tmp_path, 0)
    torch.manual_seed(12)
    layer = nn.Linear(64, 6)
    ids = torch.tensor([i for i in range(SIZE) if i != 3])
    images = torch.stack([Torn().read(int(i)) for i in ids]).flatten(1) / 255
    x = layer((images - 0.5) / 0.25).double().detach()
    wanted = measure_plain(x, None, ids, torch.arange(len(ids))).figures
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_a_killed_run_leaves_no_row_twice(tmp_path: Path) -> None:
    _, state = _evaluated(0, 1, tmp_path / "killed")
    whole = _evaluated(0, 1, tmp_path / "killed", 4, state, 24)
    text = (tmp_path / "killed" / "spectrum.csv").read_text()
    _evaluated(0, 1, tmp_path / "killed", 4, state, 36)
    again = _evaluated(0, 1, tmp_path / "killed", 4, state, 24)  # from the checkpoint before it
    assert again[0] == whole[0] and "overlap" in again[0]
    assert (tmp_path / "killed" / "spectrum.csv").read_text() == text
    assert [line.partition(",")[0] for line in text.splitlines()] == ["step", "12", "24"]


def test_a_run_without_labels_ends_with_the_representation(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    images = tmp_path / "unlabelled"
    images.mkdir()
    for i in range(32):
        Image.fromarray(np.full((12, 12), 8 * i, dtype=np.uint8)).save(images / f"{i:02}.png")
    elsewhere = ("data.dataset=folder", f"data.root={images}", "probe={}", "trainer.max_epochs=2")
    command = fork(tmp_path, "fit", "--recipe", "tiny.yaml", "--out", tmp_path / "run", *elsewhere)
    assert command.wait() == 0, command.said
    assert "The features were not evaluated" in command.out
    assert "effective rank (RankMe)" in command.out and "class separation" not in command.out
    summary = json.loads((tmp_path / "run" / "eval" / "summary.json").read_text())
    of_projector = {
        name for name in FIGURES if name.startswith("embedding_")
    }  # which this method does not have
    assert set(summary["representation"]) == set(FIGURES) - {"separation"} - of_projector
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["repr/rankme"]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[-1]["repr/rankme"]) == summary["representation"]["rankme"]


def test_features_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(self: Tiny, x: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.backbone(x) * torch.nan}

    monkeypatch.setattr(Tiny, "features", spoilt)
    assert _evaluated(0, 1, tmp_path)[0] == {}
