"""Encoders by name: widths, stems, channels, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sslzoo.nn.backbones import build_backbone, parameter_count
from sslzoo.recipe.sections import BackboneConfig


def build(name: str, **options: Any) -> tuple[nn.Module, int]:
    return build_backbone(BackboneConfig(name=name, **options))


@pytest.mark.parametrize(
    ("name", "options", "size", "width"),
    [
        ("conv5", {"in_channels": 1}, 28, 256),
        ("conv5", {}, 20, 256),
        ("resnet18", {"stem": "cifar"}, 32, 512),
        ("resnet18", {"stem": "small", "in_channels": 1}, 32, 512),
        ("resnet18", {"in_channels": 4}, 64, 512),
        ("mobilenet_v3_small", {}, 64, 576),
        ("timm/resnet18", {"stem": "cifar", "in_channels": 1}, 32, 512),
        ("timm/vit_tiny_patch16_224", {"options": {"img_size": 32}}, 32, 192),
    ],
)
def test_pooled_features_of_the_stated_width(
    name: str, options: dict[str, Any], size: int, width: int
) -> None:
    model, got = build(name, **options)
    x = torch.randn(2, options.get("in_channels", 3), size, size)
    with torch.no_grad():
        assert model.eval()(x).shape == (2, width)
    assert got == width


def test_resnet50_is_torchvisions_without_its_classifier() -> None:
    model, width = build("resnet50")
    assert width == 2048
    assert parameter_count(model) == 25_557_032 - 2_049_000
    assert isinstance(model.fc, nn.Identity)


def test_conv5_has_half_a_million_parameters() -> None:
    assert parameter_count(build("conv5", in_channels=1)[0]) == 536_032


@pytest.mark.parametrize(("stem", "pooled"), [("cifar", False), ("small", True)])
def test_small_stems(stem: str, pooled: bool) -> None:
    model, _ = build("resnet18", stem=stem)
    conv = model.conv1
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    assert conv.bias is None
    assert isinstance(model.maxpool, nn.MaxPool2d) is pooled
    # torchvision's initialisation of a ResNet: fan-out, ReLU.
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_options_reach_the_constructor() -> None:
    model, _ = build("resnet18", options={"zero_init_residual": True})
    assert not model.layer1[0].bn2.weight.any()  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "did you mean resnet1"),
        ("timm/resnet19", {}, "did you mean timm/resnet1"),
        ("conv5", {"stem": "cifar"}, "stem must be left out: conv5"),
        ("conv5", {"options": {"x": 1}}, "conv5 has no options"),
        ("timm/vit_tiny_patch16_224", {"stem": "cifar"}, "needs a ResNet"),
        ("mobilenet_v3_small", {"in_channels": 1}, "in_channels needs a ResNet or a timm model"),
    ],
)
def test_refuses(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)
