"""The encoder of the official MetAug code."""

from __future__ import annotations

from torch import nn


class HalfAlexNet(nn.Sequential):
    """AlexNet at half width with batch norm, up to the first fully connected layer: 224 px input, 2048 features.

    The encoder of contrastive multiview coding (arXiv:1906.05849) and later work, for any number of input
    channels. Its further layers, called fc7 and fc8 there, belong to the projector here.
    """

    num_features = 2048

    def __init__(self, in_channels: int = 3) -> None:
        # (width, kernel, stride, padding, max-pool after it)
        convolutions = (48, 11, 4, 2, True), (128, 5, 1, 2, True), (192, 3, 1, 1, False)
        convolutions += (192, 3, 1, 1, False), (128, 3, 1, 1, True)
        layers: list[nn.Module] = []
        for width, kernel, stride, padding, pool in convolutions:
            layers.append(nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(3, 2)] * pool
            in_channels = width
        fc6 = nn.Linear(in_channels * 6 * 6, self.num_features)
        super().__init__(*layers, nn.Flatten(), fc6, nn.BatchNorm1d(self.num_features), nn.ReLU(inplace=True))
