"""Activation checkpointing changes nothing but memory; the channels-last layout changes results by rounding only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.speed import Checkpointed, speed_up
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.sections import BackboneConfig, SpeedConfig
from sslzoo.run.memory import PeakMemory

ENCODERS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "timm/resnet18": {"options": {"drop_path_rate": 0.5}},
    "timm/vit_tiny_patch16_224": {"options": {"img_size": 32, "depth": 4, "proj_drop_rate": 0.3}},
}
CHECKPOINTING = SpeedConfig(activation_checkpointing=True)
CHANNELS_LAST = SpeedConfig(channels_last=True)


def encoder(name: str, speed: SpeedConfig) -> nn.Module:
    torch.manual_seed(0)
    model, _ = build_backbone(BackboneConfig(name=name, **ENCODERS.get(name, {})))
    speed_up(model, speed, name=name)
    return model


def step(model: nn.Module) -> tuple[Tensor, int]:
    """The loss of two views after its backward pass, and the bytes that it held at most."""
    torch.manual_seed(1)
    views = torch.randn(2, 8, 3, 32, 32).unbind()
    with PeakMemory() as memory:
        a, b = (model(view) for view in views)
        loss = (a * b).square().mean()
        loss.backward()
    return loss.detach(), memory.peak


@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_needs_less_memory_and_changes_no_bit(name: str) -> None:
    plain, lean = encoder(name, SpeedConfig()), encoder(name, CHECKPOINTING)
    loss, held = step(plain)
    after = torch.rand(1)
    lean_loss, lean_held = step(lean)
    assert torch.equal(torch.rand(1), after)  # random numbers are drawn once
    assert torch.equal(lean_loss, loss)
    assert lean_held < held
    state = lean.state_dict()  # running statistics were updated once
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    for p, q in zip(plain.parameters(), lean.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_channels_last_changes_rounding_only() -> None:
    plain, fast = (encoder("resnet18", speed).double() for speed in (SpeedConfig(), CHANNELS_LAST))
    assert list(fast.state_dict()) == list(plain.state_dict())
    views = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64).unbind()
    for model in (plain, fast):
        (model(views[0]) * model(views[1])).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert q.ndim < 4 or q.is_contiguous(memory_format=torch.channels_last), name
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value)


def test_a_momentum_encoder_computes_with_its_own_blocks() -> None:
    online = encoder("resnet18", SpeedConfig(channels_last=True, activation_checkpointing=True))
    momentum = MomentumEncoder(online)
    view = torch.randn(2, 3, 32, 32)
    before = momentum(view)
    with torch.no_grad():
        for p in online.parameters():
            p.zero_()
    torch.testing.assert_close(momentum(view), before)
    copied = momentum.layers[0]
    assert isinstance(copied.layer1, Checkpointed)
    assert copied.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/mobilenetv3_small_050"])
def test_encoders_without_known_blocks_refuse_checkpointing(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"speed\.activation_checkpointing needs a ResNet or a timm model without"
    ):
        encoder(name, CHECKPOINTING)


def test_keys_that_would_do_nothing_or_fail_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"speed\.channels_last: must be false with backbone\.name=conv5"):
        load_recipe("simclr_fashion_mnist", ["speed.channels_last=true"])
    with pytest.raises(
        RecipeError, match=r"speed\.activation_checkpointing: must be left out: metaug differentiates twice"
    ):
        load_recipe("metaug_fashion_mnist", ["speed.activation_checkpointing=true"])
