"""The cost of MetAug's bilevel step relative to a plain encoder step.

    python benchmarks/metaug_step.py

ResNet-18 with the CIFAR stem and generators of the official size, on random images. One thread; the variants run
in turn; medians of CPU time.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch
from measure import Result, alternating, ratio, report

from sslzoo.batch import Batch
from sslzoo.nn.backbones import build_backbone
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import BackboneConfig, HeadConfig, SGDConfig
from sslzoo_methods.metaug.config import (
    SGD,
    GeneratorConfig,
    MarginConfig,
    MetaConfig,
    MetAugConfig,
    SeparateTerms,
)
from sslzoo_methods.metaug.method import MetAug

META = MetaConfig(virtual_lr=1e-3, optimizer=SGD(lr=0.03, weight_decay=1e-4))
CONFIG = MetAugConfig(
    name="metaug",
    projector=HeadConfig(widths=(2048, 128)),
    generator=GeneratorConfig(hidden=(2048, 2048)),
    terms=SeparateTerms(generated_weight=1e-5),
    margin=MarginConfig(weight=1e-11, positive_weight=1e-4),
    meta=META,
)
# Variant -> maximum additional cost, relative to the plain step.
FORMS = {
    "second order": (META, 4.5),
    "first order": (replace(META, order=1), None),
    "projector": (replace(META, virtual_params="projector"), 0.6),
}
OPTIM = SGDConfig(lr=0.03, lr_scaling="none", weight_decay=5e-4, warmup_epochs=0)


def measure(batch_size: int = 16, size: int = 32, rounds: int = 3) -> list[Result]:
    """The time of the meta step in addition to that of the plain step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone, width = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
    method = MetAug(CONFIG, backbone, width)
    plan = TrainingPlan(dataset_size=batch_size, global_batch_size=batch_size, max_epochs=1)
    method.prepare(plan, OPTIM, 0)
    encoder, generators = method.configure_optimizers()
    views = tuple(torch.randn(batch_size, 3, size, size) for _ in range(2))
    batch = Batch(views, (), torch.arange(batch_size))

    def plain() -> None:
        encoder.zero_grad()
        method.loss(batch).backward()
        encoder.step()

    def meta(cfg: MetaConfig) -> None:
        method.meta_step(batch, generators, cfg)

    contenders = {"plain": plain} | {name: partial(meta, cfg) for name, (cfg, _) in FORMS.items()}
    seconds = alternating(contenders, rounds)
    return [
        Result(
            work=f"MetAug's meta step, {name}",
            baseline="plain step",
            value=ratio(seconds, name, "plain"),
            at_most=most,
        )
        for name, (_, most) in FORMS.items()
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
