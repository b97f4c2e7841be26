"""CPU time of a step's work on state per sample, with 10,000,000 training samples relative to 100,000.

    python benchmarks/many_samples.py

A step of SogCLR's table (read and update) and the next batch of the sampler; and, once an epoch, its order, relative to
torch's random permutation. All run in turn in one process and thread; medians of the ratios of CPU time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from measure import Result, alternating, ratio, report

from sslzoo.data.sampler import GlobalBatchSampler
from sslzoo.randomness import epoch_order
from sslzoo.recipe.plan import TrainingPlan
from sslzoo_methods.sogclr.table import Descent, EstimatorTable

FEW, MANY, BATCH, ROUNDS = 100_000, 10_000_000, 1024, 5
STEPS, DRAWN = 50, 10  # steps of the table and batches of the sampler in a round


def steps_of_table(size: int) -> Callable[[], None]:
    """STEPS steps with a table of ``size`` rows, on samples as an epoch draws them."""
    table = EstimatorTable(size, tau_init=0.1, descent=Descent(0.1, 0.01, 0.9, 0.05, 1.0))
    batches = epoch_order(0, 0, size)[: BATCH * STEPS].split(BATCH)
    values = torch.randn(BATCH)

    def run() -> None:
        for index in batches:
            table.read("log_u", index)
            table.update(index, values, values)

    return run


def steps_of_sampler(size: int) -> Callable[[], None]:
    """DRAWN batches of an epoch that has begun."""
    plan = TrainingPlan(dataset_size=size, global_batch_size=BATCH, max_epochs=1)
    drawn = iter(GlobalBatchSampler(plan, seed=0, rank=0, position=lambda: 0))
    next(drawn)  # makes the order

    def run() -> None:
        for _ in range(DRAWN):
            next(drawn)

    return run


def measure() -> list[Result]:
    """Compare all."""
    torch.set_num_threads(1)
    results = []
    works = (("step of SogCLR's table", steps_of_table), ("batch of the sampler", steps_of_sampler))
    for work, make in works:
        seconds = alternating({"few": make(FEW), "many": make(MANY)}, ROUNDS)
        value = ratio(seconds, "many", "few")
        results.append(
            Result(work=f"{work}, {MANY:,} samples", baseline=f"{FEW:,} samples", value=value, at_most=2.0)
        )
    orders = {"ours": lambda: epoch_order(0, 0, MANY), "torch": lambda: torch.randperm(MANY)}
    value = ratio(alternating(orders, ROUNDS), "ours", "torch")
    work = f"order of an epoch, {MANY:,} samples"
    return [*results, Result(work=work, baseline="torch.randperm", value=value)]


if __name__ == "__main__":
    sys.exit(report(measure()))
