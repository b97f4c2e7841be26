"""Backbone and projector as one module that maps views to embeddings, for crops and for colour channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from sslzoo.checks import require
from sslzoo.nn.numerics import normalize
from sslzoo_methods.metaug.color import Constants, normalized
from sslzoo_methods.metaug.config import ColorSpace


def reinitialised(backbone: nn.Module, channels: int) -> nn.Module:
    """A copy of ``backbone`` for ``channels`` input channels, reinitialised with torch's defaults."""
    new = copy.deepcopy(backbone)
    first = next((m for m in new.modules() if isinstance(m, nn.Conv2d)), None)
    require(
        first is not None and first.groups == 1,
        "method.views color needs a backbone that begins with a convolution",
    )
    assert first is not None
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    for module in new.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return new


class ThreeViewBackbone(nn.Module):
    """Three encoders of an RGB image in [0, 1], converted to another colour space: one for the first channel, one
    for the other two, one for all three. Output (N, 3F): their concatenated features."""

    def __init__(self, backbone: nn.Module, color_space: ColorSpace) -> None:
        super().__init__()
        self.color_space: ColorSpace = color_space
        self._constants = Constants()
        self.parts = nn.ModuleList(reinitialised(backbone, channels) for channels in (1, 2, 3))

    def each(self, rgb: Tensor) -> list[Tensor]:
        """The features (N, F) of each encoder."""
        x = normalized(rgb, self.color_space, self._constants)
        return [part(view) for part, view in zip(self.parts, (x[:, :1], x[:, 1:], x), strict=True)]

    def forward(self, rgb: Tensor) -> Tensor:
        """The concatenated features (N, 3F)."""
        return torch.cat(self.each(rgb), dim=1)


class Network(nn.Module):
    """Maps views to backbone features and normalised embeddings; its parameters are theta.

    Created when needed, around modules that belong to the method. Consecutive views of the same size are batched
    and share batch-norm statistics.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(
        self, views: Sequence[Tensor], passed: Sequence[Tensor] | None = None
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Backbone features, one tensor per forward pass, and an embedding (N, D) per view. If ``passed``, the backbone
        features from an earlier call, is given, only the projector runs."""
        if isinstance(self.backbone, ThreeViewBackbone):
            assert isinstance(self.projector, nn.ModuleList)
            passed = passed or self.backbone.each(views[0])
            return passed, [normalize(p(h)) for p, h in zip(self.projector, passed, strict=True)]
        groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape)]
        passed = passed or [self.backbone(torch.cat(group)) for group in groups]
        outputs = [
            z for group, h in zip(groups, passed, strict=True) for z in self.projector(h).chunk(len(group))
        ]
        return passed, [normalize(z) for z in outputs]
