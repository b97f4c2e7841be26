"""Every bundled recipe builds and passes one optimiser step on fake images, but for those that would do the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import recipes
from sslzoo.run.build import build_method, build_plan
from sslzoo.run.dry_run import dataset_size, one_step
from sslzoo.run.placement import world_size_of

# Of a family that differs in rates, lengths, devices and classes alone (see tests/recipe/test_header.py).
SAME = {"sce_in1k_100ep", "sce_in1k_300ep", "sce_in1k_1000ep", "simclr_in100", "mmcl_in100", "sogclr_in100"}


def test_there_are_recipes():
    assert {"quickstart", "sce_in1k", "simclr_cifar10"} | SAME <= set(recipes())


@pytest.mark.parametrize("name", sorted(recipes().keys() - SAME))
def test_builds_and_steps(name):
    recipe = load_recipe(name).recipe
    plan = build_plan(recipe, dataset_size(recipe), world_size_of(recipe))
    method = build_method(recipe, plan)
    before = {n: p.detach().clone() for n, p in method.backbone.named_parameters()}
    assert one_step(recipe, method) >= 4
    # A published schedule may start at a learning rate of 0: then the gradient is what moved.
    moved = sum(p.grad is not None and bool(p.grad.any()) for p in method.backbone.parameters())
    changed = sum(bool((p != before[n]).any()) for n, p in method.backbone.named_parameters())
    assert moved + changed > 0
    assert all(math.isfinite(p.abs().sum().item()) for p in method.parameters())


@pytest.mark.parametrize(
    ("name", "size"), [("sce_in1k", 1_281_167), ("sce_in100", 126_689), ("quickstart", 12_000)]
)
def test_a_dry_run_without_the_data_plans_with_its_nominal_size(name: str, size: int, tmp_path: Path) -> None:
    """Of a choice of classes, with that of the usual list: no better number is known without the folder."""
    overrides = [] if name == "quickstart" else [f"data.root={tmp_path / 'missing'}"]
    assert dataset_size(load_recipe(name, overrides).recipe) == size
