"""The cost of a margin relative to the same loss without one, and of the chunked form relative to the dense one.

    python benchmarks/margin_loss.py

One thread; the forms run in turn; medians of the ratios. Memory is measured for each form in a separate process.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from measure import Result, alternating, extra_mebibytes, products_of_similarities, ratio, report
from torch import Tensor

from sslzoo.batch import Batch
from sslzoo.nn.backbones import build_backbone
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import BackboneConfig, HeadConfig, SGDConfig
from sslzoo_methods.margin.config import (
    Combined,
    Effects,
    Family,
    Isolated,
    MarginConfig,
    NoMargin,
    SimCLRConfig,
    Whole,
)
from sslzoo_methods.margin.factors import NO_MARGIN, Chunk, Margin
from sslzoo_methods.margin.loss import contrast, margin_loss, margin_push
from sslzoo_methods.margin.method import MarginContrast


def gradient(embeddings: Tensor, margin: Margin, chunk: int | None) -> Tensor:
    """Forward and backward pass of NT-Xent over two views (2N, D); returns the gradient of the embeddings."""
    z = embeddings.detach().requires_grad_()
    own = torch.arange(len(z))
    positive = (own + len(z) // 2) % len(z)
    push = partial(margin_push, margin=margin, temperature=0.2, beta=1.0)
    chunks = None if chunk is None else Chunk(chunk, push)
    pairs = contrast(z, z, positive, own=own, temperature=0.2, chunk=chunks)
    margin_loss(pairs, margin, temperature=0.2, beta=1.0, detached=False).mean().backward()
    assert z.grad is not None
    return z.grad


def step(method: MarginContrast, batch: Batch) -> None:
    """A training step without the optimiser."""
    method.zero_grad()
    method.loss(batch).backward()


def method_with(family: Family, effects: Effects) -> MarginContrast:
    """SimCLR with a small encoder, as in margin_fashion_mnist."""
    cfg = MarginConfig(
        name="margin",
        base=SimCLRConfig(temperature=0.2),
        family=family,
        effects=effects,
        projector=HeadConfig(widths=(256, 128), hidden_norm=False),
    )
    torch.manual_seed(0)
    method = MarginContrast(cfg, *build_backbone(BackboneConfig(name="conv5", in_channels=1)))
    optim = SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0)
    method.prepare(TrainingPlan(dataset_size=256, global_batch_size=256, max_epochs=1), optim, 0)
    return method


def measure(batch_size: int = 2048, dim: int = 128, rounds: int = 7) -> list[Result]:
    """Time relative to the same loss and step without margin and to the products, and memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    z = torch.randn(2 * batch_size, dim)
    margin = Margin(angular=0.1745, subtractive=0.1)
    dense, chunked = partial(gradient, z, margin, None), partial(gradient, z, margin, 256)
    small = partial(gradient, z[:512], margin, 256)
    memory = [extra_mebibytes(run, small) for run in (dense, chunked)]
    worst = float((dense() - chunked()).abs().max() / dense().abs().max())
    bare = partial(gradient, z, NO_MARGIN, None)
    losses = {
        "bare": bare,
        "dense": dense,
        "chunked": chunked,
        "products": partial(products_of_similarities, z, 256),
    }
    loss_times = alternating(losses, rounds)
    views = tuple(torch.randn(2, 256, 1, 20, 20))
    batch = Batch((views[0], views[1]), (), torch.arange(256))
    angular = Combined(angular_margin="10deg", subtractive_margin=0.0)
    methods = {
        "none": method_with(NoMargin(), Whole()),
        "all": method_with(angular, Whole()),
        "one": method_with(angular, Isolated(emphasis="batch")),
    }
    steps = {name: partial(step, method, batch) for name, method in methods.items()}
    step_times = alternating(steps, 4 * rounds)
    loss, whole = f"margin loss, N={batch_size}, D={dim}", "margin, whole step, batch 256"
    return [
        Result(work=whole, baseline="no margin", value=ratio(step_times, "all", "none"), at_most=1.05),
        Result(work=f"{whole}, one effect", baseline="no margin", value=ratio(step_times, "one", "none")),
        Result(work=loss, baseline="no margin", value=ratio(loss_times, "dense", "bare")),
        Result(
            work=f"{loss}, chunked",
            baseline="bare products",
            value=ratio(loss_times, "chunked", "products"),
            at_most=1.35,
        ),
        Result(
            work=f"{loss}, chunked",
            baseline="memory beyond the inputs",
            value=memory[1],
            unit="MiB",
            at_most=100,
        ),
        Result(
            work=f"{loss}, chunked",
            baseline="gradient of the dense form",
            value=worst,
            unit="apart",
            at_most=1e-6,
        ),
        Result(work=f"{loss}, dense", baseline="chunked form", value=ratio(loss_times, "dense", "chunked")),
        Result(work=f"{loss}, dense", baseline="memory beyond the inputs", value=memory[0], unit="MiB"),
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
