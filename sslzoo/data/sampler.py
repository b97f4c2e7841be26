"""The order of samples: a pure function of (seed, epoch), cut the same way for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from sslzoo.randomness import epoch_order
from sslzoo.recipe.plan import TrainingPlan

Item = tuple[int, int]  # (epoch, sample_id): workers need no other word of the epoch


class GlobalBatchSampler(Sampler[list[Item]]):
    """Micro-batches of one rank, each a list of (epoch, sample_id).

    An epoch's order is cut into the global batches of optimiser steps, each of these into micro-batches,
    each of those into one contiguous slice a rank; the last partial global batch is dropped. Iteration
    starts where the run stands: ``position()`` micro-batches are finished. ``len`` stays the full epoch,
    because Lightning adds the batches of a resumed epoch to its own count.
    """

    def __init__(self, plan: TrainingPlan, seed: int, rank: int, position: Callable[[], int]) -> None:
        self.plan, self.seed, self.rank, self.position = plan, seed, rank, position

    def __len__(self) -> int:
        return self.plan.micro_batches_per_epoch

    def __iter__(self) -> Iterator[list[Item]]:
        plan = self.plan
        epoch, start = divmod(self.position(), plan.micro_batches_per_epoch)
        order = epoch_order(self.seed, epoch, plan.dataset_size)
        size = plan.micro_batch_size
        for micro_batch in range(start, plan.micro_batches_per_epoch):
            # Micro-batches of a step follow one another, and so do the ranks' slices of each.
            first = (micro_batch * plan.world_size + self.rank) * size
            yield [(epoch, sample_id) for sample_id in order[first : first + size].tolist()]
