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
from sslzoo.evaluate import final, sgd_probe
from sslzoo.evaluate.figures import Measured
from sslzoo.evaluate.final import final_evaluation
from sslzoo.evaluate.task import Samples
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
    f"{features}{figure}"
    for features in ("", "random_init_", "raw_pixels_", "pca_")
    for figure in ("linear_top1", "linear_top5", "linear_l2", "sgd_top1", "sgd_top5", "sgd_lr", "knn_top1")
}
SAMPLES = Samples(96, 24, 120, 120, 0)
LAST = Measured(
    {"linear_top1": 0.5, "knn_top1": 0.4, "online_top1": 0.3, "linear_top1/data/projector": 0.25},
    {"data": SAMPLES},
    {"rankme": 7.5},
)


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


def _recipe(baselines: bool, bank_size: int | None) -> Recipe:
    return Recipe(
        seed=3,
        backbone=BackboneConfig(name="conv5", in_channels=1),
        method=MethodConfig(name="tiny"),
        data=DataConfig(dataset="fashion_mnist", global_batch_size=8, mean=(0.5,), std=(0.25,)),
        views=(ViewConfig(size=8, scale=(0.5, 1.0), count=2),),
        optim=SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0),
        probe=ProbeConfig(lrs=(0.1,) if baselines else ProbeConfig.lrs, holdout=0.2),
        eval=EvalConfig(
            every_epochs=1,
            size=8,
            knn_k=3,
            knn_temperature=0.1,
            batch_size=50,
            bank_size=bank_size,
            baselines=baselines,
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


def evaluated(
    folder: Path, *, baselines: bool, classes: int, bank_size: int | None = None, **changes: Any
) -> dict[str, Any]:
    recipe = _recipe(baselines, bank_size)
    plan = TrainingPlan(dataset_size=120, global_batch_size=8, max_epochs=1)
    datamodule = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, Brightness(120, classes)
    )
    method = Tiny(recipe.method, Seeing(), 64)
    method.backbone.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgd_probe, "STEPS", 100)
        result = final_evaluation(
            method,
            datamodule,
            recipe,
            folder=folder,
            seconds=12.34,
            **({"last": LAST, "initial": Blind} | changes),
        )
    assert method.backbone.training  # as it was
    assert json.loads((folder / "summary.json").read_text()) == result
    return result


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of four classes, with baselines."""
    return evaluated(tmp_path_factory.mktemp("eval"), baselines=True, classes=4)


def test_baselines_have_all_keys_and_stand_apart(summary: dict[str, Any]) -> None:
    assert set(summary) >= PROMISED
    assert summary["seconds"] == 12.3 and summary["seed"] == 3
    assert (
        summary["online_top1"] == 0.3 and summary["linear_top1/data/projector"] == 0.25
    )  # the last validation's
    for figure in ("linear_top1", "sgd_top1"):
        assert summary[figure] == summary[f"raw_pixels_{figure}"] > 0.9  # Seeing is raw pixels
        assert summary[f"random_init_{figure}"] < 0.6  # Blind is not
        assert summary[f"pca_{figure}"] > 0.9


def test_beside_each_accuracy_stand_its_interval_and_the_samples(summary: dict[str, Any]) -> None:
    accuracies = {key: value for key, value in summary.items() if "_top" in key}
    assert set(summary["interval_95"]) == set(accuracies)
    for key, value in accuracies.items():
        low, high = summary["interval_95"][key]
        assert 0 <= low <= value <= high <= 1 and 0.01 < high - low < 0.19
    (of,) = summary["data_sets"].values()
    assert of["dataset"] == "fashion_mnist"
    assert (of["n_train"] + of["n_held_out"], of["n_bank"], of["n_test"]) == (120, 120, 120)
    assert 0 < of["n_held_out"] < 60 and of["n_unreadable"] == 0


def test_a_smaller_bank_is_k_nns_alone(tmp_path: Path, summary: dict[str, Any]) -> None:
    cut = evaluated(tmp_path / "cut", baselines=True, classes=4, bank_size=5)
    assert cut["data_sets"]["data"]["n_bank"] == 5
    assert cut["knn_top1"] < summary["knn_top1"]
    for key in PROMISED:
        if "knn" not in key:
            assert cut[key] == summary[key], key


def test_the_protocol_says_what_was_run(tmp_path: Path, summary: dict[str, Any]) -> None:
    with_baselines = summary["data_sets"]["data"]
    for said in (
        "Linear: ",
        "SGD: ",
        "100 epochs",
        "rate of 0.1 chosen",
        "k-NN: the 3 nearest of 120",
        "Online: ",
    ):
        assert said in with_baselines["protocol"]
    assert f"on {with_baselines['n_held_out']} held-out" in with_baselines["protocol"]
    alone = evaluated(
        tmp_path / "without",
        baselines=False,
        classes=4,
        last=Measured({"knn_top1": 0.4}, {"data": SAMPLES}, {}),
    )["data_sets"]["data"]["protocol"]
    assert "k-NN" in alone
    assert not any(word in alone for word in ("Linear", "SGD", "Online", "onverged"))


def test_large_images_have_no_pixel_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final, "PIXEL_LIMIT", 63)
    summary = evaluated(tmp_path, baselines=True, classes=4)
    assert {key for key in summary if key.startswith(("raw", "pca"))} == set()
    assert "random_init_knn_top1" in summary


def test_without_baselines_the_last_validation_is_repeated(tmp_path: Path) -> None:
    summary = evaluated(tmp_path, baselines=False, classes=4)
    assert {k: v for k, v in summary.items() if "top" in k} == LAST.figures
    assert summary["representation"] == LAST.representation


@pytest.mark.parametrize("baselines", [True, False])
def test_unlabelled_data_says_what_was_not_measured(tmp_path: Path, baselines: bool) -> None:
    last = Measured({}, {}, {"std": 0.1, "rankme": 3.0})
    summary = evaluated(tmp_path, baselines=baselines, classes=0, last=last)
    assert not any("top" in key for key in summary)
    assert summary["representation"] == {"std": 0.1, "rankme": 3.0}
    assert summary["not_measured"] == (
        "linear probe and k-NN: fashion_mnist has no labels, and probe.data names no labelled data"
    )
