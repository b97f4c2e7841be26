"""What is judged: the features of one encoder on one labelled data set, and what each of its samples is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum
from sslzoo.randomness import is_holdout, subset
from sslzoo.recipe.sections import EvalConfig, ProbeConfig

CHUNK = 8192  # rows that are worked on at a time: nothing makes a copy of all features


class Features(NamedTuple):
    """This rank's share of one split, M samples; shares may be unequal or empty."""

    x: Tensor  # (M, F) float32
    label: Tensor  # (M,) int64
    sample_id: Tensor  # (M,) int64

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of ``rows`` (indices), a chunk at a time."""
        for part in rows.split(CHUNK):
            yield self.x[part], self.label[part]


class Roles(NamedTuple):
    """Which rows of a training split are for what, each bool (M,)."""

    learned: Tensor  # linear probes learn from them
    held_out: Tensor  # and choose by these
    bank: Tensor  # k-NN looks for neighbours among them


class Samples(NamedTuple):
    """How many images of one data set stand behind a figure, over all ranks."""

    n_train: int  # that linear probes learn from
    n_held_out: int  # by which they choose
    n_bank: int  # among which k-NN looks
    n_test: int
    n_unreadable: int  # of both splits; they are left out

    def in_words(self) -> str:
        """For a log and below a table."""
        return (
            f"{self.n_train:,} images to learn from, {self.n_held_out:,} to choose by, {self.n_bank:,} for k-NN, "
            f"{self.n_test:,} tested, {self.n_unreadable:,} unreadable"
        )


class Task(NamedTuple):
    """One data set seen by one encoder: C classes."""

    train: Features
    test: Features
    roles: Roles
    classes: int

    def bank(self) -> Features:
        """The training features among which k-NN looks."""
        if bool(self.roles.bank.all()):
            return self.train
        return Features(*(part[self.roles.bank] for part in self.train))


def roles(sample_id: Tensor, size: int, probe: ProbeConfig, evaluation: EvalConfig, seed: int) -> Roles:
    """Of each of ``sample_id`` (M,), which are of a training split of ``size`` samples in all."""
    learns = _among(sample_id, size, probe.train_size, seed)
    held_out = is_holdout(sample_id, probe.holdout, seed)
    return Roles(learns & ~held_out, learns & held_out, _among(sample_id, size, evaluation.bank_size, seed))


def _among(sample_id: Tensor, size: int, keep: int | None, seed: int) -> Tensor:
    if keep is None or keep >= size:
        return torch.ones_like(sample_id, dtype=torch.bool)
    return torch.isin(sample_id, subset(seed, size, keep).to(sample_id.device))


def count_samples(roles: Roles, n_test: int, *, listed: int) -> Samples:
    """Over all ranks. ``n_test`` are this rank's test samples, ``listed`` all samples of both splits. Collective."""
    own = [len(roles.bank), n_test, *(int(role.sum()) for role in roles)]
    train, test, learned, held_out, bank = all_reduce_sum(
        torch.tensor(own, device=roles.bank.device)
    ).tolist()
    return Samples(learned, held_out, bank, test, listed - train - test)


def rows_to_learn(task: Task) -> tuple[Tensor, int]:
    """Indices of this rank's rows to learn from, those that are not finite left out, and their number over all ranks.
    Collective. ``ValueError`` where every sample is held out."""
    learned = task.roles.learned
    rows = (learned & finite_rows(task.train.x)).nonzero().squeeze(1)
    counts = all_reduce_sum(torch.stack([learned.sum(), learned.new_tensor(len(rows), dtype=torch.int64)]))
    require(
        int(counts[0]) > 0, "a linear probe has no training sample: all are held out; lower probe.holdout"
    )
    return rows, int(counts[1])


def finite_rows(x: Tensor) -> Tensor:
    """Whether all of a row of ``x`` (N, F) is finite: bool (N,)."""
    return torch.cat([part.isfinite().all(1) for part in x.split(CHUNK)])
