"""SogCLR's memory-lean loss against the readable dense form: time, extra memory, gradients.

One thread, the two forms alternating in one run, medians. Memory is measured before anything else has
run, each form in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from sslzoo.numerics import normalize
from sslzoo_methods.sogclr.loss import gcl_loss, gcl_loss_lean

FORMS: dict[str, Callable[..., Any]] = {"dense": gcl_loss, "lean": gcl_loss_lean}


def gradient(form: Callable[..., Any], embeddings: Tensor, log_u: Tensor) -> Tensor:
    """Forward and backward of one step; the gradient of the embeddings."""
    z = embeddings.detach().requires_grad_()
    loss, _ = form(
        z,
        z,
        log_u,
        temperature=0.1,
        gamma=0.9,
        first_visit="sample",
        u_write="mean",
        u_floor=0.0,
        offset=0,
    )
    loss.backward()
    assert z.grad is not None
    return z.grad


def extra_bytes(run: Callable[[], Any]) -> int:
    """How far ``run`` raises the resident memory of a fresh process above what stood before."""
    with mp.get_context("fork").Pool(1) as pool:
        return pool.apply(_high_water, (run,))


def _high_water(run: Callable[[], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def products(embeddings: Tensor) -> None:
    """The bare matrix products that any implementation needs, in the lean form's blocks."""
    flat = embeddings.flatten(0, 1)
    out = torch.zeros_like(flat)
    for rows in flat.split(256):
        scores = rows @ flat.T
        torch.mm(scores, flat)
        out.addmm_(scores.T, rows)


def main() -> int:
    """Print the table; 1 if a promise is broken."""
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
    memory = {name: extra_bytes(run) for name, run in runs.items()}
    grads = {name: run() for name, run in runs.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in [*runs, "products"]}
    for _ in range(args.rounds):
        for name, run in (runs | {"products": lambda: products(embeddings)}).items():
            start = process_time()
            run()
            seconds[name].append(process_time() - start)
    difference = float((grads["dense"] - grads["lean"]).abs().max() / grads["dense"].abs().max())

    print(f"SogCLR loss, forward and backward, N={args.batch}, D={args.dim}, one thread")
    for name in FORMS:
        print(f"  {name:5} {median(seconds[name]):7.2f} s CPU  {memory[name] / 2**20:8.1f} MiB extra")
    speed = median(d / l for d, l in zip(seconds["dense"], seconds["lean"], strict=True))
    share = memory["lean"] / memory["dense"]
    over = median(l / p for l, p in zip(seconds["lean"], seconds["products"], strict=True))
    print(f"  lean: {speed:.1f}x faster (at least 2.5), {share:.3f} of the memory (at most 0.1),")
    print(
        f"  {over:.2f}x the bare products, gradients differ by {difference:.1e} of the largest (at most 1e-6)"
    )
    return 0 if speed >= 2.5 and share <= 0.1 and difference <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
