"""SogCLR's memory-lean loss compared with its bare matrix products and with the readable dense form: time, extra
memory, gradients.

    python benchmarks/sogclr_loss.py

One thread; the forms run in turn; medians of the ratios. Memory is measured first, each form in its own process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Result, alternating, extra_mebibytes, products_of_similarities, ratio, report
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo_methods.sogclr.loss import gcl_loss, gcl_loss_lean

FORMS: dict[str, Callable[..., Any]] = {"dense": gcl_loss, "lean": gcl_loss_lean}


def gradient(form: Callable[..., Any], embeddings: Tensor, log_u: Tensor) -> Tensor:
    """Forward and backward pass of one step; returns the gradient of the embeddings."""
    z = embeddings.detach().requires_grad_()
    loss, _ = form(
        z,
        z,
        log_u,
        temperature=0.1,
        gamma=0.9,
        first_visit="sample",
        u_write="mean",
        u_floor=None,
        offset=0,
    )
    loss.backward()
    assert z.grad is not None
    return z.grad


def measure(batch: int = 4096, dim: int = 128, rounds: int = 5) -> list[Result]:
    """Time relative to the products, memory, and agreement with the dense form."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embeddings = normalize(torch.randn(2, batch, dim))
    log_u = torch.randn(batch) * 0.1
    runs: dict[str, Callable[[], Any]] = {
        name: partial(gradient, form, embeddings, log_u) for name, form in FORMS.items()
    }
    small = {name: partial(gradient, form, embeddings[:, :64], log_u[:64]) for name, form in FORMS.items()}
    memory = {name: extra_mebibytes(run, small[name]) for name, run in runs.items()}
    grads = {name: run() for name, run in runs.items()}
    products = partial(products_of_similarities, embeddings.flatten(0, 1), 2**21 // (2 * batch))
    seconds = alternating(runs | {"products": products}, rounds)
    difference = float((grads["dense"] - grads["lean"]).abs().max() / grads["dense"].abs().max())
    work = f"SogCLR loss, N={batch}, D={dim}"
    return [
        Result(work=work, baseline="bare products", value=ratio(seconds, "lean", "products"), at_most=1.25),
        Result(work=work, baseline="memory beyond the inputs", value=memory["lean"], unit="MiB", at_most=50),
        Result(
            work=work, baseline="gradient of the dense form", value=difference, unit="apart", at_most=1e-6
        ),
        Result(work="SogCLR, dense form", baseline="lean form", value=ratio(seconds, "dense", "lean")),
        Result(
            work="SogCLR, dense form", baseline="memory beyond the inputs", value=memory["dense"], unit="MiB"
        ),
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
