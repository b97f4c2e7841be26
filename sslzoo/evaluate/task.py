"""An evaluation task: the features of an encoder on a labelled data set, and the use of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum
from sslzoo.randomness import is_holdout, subset
from sslzoo.recipe.sections import EvalConfig, ProbeConfig

CHUNK = 8192  # rows processed at a time, so that no step copies all features


class Features(NamedTuple):
    """This rank's M samples of a split; ranks may have different numbers of samples, or none.

    Computations run on the device of ``label``. If ``x`` is on the host instead, in memory or in a memory map, only
    the chunk in use is copied to that device.
    """

    x: Tensor  # (M, F) float32
    label: Tensor  # (M,) int64
    sample_id: Tensor  # (M,) int64, on the device of label

    @property
    def device(self) -> torch.device:
        """The device of computations."""
        return self.label.device

    def chunks(
        self, rows: Tensor | None = None, sizes: int | Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (N, F) and labels (N,) of ``rows`` (indices; default: all) in chunks, on :attr:`device`.

        ``sizes`` is the number of rows of each chunk (default: ``CHUNK``), or a list with the number of each.
        """
        sizes = CHUNK if sizes is None else sizes
        if rows is None:
            rows = torch.arange(len(self.label), device=self.device)
        for part, where in zip(_split(rows, sizes), _split(rows.to(self.x.device), sizes), strict=True):
            yield self._read(where), self.label[part]

    def _read(self, rows: Tensor) -> Tensor:
        if self.x.device == self.device:
            return self.x[rows]
        # A copy from pinned memory does not wait for the device.
        pinned = torch.empty(
            len(rows), self.x.shape[1], dtype=self.x.dtype, pin_memory=torch.cuda.is_available()
        )
        torch.index_select(self.x, 0, rows, out=pinned)
        return pinned.to(self.device, non_blocking=True)

    def finite(self) -> Tensor:
        """Mask, bool (M,), of the rows of ``x`` that are finite."""
        return torch.cat([x.isfinite().all(1) for x, _ in self.chunks()])


def _split(rows: Tensor, sizes: int | Sequence[int]) -> Sequence[Tensor]:
    return rows.split(sizes if isinstance(sizes, int) else list(sizes))


class Roles(NamedTuple):
    """The use of each row of a training split; masks, bool (M,)."""

    learned: Tensor  # linear probes are fitted to these rows
    held_out: Tensor  # linear probes are selected on these rows
    bank: Tensor  # k-NN searches for neighbours among these rows


class Samples(NamedTuple):
    """Numbers of images of one data set used for a figure, over all ranks."""

    n_train: int  # to fit linear probes
    n_held_out: int  # to select a linear probe
    n_bank: int  # in the k-NN bank
    n_test: int
    n_unreadable: int  # in both splits; they are left out

    def in_words(self) -> str:
        """The numbers as text."""
        return (
            f"{self.n_train:,} images for training, {self.n_held_out:,} for selection, {self.n_bank:,} for k-NN, "
            f"{self.n_test:,} for testing, {self.n_unreadable:,} unreadable"
        )


class Task(NamedTuple):
    """Features of one encoder on one labelled data set."""

    train: Features
    test: Features
    roles: Roles
    classes: int


def roles(sample_id: Tensor, size: int, probe: ProbeConfig, evaluation: EvalConfig, seed: int) -> Roles:
    """The roles of the samples ``sample_id`` (M,) of a training split with ``size`` samples."""
    learns = _among(sample_id, size, probe.train_size, seed)
    held_out = is_holdout(sample_id, probe.holdout, seed)
    return Roles(learns & ~held_out, learns & held_out, _among(sample_id, size, evaluation.bank_size, seed))


def _among(sample_id: Tensor, size: int, keep: int | None, seed: int) -> Tensor:
    if keep is None or keep >= size:
        return torch.ones_like(sample_id, dtype=torch.bool)
    return torch.isin(sample_id, subset(seed, size, keep).to(sample_id.device))


def count_samples(roles: Roles, n_test: int, *, listed: int) -> Samples:
    """Count samples over all ranks. ``n_test`` is this rank's number of test samples, ``listed`` the number of samples
    in both splits. Collective."""
    counts = [len(roles.bank), n_test, *(int(role.sum()) for role in roles)]
    train, test, learned, held_out, bank = all_reduce_sum(
        torch.tensor(counts, device=roles.bank.device)
    ).tolist()
    return Samples(learned, held_out, bank, test, listed - train - test)


def rows_to_learn(task: Task) -> tuple[Tensor, int]:
    """Indices of this rank's finite rows to fit a probe to, and their number over all ranks. Collective.

    Raises ``ValueError`` if all samples are held out.
    """
    learned = task.roles.learned
    rows = (learned & task.train.finite()).nonzero().squeeze(1)
    counts = all_reduce_sum(torch.stack([learned.sum(), learned.new_tensor(len(rows), dtype=torch.int64)]))
    require(
        int(counts[0]) > 0, "a linear probe has no training samples: all are held out; lower probe.holdout"
    )
    return rows, int(counts[1])
