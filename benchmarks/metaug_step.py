"""The cost of MetAug's bilevel step relative to a plain encoder step.

ResNet-18 with the CIFAR stem and generators of the official size, on random images. One thread; the variants run
in turn; medians of CPU time.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from measure import alternating, ratio

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


def main() -> int:
    """Print the table; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone, width = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
    method = MetAug(CONFIG, backbone, width)
    plan = TrainingPlan(dataset_size=args.batch, global_batch_size=args.batch, max_epochs=1)
    method.prepare(plan, OPTIM, 0)
    encoder, generators = method.configure_optimizers()
    views = tuple(torch.randn(args.batch, 3, args.size, args.size) for _ in range(2))
    batch = Batch(views, (), torch.arange(args.batch))

    def plain() -> None:
        encoder.zero_grad()
        method.loss(batch).backward()
        encoder.step()

    def meta(cfg: MetaConfig) -> None:
        method.meta_step(batch, generators, cfg)

    contenders = {"plain": plain} | {name: partial(meta, cfg) for name, (cfg, _) in FORMS.items()}
    seconds = alternating(contenders, args.rounds)
    print(f"MetAug's steps, ResNet-18, {args.size} px, batch {args.batch}, two crops, one thread")
    print(f"  {'plain':12} {median(seconds['plain']):6.2f} s CPU")
    kept = True
    for name, (_, most) in FORMS.items():
        over = ratio(seconds, name, "plain")
        promise = f" (at most {most})" if most else ""
        print(f"  {name:12} {median(seconds[name]):6.2f} s CPU, {over:.2f}x the plain step on top{promise}")
        kept = kept and (most is None or over <= most)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
