"""Three ways to gather the embeddings of all ranks, which differ in their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather, gather_detached, rank
from sslzoo_methods.sogclr.config import GatherGrad
from sslzoo_methods.sogclr.loss import gcl_columns_loss


def gather_columns(z: Tensor, gather_grad: GatherGrad) -> Tensor:
    """Gather this rank's embeddings (V, b, D) to those of all ranks (V, B, D).

    ``full``: with gradients. ``local``: only this rank's slice has a gradient, so the gradient of an embedding
    as a negative on other ranks is lost (as in the official PyTorch code). ``full_noreduce``: without
    gradients; :func:`columns_gradient` supplies them.
    """
    if gather_grad == "full":
        return gather(z.transpose(0, 1)).transpose(0, 1)
    columns = gather_detached(z.transpose(0, 1)).transpose(0, 1)
    if gather_grad == "full_noreduce":
        return columns
    start = rank() * z.shape[1]
    return torch.cat([columns[:, :start], z, columns[:, start + z.shape[1] :]], dim=1)


def columns_gradient(
    z: Tensor, anchors: Tensor, log_mixed: Tensor, *, temperature: float | Tensor, u_floor: float | None
) -> Tensor:
    """A zero whose gradient is that of ``z`` (V, b, D) as columns of all ranks' ``anchors`` (G, B, D).

    ``log_mixed`` (G, b) and ``temperature`` (a number or (b,)) are this rank's. Only they are gathered, which
    is cheaper than the backward pass of a gather, which reduces (V, B, D) tensors.
    """
    part = gcl_columns_loss(
        z,
        anchors,
        gather_detached(log_mixed.T).T,
        temperature=gather_detached(temperature) if isinstance(temperature, Tensor) else temperature,
        u_floor=u_floor,
        offset=rank() * z.shape[1],
    )
    return part - part.detach()
