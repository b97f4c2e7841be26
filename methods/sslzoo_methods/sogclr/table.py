"""The estimator table: one number per training image, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sslzoo.checks import require
from sslzoo.distributed import gather_detached
from sslzoo_methods.sogclr.loss import Estimates

# Pairs of samples compared at once when looking for duplicates.
PAIRS = 2**21


def mean_over_duplicates(index: Tensor, values: Tensor, *, log_space: bool) -> Tensor:
    """``values`` (B,) with those of equal ``index`` (B,) replaced by their mean, all by the same bits.

    With ``log_space`` the values are logarithms and the mean is of what they are logarithms of. No host
    synchronisation, which ``unique`` or a boolean index would cost; a padded sampler repeats samples, and
    an indexed write would otherwise keep whichever came last.
    """
    batch = index.shape[0]
    position = torch.arange(batch, device=index.device)
    step = max(1, PAIRS // batch)
    merged, first = [], []
    for start in range(0, batch, step):
        same = index[start : start + step, None] == index  # (R, B)
        count = same.sum(dim=1)
        if log_space:
            merged.append(values.where(same, -torch.inf).logsumexp(dim=1) - count.to(values.dtype).log())
        else:
            merged.append(values.where(same, 0).sum(dim=1) / count)
        first.append(position.where(same, batch).amin(dim=1))
    return torch.cat(merged)[torch.cat(first)]


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


class EstimatorTable(nn.Module):
    """log u of N images (-inf: never visited) and, with ``descent``, a temperature each.

    Persistent buffers in float32, replicated: every rank makes all ranks' writes, so that the copies stay
    bit-equal whatever ranks the sampler sends an image to.
    """

    log_u: Tensor  # (N,)
    tau_i: Tensor  # (N,), or empty
    tau_grad: Tensor  # (N,), or empty: moving average of the temperatures' gradient

    def __init__(self, size: int, *, tau_init: float, descent: Descent | None) -> None:
        super().__init__()
        self.descent = descent
        count = size if descent else 0
        self.register_buffer("log_u", torch.full((size,), -torch.inf, dtype=torch.float32))
        self.register_buffer("tau_i", torch.full((count,), tau_init, dtype=torch.float32))
        self.register_buffer("tau_grad", torch.zeros(count, dtype=torch.float32))

    def read(self, index: Tensor) -> Tensor:
        """log u (b,) of the samples ``index`` (b,)."""
        require(
            self.log_u.dtype in (torch.float32, torch.float64),
            f"the estimator table was cast to {self.log_u.dtype}, too coarse to average in; use "
            "trainer.precision=bf16-mixed or 16-mixed instead of bf16-true or 16-true",
        )
        return self.log_u[index]

    @torch.no_grad()
    def write(self, index: Tensor, log_u: Tensor, slope: Tensor) -> None:
        """Store the new entries ``log_u`` (B,) of all ranks' samples ``index`` (B,); temperatures descend
        along ``slope`` (B,), once an image."""
        self.log_u[index] = mean_over_duplicates(index, log_u, log_space=True).to(self.log_u.dtype)
        if self.descent:
            slope = mean_over_duplicates(index, slope, log_space=False)
            tau, average = self.descent.step(self.tau_i[index], self.tau_grad[index], slope)
            self.tau_i[index], self.tau_grad[index] = tau, average

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
        table.write(index, rows[:, 2 * k], rows[:, 2 * k + 1])
