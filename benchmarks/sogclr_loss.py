"""SogCLR's memory-lean loss compared with the readable dense form: time, extra memory, gradients.

One thread; the two forms run in turn; medians. Memory is measured first, with each form in a separate
process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import alternating, extra_mebibytes, ratio
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


def products(embeddings: Tensor) -> None:
    """The matrix products that every implementation needs, in the blocks of the lean form."""
    flat = embeddings.flatten(0, 1)
    out = torch.zeros_like(flat)
    for rows in flat.split(256):
        scores = rows @ flat.T
        torch.mm(scores, flat)
        out.addmm_(scores.T, rows)


def main() -> int:
    """Print the table; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embeddings = normalize(torch.randn(2, args.batch, args.dim))
    log_u = torch.randn(args.batch) * 0.1

    runs: dict[str, Callable[[], Any]] = {
        name: partial(gradient, form, embeddings, log_u) for name, form in FORMS.items()
    }
    small = {name: partial(gradient, form, embeddings[:, :64], log_u[:64]) for name, form in FORMS.items()}
    memory = {name: extra_mebibytes(run, small[name]) for name, run in runs.items()}
    grads = {name: run() for name, run in runs.items()}
    seconds = alternating(runs | {"products": partial(products, embeddings)}, args.rounds)
    difference = float((grads["dense"] - grads["lean"]).abs().max() / grads["dense"].abs().max())

    print(f"SogCLR loss, forward and backward, N={args.batch}, D={args.dim}, one thread")
    for name in FORMS:
        print(f"  {name:5} {median(seconds[name]):7.2f} s CPU  {memory[name]:8.1f} MiB extra")
    speed = ratio(seconds, "dense", "lean")
    share = memory["lean"] / memory["dense"]
    over = ratio(seconds, "lean", "products")
    print(f"  lean: {speed:.1f}x faster (at least 2.5), {share:.3f} of the memory (at most 0.1),")
    print(
        f"  {over:.2f}x the bare products, gradients differ by {difference:.1e} of the largest (at most 1e-6)"
    )
    return 0 if speed >= 2.5 and share <= 0.1 and difference <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
