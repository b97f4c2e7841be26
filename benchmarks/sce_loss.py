"""SCE's training loss compared with its bare matrix products, and with its dense form.

    python benchmarks/sce_loss.py [--rounds 5] [--samples 1024] [--queue 65536] [--width 128]

Two crops, asymmetric: one online and one momentum view, forward and backward, float32, one thread. The
products are, for the rows of both views, logits = rows @ queue.T and weighted means = weights @ queue, in
the same tiles. Times are medians of CPU seconds, measured in turn within each round. Memory is the peak
resident memory beyond that of the inputs, in a separate process. The dense form runs on an eighth of the
samples, to which its memory and time are proportional, and is compared with the lean form on the same ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from measure import alternating, extra_mebibytes
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo_methods.sce.loss import Pair, TermWeights, sce_loss, sce_multicrop_loss

TEMPERATURES = {"temperature": 0.1, "target_temperature": 0.07}
TIME_LIMIT = 1.35  # times the bare products
MEMORY_LIMIT = 50.0  # MiB


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


def times(forms: list[str], rounds: int, *sizes: int) -> dict[str, float]:
    """Median CPU seconds of each form, run in turn."""
    data = inputs(*sizes)
    seconds = alternating({form: partial(FORMS[form], *data) for form in forms}, rounds)
    return {form: median(values) for form, values in seconds.items()}


def peak_mebibytes(form: str, *sizes: int) -> float:
    """Peak memory of one forward and backward pass in addition to its inputs."""
    # The small call triggers one-time allocations of the libraries.
    return extra_mebibytes(
        partial(FORMS[form], *inputs(*sizes)), partial(FORMS[form], *inputs(16, 256, sizes[2]))
    )


def main() -> int:
    """Print the table; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    full = (args.samples, args.queue, args.width)
    eighth = (max(args.samples // 8, 1), args.queue, args.width)

    memory = peak_mebibytes("lean", *full)
    less = {form: peak_mebibytes(form, *eighth) for form in ("lean", "dense")}
    big = times(["products", "lean"], args.rounds, *full)
    small = times(["lean", "dense"], args.rounds, *eighth)
    ratio = big["lean"] / big["products"]
    print(f"SCE loss, forward and backward: N={full[0]}, K={full[1]}, D={full[2]}, one thread, float32")
    print(f"  bare products   {big['products']:7.3f} s")
    print(f"  lean form       {big['lean']:7.3f} s   {ratio:.2f} x the products (limit {TIME_LIMIT})")
    print(f"  lean form       {memory:7.1f} MiB extra (limit {MEMORY_LIMIT:.0f})")
    print(f"N={eighth[0]}:")
    print(f"  lean form       {small['lean']:7.3f} s   {less['lean']:7.1f} MiB extra")
    print(
        f"  dense form      {small['dense']:7.3f} s   {less['dense']:7.1f} MiB extra, "
        f"{small['dense'] / small['lean']:.1f} x the lean form's time"
    )
    return int(ratio > TIME_LIMIT or memory > MEMORY_LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
