"""The summary of a run: every promised key, the right encoder in the right row, no crash without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import FakeSource
from sslzoo.evaluate import final
from sslzoo.evaluate.final import final_evaluation
from sslzoo.method import SSLMethod
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import (
    BackboneConfig,
    DataConfig,
    EvalConfig,
    MethodConfig,
    ProbeConfig,
    Recipe,
    SGDConfig,
    ViewConfig,
)

PROMISED = {
    "linear_top1",
    "linear_top5",
    "logistic_top1",
    "knn_top1",
    "raw_pixels_linear_top1",
    "raw_pixels_knn_top1",
    "pca_linear_top1",
    "pca_knn_top1",
    "random_init_linear_top1",
    "random_init_knn_top1",
    "online_linear_top1",
    "protocol",
    "seconds",
    "seed",
}
ONLINE = {"val/linear_top1": 0.5, "val/linear_top5": 0.9, "val/knn_top1": 0.4, "train/loss": 3.0}


class Tiny(SSLMethod[MethodConfig]):
    Config = MethodConfig

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError


class Blind(nn.Module):
    """Sees one pixel: little can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x.flatten(1)[:, :1] * self.weight


class Seeing(Blind):
    """Sees every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x.flatten(1)


def _recipe(baselines: bool) -> Recipe:
    return Recipe(
        seed=3,
        backbone=BackboneConfig(name="conv5", in_channels=1),
        method=MethodConfig(name="tiny"),
        data=DataConfig(dataset="fashion_mnist", global_batch_size=8, mean=(0.5,), std=(0.25,)),
        views=(ViewConfig(size=8, scale=(0.5, 1.0), count=2),),
        optim=SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0),
        probe=ProbeConfig(lrs=(0.1,), holdout=0.2),
        eval=EvalConfig(
            every_epochs=1, size=8, knn_k=3, knn_temperature=0.1, batch_size=50, baselines=baselines
        ),
        trainer={"max_epochs": 1},
    )


class Brightness(FakeSource):
    """Images whose class is the brightness of their top rows, under noise."""

    def __init__(self, n: int, classes: int) -> None:
        super().__init__(n, 1, 8, classes)
        if self.labels is not None:
            self.images = self.images // 4
            self.images[:, 0, 4:] += (self.labels[:, None, None] * 40).astype("uint8")

    def sibling(self, split: str, num_classes: int) -> FakeSource:
        return Brightness(120, num_classes)


def evaluated(folder: Path, *, baselines: bool, classes: int, **changes: Any) -> dict[str, Any]:
    recipe = _recipe(baselines)
    plan = TrainingPlan(dataset_size=120, global_batch_size=8, max_epochs=1)
    datamodule = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, Brightness(120, classes)
    )
    method = Tiny(recipe.method, Seeing(), 64)
    method.backbone.train()
    result = final_evaluation(
        method,
        datamodule,
        recipe,
        folder=folder,
        seconds=12.34,
        **({"online": ONLINE, "initial": Blind} | changes),
    )
    assert method.backbone.training  # as it was
    assert json.loads((folder / "summary.json").read_text()) == result
    return result


def test_baselines_have_all_keys_and_stand_apart(tmp_path: Path) -> None:
    summary = evaluated(tmp_path / "eval", baselines=True, classes=4)
    assert set(summary) >= PROMISED
    assert all(0 <= v <= 1 for k, v in summary.items() if "top" in k)
    assert summary["seconds"] == 12.3 and summary["seed"] == 3
    assert summary["online_linear_top1"] == 0.5  # not the frozen one's
    assert summary["linear_top1"] == summary["raw_pixels_linear_top1"] > 0.9  # Seeing is raw pixels
    assert summary["random_init_linear_top1"] < 0.6  # Blind is not
    assert summary["pca_linear_top1"] > 0.9
    assert "held-out" in summary["protocol"]


def test_large_images_have_no_pixel_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final, "PIXEL_LIMIT", 63)
    summary = evaluated(tmp_path, baselines=True, classes=4)
    assert {key for key in summary if key.startswith(("raw", "pca"))} == set()
    assert "random_init_knn_top1" in summary


def test_without_baselines_the_online_figures_are_repeated(tmp_path: Path) -> None:
    summary = evaluated(tmp_path, baselines=False, classes=4)
    assert {k: v for k, v in summary.items() if "top" in k} == {
        "linear_top1": 0.5,
        "linear_top5": 0.9,
        "knn_top1": 0.4,
        "online_linear_top1": 0.5,
    }
    assert summary["protocol"].startswith("online")


@pytest.mark.parametrize("baselines", [True, False])
def test_unlabelled_data_says_so(tmp_path: Path, baselines: bool) -> None:
    summary = evaluated(tmp_path, baselines=baselines, classes=0, online={"train/loss": 3.0})
    assert not any("top" in key for key in summary)
    assert "labels" in summary["protocol"]
