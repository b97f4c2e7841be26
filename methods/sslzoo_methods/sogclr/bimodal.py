"""The two-way (CLIP-style) global contrastive loss (arXiv:2202.12387 and 2305.11965), as pure functions.

Shapes: b pairs of this rank, B of all ranks, D embedding width. All embeddings are L2-normalised and at
least float32. ``offset`` is the index of this rank's first pair among the B, that is rank * b.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, product
from sslzoo_methods.sogclr.config import BimodalScale, FirstVisit
from sslzoo_methods.sogclr.loss import Estimates, first_visits, floored, mix, own_image


@compilable
def bimodal_loss(
    anchors: Sequence[Tensor],
    columns: Sequence[Tensor],
    log_u: Sequence[Tensor],
    *,
    temperature: Sequence[float | Tensor],
    gamma: float,
    first_visit: FirstVisit,
    u_floor: float | None,
    scale: BimodalScale,
    offset: int,
) -> tuple[Tensor, tuple[Estimates, Estimates]]:
    """Contrast each item of one modality with the items of the other; sequences have one entry per modality.

    ``anchors`` (b, D) each, ``columns`` (B, D) each, ``log_u`` (b,) each (-inf: never visited),
    ``temperature``: numbers, scalar tensors or tensors (b,). With H = s - s+, the similarity minus that of the
    anchor's positive, and j the B - 1 other items:

    L = 1/2 1/b sum_i ( 1/(B-1) sum_j p_j H_j + the same with modalities swapped ), p_j = exp(H_j / tau) / u_hat.

    p is constant; gradients reach ``anchors`` and ``columns``. u_hat is at least ``u_floor`` (None: no bound),
    both when stored and as divisor. ``scale="official"`` omits the factor 1/(B-1), as in the authors' code.
    """
    a, b = anchors
    rows = slice(offset, offset + a.shape[0])
    options = {"gamma": gamma, "first_visit": first_visit, "u_floor": u_floor, "offset": offset}
    with autocast_off(a):
        loss_a, estimates_a = _direction(a, columns[1], columns[1][rows], log_u[0], temperature[0], **options)
        loss_b, estimates_b = _direction(b, columns[0], columns[0][rows], log_u[1], temperature[1], **options)
    factor = columns[0].shape[0] - 1 if scale == "official" else 1
    return (loss_a + loss_b) / 2 * factor, (estimates_a, estimates_b)


def _direction(
    anchors: Tensor,
    columns: Tensor,
    partners: Tensor,
    log_u: Tensor,
    temperature: float | Tensor,
    *,
    gamma: float,
    first_visit: FirstVisit,
    u_floor: float | None,
    offset: int,
) -> tuple[Tensor, Estimates]:
    """Contrast one modality's anchors (b, D) with the other's ``columns`` (B, D)."""
    batch = columns.shape[0]
    require(batch > 1, "a batch of one pair has no negatives; raise data.global_batch_size")
    tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
    tau_rows = tau[:, None] if isinstance(tau, Tensor) and tau.ndim == 1 else tau
    # H does not depend on shifts of the columns; centring them preserves float32 precision for nearly
    # collapsed features. Positives are row-wise products, because on ranks other than 0 they are not on
    # the diagonal of the (b, B) block.
    centre = columns.detach().mean(dim=0)
    shifted_positive = (anchors * (partners - centre)).sum(dim=1)
    contrast = product(anchors, (columns - centre).T) - shifted_positive[:, None]  # H
    positive = (anchors * partners).sum(dim=1)
    with torch.no_grad():
        logits = contrast / tau_rows
        logits = logits.masked_fill(own_image(anchors.shape[0], batch, offset, anchors.device), -torch.inf)
        log_batch = logits.logsumexp(dim=1) - log(batch - 1)
        log_mixed = floored(mix(log_u, log_batch, first_visits(log_u, first_visit), gamma), u_floor)
        weights = (logits - log_mixed[:, None]).exp()  # p
    repulsion = (weights * contrast).sum(dim=1) / (batch - 1)
    slope = log_mixed - repulsion.detach() / tau
    estimates = Estimates(log_mixed, log_mixed[None], log_batch[None], positive.detach()[None], slope)
    return repulsion.mean(), estimates


def global_temperature_loss(temperature: Tensor, estimates: Sequence[Estimates], *, rho: float) -> Tensor:
    """Loss term whose gradient trains a learnable scalar ``temperature``; add it to :func:`bimodal_loss`.

    The objective is 1/2 sum over modalities of the mean of tau * log g, plus rho * tau (FastCLIP-v3,
    arXiv:2407.01445). The term is tau times the estimated derivative of the objective with respect to tau,
    which is held constant. The mean is over this rank's pairs; averaging gradients over ranks makes it global.
    """
    slope = torch.stack([e.slope for e in estimates]).mean()
    return temperature * (rho + slope).detach()
