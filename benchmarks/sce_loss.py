"""SCE's training loss compared with its bare matrix products, and with its dense form.

    python benchmarks/sce_loss.py

Two crops, asymmetric: one online and one momentum view, forward and backward, float32, one thread. The
products are, for the rows of both views, logits = rows @ queue.T and weighted means = weights @ queue, in
the same tiles. Times are medians of CPU seconds, measured in turn within each round. Memory is the peak
resident memory beyond that of the inputs, in a separate process. The dense form runs on an eighth of the
samples, to which its memory and time are proportional, and is compared with the lean form on the same ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from measure import Result, alternating, extra_mebibytes, ratio, report
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo_methods.sce.loss import Pair, TermWeights, sce_loss, sce_multicrop_loss

TEMPERATURES = {"temperature": 0.1, "target_temperature": 0.07}


def inputs(samples: int, queue: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, bank = (normalize(torch.randn(n, width, generator=generator)) for n in (samples, samples, queue))
    return q.requires_grad_(), k, bank


def products(q: Tensor, k: Tensor, bank: Tensor) -> None:
    """The two matrix products that every exact form needs."""
    with torch.no_grad():
        rows = torch.cat([q, k])
        width = max(2**20 // len(rows), 64)
        centre = torch.zeros_like(rows)
        buffer = rows.new_empty(len(rows) * width)
        for part in bank.split(width):
            logits = torch.mm(rows, part.T, out=buffer[: len(rows) * len(part)].view(len(rows), -1))
            centre.addmm_(logits, part)


def lean(q: Tensor, k: Tensor, bank: Tensor) -> None:
    out = sce_multicrop_loss(
        [q],
        [k],
        [Pair(0, 0, 1.0)],
        keys=None,
        first_row=0,
        queue=bank,
        weights=TermWeights.sce(0.5),
        target_positive="zero_logit",
        **TEMPERATURES,
    )
    torch.autograd.grad(out.terms.loss, q)


def dense(q: Tensor, k: Tensor, bank: Tensor) -> None:
    out = sce_loss(
        q,
        k,
        keys=None,
        first_row=0,
        queue=bank,
        contrastive_weight=0.5,
        target_positive="zero_logit",
        **TEMPERATURES,
    )
    torch.autograd.grad(out.terms.loss, q)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "products": products,
    "lean": lean,
    "dense": dense,
}


def peak_mebibytes(form: str, *sizes: int) -> float:
    """Peak memory of one forward and backward pass in addition to its inputs."""
    # The small call triggers one-time allocations of the libraries.
    return extra_mebibytes(
        partial(FORMS[form], *inputs(*sizes)), partial(FORMS[form], *inputs(16, 256, sizes[2]))
    )


def measure(samples: int = 1024, queue: int = 65536, width: int = 128, rounds: int = 5) -> list[Result]:
    """Time relative to the products, and memory."""
    torch.set_num_threads(1)
    sizes, eighth = (samples, queue, width), (samples // 8, queue, width)
    memory = peak_mebibytes("lean", *sizes)
    less = peak_mebibytes("dense", *eighth)
    big, small = inputs(*sizes), inputs(*eighth)
    seconds = alternating({form: partial(FORMS[form], *big) for form in ("products", "lean")}, rounds)
    few = alternating({form: partial(FORMS[form], *small) for form in ("lean", "dense")}, rounds)
    work = f"SCE loss, N={samples}, K={queue}, D={width}"
    part = f"dense form, N={samples // 8}"
    return [
        Result(work=work, baseline="bare products", value=ratio(seconds, "lean", "products"), at_most=1.25),
        Result(work=work, baseline="memory beyond the inputs", value=memory, unit="MiB", at_most=20),
        Result(work=part, baseline="lean form", value=ratio(few, "dense", "lean")),
        Result(work=part, baseline="memory beyond the inputs", value=less, unit="MiB"),
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
