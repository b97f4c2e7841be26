"""Diagnostics of SogCLR training, as pure functions that stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo.nn.measurements import ratio
from sslzoo_methods.sogclr.loss import Estimates


@torch.no_grad()
def objective(log_mixed: Tensor, positive: Tensor, temperature: float | Tensor) -> Tensor:
    """Estimate of the objective: the mean of tau * log u_hat - s+ over images and views (G, b)."""
    return (temperature * log_mixed - positive).mean()


@torch.no_grad()
def staleness(log_batch: Tensor, log_u: Tensor) -> Tensor:
    """Mean |log g_hat - log u| over the anchors (G, b) whose image has an entry ``log_u`` (b,), as a ratio."""
    known = torch.isfinite(log_u).expand_as(log_batch)
    gap = (log_batch - log_u).abs().where(known, 0)
    return ratio(gap.mean(), known.to(gap.dtype).mean())


@torch.no_grad()
def health(
    learned: Sequence[Estimates], log_u: Sequence[Tensor], temperature: Sequence[float | Tensor]
) -> dict[str, Tensor]:
    """Diagnostics of a step, from its estimates, the table entries ``log_u`` (b,) they replace, and the
    temperatures; one entry per modality each."""
    pairs = list(zip(learned, log_u, temperature, strict=True))
    mixed = torch.stack([e.log_mixed for e in learned])
    stale = torch.stack([staleness(e.log_batch, old) for e, old, _ in pairs]).mean(dim=0)
    return {
        "objective": torch.stack([objective(e.log_mixed, e.positive, tau) for e, _, tau in pairs]).mean(),
        "log_u_mean": mixed.mean(),
        "staleness": stale,
        "visited": stale[1],  # the share of images with an entry
        "positive_similarity": torch.stack([e.positive for e in learned]).mean(),
        # Not torch.tensor(tau, device=...), which would synchronise with the device.
        "temperature": torch.stack([(mixed.new_ones(()) * tau).mean() for tau in temperature]).mean(),
    }
