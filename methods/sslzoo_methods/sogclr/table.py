"""The table of estimates: one number per training image, identical on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo_methods.sogclr.loss import Estimates

# Number of sample pairs compared at once when looking for duplicates.
PAIRS = 2**21


def mean_over_duplicates(index: Tensor, values: Tensor, *, log_space: bool) -> Tensor:
    """Replace ``values`` (B,) that have the same ``index`` (B,) by their mean.

    With ``log_space``, the values are logarithms and the mean is taken of their exponentials. Needs no
    host-device synchronisation, unlike ``unique`` or boolean indexing.
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
    """Gradient descent of individual temperatures (iSogCLR, arXiv:2305.11965, Algorithm 1)."""

    rho: float  # radius of the robust objective; a constant part of the gradient
    eta: float  # step size
    beta: float  # weight of the new gradient in the moving average
    tau_min: float
    tau_max: float

    def step(self, tau: Tensor, average: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """New temperatures and moving averages, from ``slope``, the derivative of tau * log g by tau."""
        average = (1 - self.beta) * average + self.beta * (slope + self.rho)
        return (tau - self.eta * average).clamp(self.tau_min, self.tau_max), average


class EstimatorTable(PerSampleTable):
    """log u per image (-inf: never visited) and, with ``descent``, a temperature per image, in float32."""

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
        """Store new entries ``log_u`` (B,) of the samples ``index`` (B,) of all ranks, and update their
        temperatures with ``slope`` (B,), once per image."""
        rows = {"log_u": mean_over_duplicates(index, log_u, log_space=True)}
        if self.descent:
            slope = mean_over_duplicates(index, slope, log_space=False)
            tau, average = self.descent.step(self.read("tau_i", index), self.read("tau_grad", index), slope)
            rows |= {"tau_i": tau, "tau_grad": average}
        self.write(index, **rows)

    def known(self) -> Tensor:
        """The entries of visited images. Synchronises with the device."""
        return self.log_u[self.log_u.isfinite()]


def remember(tables: Sequence[EstimatorTable], index: Tensor, learned: Sequence[Estimates]) -> Tensor:
    """Gather the new estimates for the samples ``index`` (b,) of all ranks and write one table per modality. Returns
    the new log u of all ranks, (B, tables).

    Costs two collectives and 16 bytes per sample, or twice that for two tables.
    """
    rows = torch.stack([value for e in learned for value in (e.log_u, e.slope)], dim=1)  # (b, 2 * tables)
    index, rows = gather_detached(index), gather_detached(rows)
    for k, table in enumerate(tables):
        table.update(index, rows[:, 2 * k], rows[:, 2 * k + 1])
    return rows[:, ::2]
