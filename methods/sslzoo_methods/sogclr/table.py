"""The estimator table: one number per training image, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslzoo.config import require
from sslzoo.distributed import gather_detached

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


def descend(
    tau: Tensor,
    average: Tensor,
    gradient: Tensor,
    *,
    eta: float,
    beta: float,
    tau_min: float,
    tau_max: float,
) -> tuple[Tensor, Tensor]:
    """New temperatures and new moving averages of their gradient (arXiv:2305.11965, Algorithm 1).

    ``beta`` is the weight of the new gradient, ``eta`` the rate.
    """
    average = (1 - beta) * average + beta * gradient
    return (tau - eta * average).clamp(tau_min, tau_max), average


class EstimatorTable(nn.Module):
    """log u of N images (-inf: never visited) and, where individual, their temperatures.

    Persistent buffers in float32, replicated: every rank gathers what all have learned and makes the
    same writes, so the copies stay bit-equal whatever ranks the sampler sends an image to.
    """

    log_u: Tensor  # (N,)
    tau_i: Tensor  # (N,), or empty
    tau_grad: Tensor  # (N,), or empty: moving average of the temperatures' gradient

    def __init__(self, size: int, *, tau_init: float, individual: bool) -> None:
        super().__init__()
        self.individual = individual
        count = size if individual else 0
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

    def temperatures(self, index: Tensor) -> Tensor:
        """Individual temperatures (b,)."""
        return self.tau_i[index]

    @torch.no_grad()
    def write(self, index: Tensor, log_u: Tensor) -> None:
        """Store the new entries ``log_u`` (b,) of every rank's samples ``index`` (b,)."""
        index, log_u = gather_detached(index), gather_detached(log_u)
        self.log_u[index] = mean_over_duplicates(index, log_u, log_space=True).to(self.log_u.dtype)

    @torch.no_grad()
    def descend(
        self, index: Tensor, gradient: Tensor, *, eta: float, beta: float, tau_min: float, tau_max: float
    ) -> None:
        """One step of every rank's temperatures ``index`` (b,) along ``gradient`` (b,), once per image."""
        index, gradient = gather_detached(index), gather_detached(gradient)
        gradient = mean_over_duplicates(index, gradient, log_space=False)
        self.tau_i[index], self.tau_grad[index] = descend(
            self.tau_i[index],
            self.tau_grad[index],
            gradient,
            eta=eta,
            beta=beta,
            tau_min=tau_min,
            tau_max=tau_max,
        )

    def visited(self) -> Tensor:
        """Fraction of the images that have an entry."""
        return self.log_u.isfinite().float().mean()
