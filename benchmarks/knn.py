"""k-NN compared with its bare matrix products.

    python benchmarks/knn.py

A whole evaluation: normalisation, search and vote. The products are those of all samples, in the same blocks and into
memory that is reused. One thread; the contenders run in turn; medians of the ratios.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from measure import Result, alternating, ratio, report
from torch import Tensor

from sslzoo.evaluate import knn
from sslzoo.evaluate.task import Features, Roles, Task

BOUNDS = {20: 1.2, 200: 1.3}  # of the ratio, for each number of neighbours


def features(samples: int, means: Tensor) -> Features:
    """Samples around the ``means`` of classes (C, F), close enough to each other for errors."""
    label = torch.randint(len(means), (samples,))
    x = means[label] + 4 * torch.randn(samples, means.shape[1])
    return Features(x, label, torch.arange(samples))


def products(queries: Tensor, bank: Tensor) -> None:
    """Similarities of all ``queries`` (Q, F) with the ``bank`` (M, F)."""
    similarity = queries.new_empty(knn.COMPARED, len(bank))
    for some in queries.split(knn.COMPARED):
        torch.mm(some, bank.T, out=similarity[: len(some)])


def measure(
    queries: int = knn.QUERIES, bank: int = 50_000, width: int = 512, classes: int = 1000, rounds: int = 4
) -> list[Result]:
    """Time relative to the products, for two numbers of neighbours."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    means = torch.randn(classes, width)
    test, train = features(queries, means), features(bank, means)
    everybody = torch.ones(bank, dtype=torch.bool)
    task = Task(train, test, Roles(everybody, ~everybody, everybody), classes)
    runs = {str(k): partial(knn.knn_accuracy, task, k=k, temperature=0.07) for k in BOUNDS}
    seconds = alternating(runs | {"products": partial(products, test.x, train.x)}, rounds)
    return [
        Result(
            work=f"k-NN, bank {bank:,} x {width}, {classes} classes, k={k}",
            baseline="bare products",
            value=ratio(seconds, str(k), "products"),
            at_most=bound,
        )
        for k, bound in BOUNDS.items()
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
