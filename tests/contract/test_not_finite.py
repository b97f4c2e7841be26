"""Numbers that are not finite: what the framework does with them, whatever the method. The contract has the methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sslzoo.exits import Diverged
from sslzoo.recipe.sections import Recipe
from sslzoo.testing.contract import small_recipe
from sslzoo.testing.course import train
from tests.chaos import Tiny, TinyBackbone, TinyConfig

BAD = 2  # the step that meets the image


def _recipe(**trainer: object) -> Recipe:
    recipe = small_recipe("simclr", overrides=["method.projector.widths=[16, 8]"])
    return replace(recipe, trainer=recipe.trainer | trainer)


def test_a_skipped_step_is_in_no_row(tmp_path: Path) -> None:
    recipe = _recipe()
    recipe = replace(recipe, probe=replace(recipe.probe, online=True))
    course = train(recipe, tmp_path, steps=5, labelled=True, fp16=True, spoilt=(BAD, 0))
    assert course.skipped == [step == BAD for step in range(5)]
    text = (tmp_path / "metrics.csv").read_text()
    assert "nan" not in text and "inf" not in text
    before, after = course.states[BAD], course.states[BAD + 1]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(name.startswith("probe.") for name in before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_a_scaler_the_run_ends(precision: str, tmp_path: Path) -> None:
    assert train(_recipe(precision=precision), tmp_path, steps=5, spoilt=(BAD, 0)).diverged


def test_a_scale_that_no_longer_helps_ends_the_run() -> None:
    method = Tiny(TinyConfig(name="tiny"), TinyBackbone(1), TinyBackbone.num_features)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-13)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    plugin = SimpleNamespace(scaler=scaler)
    method._trainer = SimpleNamespace(precision_plugin=plugin, optimizers=[optimizer])  # type: ignore[assignment]

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    assert method.attempt(lambda: step(1.0))
    assert not method.attempt(lambda: step(torch.nan))
    with pytest.raises(Diverged, match="overflows at any loss scale, even 3"):
        method.attempt(lambda: step(torch.inf))
