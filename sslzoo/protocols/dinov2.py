"""The grid of linear classifiers of DINOv2: learning rates x layers x pooling, all trained in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

if TYPE_CHECKING:
    from torch import nn

    from sslzoo.protocols.protocol import Layers


def _layers(encoder: nn.Module) -> Layers:
    from sslzoo.protocols.layers import last_layers

    return last_layers(encoder)


DINOV2_GRID = ViewProtocol(
    name="dinov2_grid",
    source="DINOv2 (arXiv:2304.07193), official code, dinov2/eval/linear.py",
    summary="13 rates x layers x pooling, SGD, 10 epochs, chosen on held-out images",
    remarks=(
        "The authors train on all training images and report the classifier that is best on the test images: that is "
        "'best' here. Their epoch is 1,250 steps on any data set; here it is one pass. Their encoder runs in half "
        "precision. They only define layers for vision transformers."
    ),
    reported="best",
    view=ViewConfig(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip_p=0.5),
    plain=PlainView(size=224, resize=256, interpolation="bicubic"),
    initial="normal",
    lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    lr_scaling="linear",
    schedule="cosine",
    batch_size=1024,
    keep_last=False,
    epochs=10,
    held_out=True,
    layers=_layers,
)
