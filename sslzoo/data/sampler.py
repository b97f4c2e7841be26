"""The order of samples: a pure function of (seed, epoch), cut the same way for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from torch import Tensor
from torch.utils.data import Sampler

from sslzoo.randomness import STAND_IN, epoch_order, hash64, key
from sslzoo.recipe.plan import TrainingPlan

Item = tuple[int, int]  # (epoch, sample_id): workers learn the epoch from it


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


class ProbeSampler:
    """The batches from which a probe learns, as lists of (epoch, sample_id), for any number of ranks.

    An epoch's order of the samples in the mask ``learned`` (N,) is cut into the batches of steps, the last of which may
    be smaller, each batch into contiguous shares of the ranks, which differ by at most one sample, and each share into
    parts of at most ``part_size``. ``steps`` counts through all epochs.
    """

    def __init__(
        self,
        learned: Tensor,
        *,
        batch_size: int,
        part_size: int,
        steps_per_epoch: int,
        steps: range,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.learned, self.batch_size, self.part_size = learned, batch_size, part_size
        self.steps_per_epoch, self.steps, self.seed = steps_per_epoch, steps, seed
        self.rank, self.world_size = rank, world_size
        self._size = int(learned.sum())  # samples in an epoch

    def __iter__(self) -> Iterator[list[Item]]:
        epoch, order = -1, self.learned
        for step in self.steps:
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.seed, epoch, len(self.learned))
                order = order[self.learned[order]]
            for part in self.parts(step):
                yield [(epoch, sample_id) for sample_id in order[part].tolist()]

    def parts(self, step: int) -> list[slice]:
        """The places of this rank's parts of a step in the order of the epoch; none if there are too few samples."""
        first = step % self.steps_per_epoch * self.batch_size
        size = min(self.batch_size, self._size - first)
        start, end = (first + r * size // self.world_size for r in (self.rank, self.rank + 1))
        return [slice(i, min(i + self.part_size, end)) for i in range(start, end, self.part_size)]


def stand_ins(seed: int, epoch: int, sample_id: int, size: int, global_batch_size: int) -> Iterator[int]:
    """The sample_ids that may stand in for an unreadable one in ``epoch``, of ``size`` samples, in the order of trying.

    They are those at the same place in the global batches of the other steps, the last partial batch included, in an
    order drawn by a hash. The places of a batch have no sample in common: whatever fails, no image comes into a
    batch twice, and none is drawn in dependence on ranks or on what else fails. With one step an epoch there are none,
    except for the first places when the dropped part has some.
    """
    order = _order(seed, epoch, size)
    place = int((order == sample_id).nonzero()) % global_batch_size
    others = order[place::global_batch_size]
    others = others[others != sample_id]
    drawn = hash64(key(STAND_IN, seed, epoch, sample_id), others).argsort(stable=True)
    yield from others[drawn].tolist()


@lru_cache(maxsize=1)  # many images may be unreadable
def _order(seed: int, epoch: int, size: int) -> Tensor:
    return epoch_order(seed, epoch, size)
