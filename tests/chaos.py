"""A tiny method with everything that a resume can lose, as a job to be killed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.distributed import gather_detached
from sslzoo.method import SSLMethod
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.queue import FeatureQueue
from sslzoo.recipe.sections import (
    AdamConfig,
    BackboneConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    MethodConfig,
    ProbeConfig,
    Recipe,
    ViewConfig,
)
from sslzoo.testing.kills import Job


class TinyConfig(MethodConfig):
    """Nothing to set."""


class Tiny(SSLMethod[TinyConfig]):
    """Dropout, an EMA copy, a queue, and one tensor of its own between loss and step."""

    Config = TinyConfig

    def __init__(self, cfg: TinyConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.head = nn.Sequential(nn.Linear(feature_dim, 8), nn.Dropout(0.2))
        self.target = MomentumEncoder(self.backbone, self.head)
        self.queue = FeatureQueue(40, 8)
        self.keys: Tensor | None = None

    def loss(self, batch: Batch) -> Tensor:
        """InfoNCE against the queue."""
        first, second = batch.global_views
        h = self.backbone(first)
        self.publish(backbone=h)
        online = F.normalize(self.head(h), dim=1)
        keys = F.normalize(self.target(second), dim=1)
        self.keys = gather_detached(keys)
        positive = (online * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, online @ self.queue.features.clone().T], dim=1) / 0.2
        self.record("method/positive", positive.mean())
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    def after_step(self, step: int) -> None:
        """EMA, and the last micro-batch's keys."""
        assert self.keys is not None
        self.target.update(self.backbone, self.head, coefficient=0.9)
        self.queue.push(self.keys)


class TinyBackbone(nn.Sequential):
    """A layer on images of 8 px."""

    num_features = 16

    def __init__(self, in_channels: int) -> None:
        width = self.num_features
        super().__init__(nn.Flatten(), nn.Linear(in_channels * 64, width), nn.BatchNorm1d(width), nn.ReLU())


def tiny_job(*, world: int = 1, accumulate: int = 1, epochs: int = 3, pause: float = 0.0) -> Job:
    """Epochs of six steps of the tiny method."""
    recipe = Recipe(
        seed=3,
        backbone=BackboneConfig(name="tests.chaos:TinyBackbone", in_channels=1),
        method=TinyConfig(name="tests.chaos:Tiny"),
        data=DataConfig(dataset="fake", global_batch_size=16, mean=(0.5,), std=(0.25,)),
        views=(ViewConfig(size=8, scale=(0.3, 1.0), count=2, flip_p=0.5),),
        optim=AdamConfig(name="adamw", lr=0.01, lr_scaling="none", weight_decay=0.01, warmup_epochs=1),
        probe=ProbeConfig(online=True, lrs=(0.1, 1.0)),
        eval=EvalConfig(every_epochs=1, size=8, knn_k=5, knn_temperature=0.1, batch_size=32),
        logging=LoggingConfig(every_steps=4, checkpoint_every_steps=3, keep_epochs=(2,)),
        trainer={
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": world,
            "accumulate_grad_batches": accumulate,
        },
        name="tiny",
    )
    return Job(recipe=recipe, samples=100, pause=pause)
