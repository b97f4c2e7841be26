"""An encoder so small that a run costs next to nothing, and which an export can load: it needs nothing of sslzoo."""

from __future__ import annotations

from torch import nn


class TinyEncoder(nn.Sequential):
    """One strided convolution with batch norm and ReLU: 16 features."""

    num_features = 16

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, self.num_features, 3, stride=2, bias=False),
            nn.BatchNorm2d(self.num_features),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
