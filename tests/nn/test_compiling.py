"""Compiled code computes the same, keeps the names of weights, and losses are traced as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.method import SSLMethod
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.sections import Compiler, SpeedConfig
from sslzoo.run.build import build_experiment
from sslzoo.testing.small import small_images
from tests.contract.test_methods import METHODS, recipe_of

ROWS = 8


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def built(name: str, compiler: Compiler | None) -> tuple[SSLMethod, Batch]:
    recipe = replace(recipe_of(name, ""), speed=SpeedConfig(compile=compiler))
    experiment = build_experiment(recipe, source=small_images(recipe, 2))
    return experiment.method, experiment.data.example_batch(ROWS)


def two_steps(name: str, compiler: Compiler | None) -> tuple[list[Tensor], list[str]]:
    """Losses and gradients of two steps, and the names of all state."""
    method, batch = built(name, compiler)
    losses = []
    for _ in range(2):
        loss = method.step_loss(batch)
        loss.backward()
        method.after_step(0)
        losses.append(loss.detach())
    return losses + [p.grad for p in method.parameters() if p.grad is not None], list(method.state_dict())


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("simclr", "aot_eager"),
        pytest.param("sce", "aot_eager", marks=pytest.mark.slow),
        pytest.param("mmcl", "eager", marks=pytest.mark.slow),
        pytest.param("sogclr", "eager", marks=pytest.mark.slow),
        pytest.param("margin", "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_the_same(name: str, compiler: Compiler) -> None:
    plain, names = two_steps(name, None)
    compiled, others = two_steps(name, compiler)
    assert names == others
    rounding = 1e-5 if name == "mmcl" else 0.0
    torch.testing.assert_close(compiled, plain, rtol=rounding, atol=rounding)


def test_encoders_and_losses_are_compiled() -> None:
    torch._dynamo.utils.counters.clear()
    method, batch = built("sce", "eager")
    method.step_loss(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    momentum = method.get_submodule("momentum_encoder.layers")
    assert isinstance(momentum, nn.ModuleList)
    assert all(module._compiled_call_impl is not None for module in (method.backbone, momentum[0]))


@pytest.mark.parametrize("name", METHODS)
def test_torch_traces_each_loss_as_a_whole(name: str) -> None:
    method, batch = built(name, None)
    method.loss(batch)  # checks of the first step
    found = torch._dynamo.explain(method.loss)(batch)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_what_torch_cannot_compile_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"speed\.compile: must be left out: metaug differentiates twice"):
        load_recipe("metaug_fashion_mnist", ["speed.compile=eager"])
    with pytest.raises(RecipeError, match=r"speed\.compile: must be null with activation_checkpointing"):
        load_recipe("simclr_in1k", ["speed.compile=inductor", "speed.activation_checkpointing=true"])
