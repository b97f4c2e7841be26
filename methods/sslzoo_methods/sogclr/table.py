"""The estimator table: one number per training image, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo_methods.sogclr.loss import Estimates

# Pairs of samples compared at once when looking for duplicates.
PAIRS = 2**21


def mean_over_duplicates(index: Tensor, values: Tensor, *, log_space: bool) -> Tensor:
    """``values`` (B,) with those of equal ``index`` (B,) replaced by their mean.

    With ``log_space`` the values are logarithms and the mean is of what they are logarithms of. No host
    synchronisation, which ``unique`` or a boolean index would cost.
    """
    step = max(1, PAIRS // index.shape[0])
    merged = []
    for start in range(0, index.shape[0], step):
        same = index[start : start + step, None] == index  # (R, B)
        count = same.sum(dim=1)
        if log_space:
            merged.append(values.where(same, -torch.inf).logsumexp(dim=1) - count.to(values.dtype).log())
        else:
            merged.append(values.where(same, 0).sum(dim=1) / count)
    return torch.cat(merged)


class Descent(NamedTuple):
    """How individual temperatures follow their gradient (iSogCLR, arXiv:2305.11965, Algorithm 1)."""

    rho: float  # radius of the robust objective: constant part of the gradient
    eta: float  # step
    beta: float  # weight of the new gradient in its moving average
    tau_min: float
    tau_max: float

    def step(self, tau: Tensor, average: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """New temperatures and new moving averages, from the ``slope`` of tau * log g by tau."""
        average = (1 - self.beta) * average + self.beta * (slope + self.rho)
        return (tau - self.eta * average).clamp(self.tau_min, self.tau_max), average


class EstimatorTable(PerSampleTable):
    """log u of N images (-inf: never visited) and, with ``descent``, a temperature each, in float32."""

    log_u: Tensor  # (N,)
    tau_i: Tensor  # (N,), or empty
    tau_grad: Tensor  # (N,), or empty: moving average of the temperatures' gradient

    def __init__(self, size: int, *, tau_init: float, descent: Descent | None) -> None:
        count = size if descent else 0
        super().__init__(
            log_u=torch.full((size,), -torch.inf, dtype=torch.float32),
            tau_i=torch.full((count,), tau_init, dtype=torch.float32),
            tau_grad=torch.zeros(count, dtype=torch.float32),
        )
        self.descent = descent

    @torch.no_grad()
    def update(self, index: Tensor, log_u: Tensor, slope: Tensor) -> None:
        """Store the new entries ``log_u`` (B,) of all ranks' samples ``index`` (B,); temperatures descend
        along ``slope`` (B,), once an image."""
        rows = {"log_u": mean_over_duplicates(index, log_u, log_space=True)}
        if self.descent:
            slope = mean_over_duplicates(index, slope, log_space=False)
            tau, average = self.descent.step(self.read("tau_i", index), self.read("tau_grad", index), slope)
            rows |= {"tau_i": tau, "tau_grad": average}
        self.write(index, **rows)

    def known(self) -> Tensor:
        """The entries of visited images. Waits for the device."""
        return self.log_u[self.log_u.isfinite()]

    def visited(self) -> Tensor:
        """Fraction of the images that have an entry."""
        return self.log_u.isfinite().float().mean()


def remember(tables: Sequence[EstimatorTable], index: Tensor, learned: Sequence[Estimates]) -> None:
    """Write what all ranks have learned of their samples ``index`` (b,), a table for each modality.

    Two collectives and 16 bytes a sample, twice that for two tables.
    """
    rows = torch.stack([value for e in learned for value in (e.log_u, e.slope)], dim=1)  # (b, 2 * tables)
    index, rows = gather_detached(index), gather_detached(rows)
    for k, table in enumerate(tables):
        table.update(index, rows[:, 2 * k], rows[:, 2 * k + 1])
