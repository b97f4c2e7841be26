"""Features of the last layers of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sslzoo.protocols.protocol import Layers

DEEPEST = 4  # layers from the end


def last_layers(encoder: nn.Module) -> Layers:
    """Images -> features of the last layer and of the last four, by name.

    Vision transformers of timm: the class tokens, and the same followed by the mean of the last layer's patch tokens
    (``average``). ResNets, and other networks of timm: the mean over the positions of each stage. Any other encoder:
    its output alone.
    """
    if hasattr(encoder, "forward_intermediates"):
        tokens = (
            getattr(encoder, "num_prefix_tokens", 0) > 0 and getattr(encoder, "cls_token", None) is not None
        )
        return _Tokens(encoder) if tokens else _Stages(encoder)
    if all(hasattr(encoder, f"layer{i}") for i in range(1, 5)):
        return _ResNet(encoder)
    return lambda image: {"1 layer": encoder(image)}


class _Tokens:
    def __init__(self, encoder: nn.Module) -> None:
        self.encoder: Any = encoder

    def __call__(self, image: Tensor) -> Mapping[str, Tensor]:
        found = self.encoder.forward_intermediates(
            image,
            indices=DEEPEST,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        last = [prefix[:, 0] for _, prefix in found]
        average = found[-1][0].mean(1)
        one, four = last[-1], torch.cat(last, dim=1)
        return {
            "1 layer": one,
            "1 layer, average": torch.cat([one, average], dim=1),
            "4 layers": four,
            "4 layers, average": torch.cat([four, average], dim=1),
        }


class _Stages:
    def __init__(self, encoder: nn.Module) -> None:
        self.encoder: Any = encoder

    def __call__(self, image: Tensor) -> Mapping[str, Tensor]:
        return _pooled(self.encoder.forward_intermediates(image, indices=DEEPEST, intermediates_only=True))


class _ResNet:
    """A ResNet of torchvision."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, image: Tensor) -> Mapping[str, Tensor]:
        maps: list[Any] = []
        stages = [cast(nn.Module, getattr(self.encoder, f"layer{i}")) for i in range(1, 5)]
        hooks = [stage.register_forward_hook(lambda _, __, out: maps.append(out)) for stage in stages]
        try:
            self.encoder(image)
        finally:
            for hook in hooks:
                hook.remove()
        return _pooled(maps)


def _pooled(maps: list[Tensor]) -> dict[str, Tensor]:
    means = [x.mean((2, 3)) for x in maps]
    return {"1 layer": means[-1], "4 layers": torch.cat(means, dim=1)}
