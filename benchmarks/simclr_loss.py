"""SimCLR's training loss compared with its bare matrix products and with its dense form: time, extra memory, gradients.

    python benchmarks/simclr_loss.py

Two views, forward and backward, one thread; the forms run in turn; medians of the ratios. Memory is measured first,
each form in its own process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from measure import Result, alternating, extra_mebibytes, products_of_similarities, ratio, report
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo_methods.simclr.loss import nt_xent, nt_xent_lean

FORMS: dict[str, Callable[..., Tensor]] = {"dense": nt_xent, "lean": nt_xent_lean}


def gradient(form: Callable[..., Tensor], embeddings: Tensor) -> Tensor:
    """Forward and backward pass of two views (2, N, D); returns the gradient of the embeddings."""
    z = embeddings.detach().requires_grad_()
    form(list(z), list(z), offset=0, temperature=0.1).backward()
    assert z.grad is not None
    return z.grad


def measure(batch: int = 4096, dim: int = 128, rounds: int = 5) -> list[Result]:
    """Time relative to the products, memory, and the difference from the gradient in float64."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embeddings = normalize(torch.randn(2, batch, dim))
    runs: dict[str, Callable[[], object]] = {
        name: partial(gradient, form, embeddings) for name, form in FORMS.items()
    }
    small = {name: partial(gradient, form, embeddings[:, :64]) for name, form in FORMS.items()}
    memory = {name: extra_mebibytes(run, small[name]) for name, run in runs.items()}
    few = embeddings[:, : batch // 4]
    exact, lean = gradient(nt_xent, few.double()), gradient(nt_xent_lean, few)
    products = partial(products_of_similarities, embeddings.flatten(0, 1), 2**21 // (2 * batch))
    seconds = alternating(runs | {"products": products}, rounds)
    difference = float((lean - exact).abs().max() / exact.abs().max())
    work = f"SimCLR loss, N={batch}, D={dim}"
    return [
        Result(work=work, baseline="bare products", value=ratio(seconds, "lean", "products"), at_most=1.25),
        Result(work=work, baseline="memory beyond the inputs", value=memory["lean"], unit="MiB", at_most=50),
        Result(work=work, baseline="gradient in float64", value=difference, unit="apart", at_most=4e-7),
        Result(work="SimCLR, dense form", baseline="lean form", value=ratio(seconds, "dense", "lean")),
        Result(
            work="SimCLR, dense form", baseline="memory beyond the inputs", value=memory["dense"], unit="MiB"
        ),
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
