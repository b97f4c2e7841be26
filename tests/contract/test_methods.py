"""What every registered method owes the framework, on its smallest bundled recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sslzoo.batch import Batch
from sslzoo.data.sources import fake_source
from sslzoo.method import SSLMethod
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import method_class, methods, recipes
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import build_experiment

N = 8


def _built(name: str) -> tuple[Recipe, SSLMethod[Any], Batch]:
    """The method ``name`` on its ``*_fashion_mnist`` recipe, and a batch of fake images."""
    recipe = load_recipe(f"{name}_fashion_mnist", [f"data.global_batch_size={N}"]).recipe
    experiment = build_experiment(recipe, source=fake_source(N, 1, 28, 10))
    return recipe, experiment.method, experiment.data.example_batch(N)


@pytest.mark.parametrize("name", methods())
def test_has_a_small_recipe_a_config_and_a_card(name):
    assert f"{name}_fashion_mnist" in recipes()
    cls = method_class(name)
    assert issubclass(cls, SSLMethod)
    assert cls.Config.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", methods())
def test_publishes_detached_backbone_features(name):
    _, method, batch = _built(name)
    loss = method.loss(batch)
    assert loss.shape == ()
    assert loss.isfinite()
    features = method.published["backbone"]
    assert features.shape == (N, method.feature_dim)
    assert not any(layer.requires_grad for layer in method.published.values())
    trained = {name: layer.shape for name, layer in method.published.items()}
    assert tuple(trained) == method.cfg.published_layers
    seen = method.features(batch.global_views[0])
    assert {name: layer.shape for name, layer in seen.items()} == trained
    assert all(not v.requires_grad for v in method.recorded.values())
    assert all(key.startswith("method/") for key in (*method.recorded, *method.settings))


def test_measurements_are_tensors_and_settings_numbers():
    _, method, _ = _built("simclr")
    with pytest.raises(ValueError, match=r"record takes a tensor, got method/tau = 0.1; use setting"):
        method.record("method/tau", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got a tensor for method/tau; use record"):
        method.setting("method/tau", torch.tensor(0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", methods())
def test_the_loss_reaches_the_backbone(name):
    _, method, batch = _built(name)
    method.loss(batch).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in method.backbone.parameters())


@pytest.mark.parametrize("name", methods())
def test_bf16_autocast_is_finite_and_close(name):
    _, full, batch = _built(name)
    _, half, _ = _built(name)
    expected = full.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = half.loss(batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
    # bf16 carries 8 bits: features are off by about 1 %, and a loss amplifies that by its sharpness.
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", methods())
def test_the_same_seed_builds_the_same_method(name):
    _, a, _ = _built(name)
    torch.rand(3)  # the global generator's place must not matter
    _, b, _ = _built(name)
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), key


@pytest.mark.parametrize("name", methods())
def test_evaluation_changes_nothing(name):
    _, method, batch = _built(name)
    method.eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with torch.no_grad():
        features = method.features(batch.global_views[0])
    assert features["backbone"].shape == (N, method.feature_dim)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
