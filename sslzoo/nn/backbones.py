"""Encoders by name: from torchvision, timm or a plug-in, or the built-in ``conv5``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslzoo.checks import did_you_mean, require
from sslzoo.nn.weights import load_file, read_state, timm_checked, weights_file
from sslzoo.recipe.registry import is_plugin, plugin
from sslzoo.recipe.sections import PRETRAINED, BackboneConfig

CLASSIFIERS = ("fc", "classifier", "heads", "head")  # its name in the models of torchvision


class Conv5(nn.Sequential):
    """Five 3x3 convolutions (32-64-128-128-256, strides 1-2-2-1-2), each with batch norm and ReLU, then global
    average pooling: 0.54 M parameters, 256 features."""

    num_features = 256

    def __init__(self, in_channels: int = 1) -> None:
        layers: list[nn.Module] = []
        for width, stride in ((32, 1), (64, 2), (128, 2), (128, 1), (self.num_features, 2)):
            layers.append(nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            in_channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.to(memory_format=torch.channels_last)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 256). Computes in channels-last format, which is faster on CPUs."""
        return super().forward(input.contiguous(memory_format=torch.channels_last))


def build_backbone(cfg: BackboneConfig, *, start: bool = True) -> tuple[nn.Module, int]:
    """Build the encoder, which maps (N, C, H, W) to pooled features (N, F), and return it with F.

    A plug-in, ``module:Class``, is called with ``in_channels`` and the options and must have ``num_features``. With
    ``start=False``, ``cfg.weights`` is not read, because the weights will come from a checkpoint.

    Raises ``ValueError`` for an unknown name (suggesting the closest), a stem that the encoder does not support, and
    weights that are missing or do not fit.
    """
    _check_known(cfg)
    path = weights_file(cfg) if start and cfg.weights is not None else None
    if path is not None and cfg.weights == PRETRAINED and cfg.name.startswith("timm/"):
        # Read here, because some versions of timm execute code in a file. npz files only contain arrays.
        own = {"file": str(path)} if path.suffix == ".npz" else {"state_dict": read_state(path)}
        with timm_checked(path, cfg):
            model, width = _timm(cfg, pretrained=True, pretrained_cfg_overlay=own)
        cast(Any, model).pretrained_cfg["state_dict"] = None  # copies of the encoder would copy it too
        return model, width
    model, width = _build(cfg)
    if path is not None:
        load_file(model, path, cfg)
    return model, width


def _check_known(cfg: BackboneConfig) -> None:
    if cfg.name == "conv5" or is_plugin(cfg.name):
        return
    if cfg.name.startswith("timm/"):
        import timm

        name = cfg.name.removeprefix("timm/")
        if not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models(), prefix="timm/")
            raise ValueError(f"backbone.name={cfg.name!r} is not in timm{hint}")
        return
    from torchvision import models

    names = models.list_models(module=models)
    if cfg.name not in names:
        hint = did_you_mean(cfg.name, ["conv5", *names])
        raise ValueError(f"backbone.name={cfg.name!r} is not in torchvision{hint} (timm's: timm/<name>)")


def _build(cfg: BackboneConfig) -> tuple[nn.Module, int]:
    if cfg.name == "conv5":
        return Conv5(cfg.in_channels), Conv5.num_features
    if is_plugin(cfg.name):
        model = plugin(cfg.name, "backbone.name")(cfg.in_channels, **cfg.options)
        width = getattr(model, "num_features", None)
        require(
            isinstance(model, nn.Module) and isinstance(width, int),
            f"backbone.name={cfg.name!r} must give a torch module with num_features, an integer",
        )
        return model, cast(int, width)
    if cfg.name.startswith("timm/"):
        model, width = _timm(cfg)
    else:
        model, width = _torchvision(cfg)
    if cfg.stem != "imagenet":
        _small_stem(model, cfg)
    return model, width


def _torchvision(cfg: BackboneConfig) -> tuple[nn.Module, int]:
    from torchvision import models

    with _taking(cfg):
        model = models.get_model(cfg.name, weights=None, **cfg.options)
    for head in CLASSIFIERS:
        if hasattr(model, head):
            width = _input_width(getattr(model, head))
            setattr(model, head, nn.Identity())
            break
    else:
        raise ValueError(f"backbone.name={cfg.name!r} has no classifier to remove; use timm/{cfg.name}")
    if cfg.in_channels != 3:
        require(
            cfg.name.startswith("res"), f"backbone.in_channels needs a ResNet or a timm model, got {cfg.name}"
        )
        _set(model, "conv1", _conv_like(model.conv1, in_channels=cfg.in_channels))  # type: ignore[arg-type]
    return model, width


def _timm(cfg: BackboneConfig, **start: Any) -> tuple[nn.Module, int]:
    import timm

    name = cfg.name.removeprefix("timm/")
    with _taking(cfg):
        model = timm.create_model(name, num_classes=0, in_chans=cfg.in_channels, **cfg.options, **start)
    width = model.num_features
    assert isinstance(width, int)
    return model, width


@contextmanager
def _taking(cfg: BackboneConfig) -> Iterator[None]:
    """Turn the ``TypeError`` of a constructor that rejects an option into a ``ValueError`` about the options."""
    try:
        yield
    except TypeError as error:
        require(len(cfg.options) == 0, f"backbone.options must be arguments of {cfg.name}: {error}")
        raise


def _input_width(head: nn.Module) -> int:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(f"no linear layer in the classifier {head}")


def _conv_like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """Return a new convolution like ``conv`` except for ``changes``, initialised as in torchvision's ResNets."""
    options: dict[str, Any] = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "bias": conv.bias is not None,
    }
    new = nn.Conv2d(**(options | changes))
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new


def _small_stem(model: nn.Module, cfg: BackboneConfig) -> None:
    """Replace the first convolution by a 3x3 one with stride 1; ``cifar`` also removes the max-pooling."""
    conv = getattr(model, "conv1", None)
    require(
        isinstance(conv, nn.Conv2d) and hasattr(model, "maxpool"),
        f"backbone.stem={cfg.stem} needs a ResNet, got {cfg.name}; use backbone.stem=imagenet",
    )
    _set(model, "conv1", _conv_like(conv, kernel_size=3, stride=1, padding=1))  # type: ignore[arg-type]
    if cfg.stem == "cifar":
        _set(model, "maxpool", nn.Identity())


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model, name, module)


def parameter_count(module: nn.Module) -> int:
    """Number of scalars in the parameters of ``module``."""
    return sum(p.numel() for p in module.parameters())
