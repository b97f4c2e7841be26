"""A tiny encoder, generated images, and shrunken recipes for tests, so that a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from sslzoo.data.sources import FakeSource
from sslzoo.recipe.sections import (
    BackboneConfig,
    ConstantSchedule,
    EvalConfig,
    LoggingConfig,
    ProbeConfig,
    Recipe,
    SGDConfig,
    SpeedConfig,
    ViewConfig,
)

BATCH = 24  # samples per step: for 1, 2 or 3 processes and 1 or 2 micro-batches
PIXELS = 8  # of the largest view
CLASSES = 4
# Trainer keys for hardware and precision.
MACHINE = ("accelerator", "devices", "num_nodes", "precision", "sync_batchnorm", "max_epochs")


class TinyEncoder(nn.Sequential):
    """A convolution with batch norm, ReLU and global average pooling: images of any size to 16 features."""

    num_features = 16

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(in_channels, self.num_features, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.num_features),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def shrunk(recipe: Recipe, *, keep: Collection[str] = ()) -> Recipe:
    """``recipe`` with the same method but a tiny encoder, crops of a few pixels, steps of 24 samples, plain SGD and one
    epoch on the CPU. The sections named in ``keep`` are unchanged.

    Raises ``ConfigError`` if the method refuses the result.
    """
    largest = max(view.size for view in recipe.views)
    views = tuple(
        ViewConfig(
            size=max(view.size * PIXELS // largest, 4),
            scale=view.scale or (1.0, 1.0),
            role=view.role,
            count=view.count,
            flip_p=0.5,
        )
        for view in recipe.views
    )
    small = {
        "backbone": BackboneConfig(
            name=f"{TinyEncoder.__module__}:{TinyEncoder.__name__}", in_channels=len(recipe.data.mean)
        ),
        "views": views,
        "optim": SGDConfig(
            lr=0.05, lr_scaling="none", weight_decay=0.0, warmup_epochs=0, schedule=ConstantSchedule()
        ),
        "probe": ProbeConfig(holdout=0.3),
        "eval": EvalConfig(every_epochs=1, size=PIXELS, knn_k=3, knn_temperature=0.1, batch_size=64),
        "speed": SpeedConfig(),
        "logging": LoggingConfig(every_steps=2, checkpoint_every_steps=2),
        "data": replace(recipe.data, global_batch_size=BATCH, workers=0, classes=()),
        "trainer": {key: value for key, value in recipe.trainer.items() if key not in MACHINE}
        | {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    changes = {section: value for section, value in small.items() if section not in keep}
    return replace(recipe, analyses=(), **changes)


def small_images(recipe: Recipe, steps: int, *, labelled: bool = True) -> FakeSource:
    """Generated images for ``steps`` steps per epoch of ``recipe``, slightly larger than its views."""
    pixels = max(recipe.eval.size, *(view.size for view in recipe.views)) + 4
    count = steps * recipe.data.global_batch_size
    return FakeSource(count, len(recipe.data.mean), pixels, CLASSES if labelled else 0)
