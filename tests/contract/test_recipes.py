"""Every bundled recipe goes through a dry run's epoch, but for those that would do the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import Recipe
from sslzoo.run.dry_run import build_rehearsal, known_of_data, train
from sslzoo_methods.metaug.alexnet import HalfAlexNet

# Of a family that differs in rates, lengths, devices and classes alone (see tests/recipe/test_header.py), in the size
# of its crops (Tiny-ImageNet), or, like MetAug's on ImageNet-100, in an optimiser that another of the method has.
SAME = {
    "sce_in1k_100ep",
    "sce_in1k_300ep",
    "sce_in1k_1000ep",
    "simclr_in100",
    "mmcl_in100",
    "sogclr_in100",
    "metaug_in100",
    "mmcl_tiny_imagenet",
    "sce_tiny_imagenet",
    "simclr_tiny_imagenet",
    "sogclr_tiny_imagenet",
}
SIZE = 32
FEATURES = 64  # of the last layer of MetAug's AlexNets; evaluations factorise matrices of that width


def test_there_are_recipes():
    assert {"quickstart", "sce_in1k", "simclr_cifar10"} | SAME <= set(recipes())


def smaller(name: str) -> tuple[Recipe, int]:
    """The recipe with large crops shrunk, unless the encoder takes images of one size, and a number of images."""
    recipe = load_recipe(name).recipe
    if "vit" in recipe.backbone.name or recipe.backbone.name.endswith("AlexNet"):
        return recipe, 2
    sizes = [f"views.{i}.size={SIZE}" for i, view in enumerate(recipe.views) if view.size > SIZE]
    sizes += [f"eval.size={min(recipe.eval.size, SIZE)}", "eval.resize=null"]
    splits = getattr(recipe.method, "momentum_batchnorm", None) == "split"
    return load_recipe(name, sizes).recipe, 8 if splits else 4


@pytest.mark.parametrize("name", sorted(recipes().keys() - SAME))
def test_trains_evaluates_and_saves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HalfAlexNet, "num_features", FEATURES)
    recipe, images = smaller(name)
    built = build_rehearsal(recipe, tmp_path, images=images)
    reached: list[bool] = []  # a published schedule may start at a learning rate of 0
    for p in built.method.backbone.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: reached.append(bool(p.grad.any())))  # type: ignore[union-attr]
    train(built)
    assert any(reached)
    assert all(math.isfinite(p.abs().sum().item()) for p in built.method.parameters())
    assert "val/knn_top1" in built.callbacks.meter.latest


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sce_in1k", (1_281_167, 1000)),
        ("sce_in100", (126_689, 100)),
        ("quickstart", (12_000, 10)),
        ("sce_stl10", (105_000, 0)),
    ],
)
def test_a_dry_run_without_the_data_plans_with_its_nominal_size(
    name: str, known: tuple[int, int], tmp_path: Path
) -> None:
    """Of a choice of classes, with that of the usual list: no better number is known without the folder."""
    overrides = [] if name == "quickstart" else [f"data.root={tmp_path / 'missing'}"]
    assert known_of_data(load_recipe(name, overrides).recipe) == known
