"""Three ways to contrast with the embeddings of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather, gather_detached, rank
from sslzoo_methods.sogclr.config import GatherGrad
from sslzoo_methods.sogclr.loss import gcl_columns_loss


def gather_columns(z: Tensor, gather_grad: GatherGrad) -> Tensor:
    """(V, b, D) of this rank to (V, B, D) of all.

    ``full``: with gradient. ``local``: only the own slice has one, so the terms "my embedding as another
    rank's negative" are lost (the official PyTorch code). ``full_noreduce``: without gradient, which
    :func:`columns_gradient` then supplies.
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
    """A zero with the gradient that ``z`` (V, b, D) has as columns of all ranks' ``anchors`` (G, B, D).

    ``log_mixed`` (G, b) and ``temperature`` (a number or (b,)) are this rank's; only these scalars are
    gathered, where the gradient of a gather reduces (V, B, D) tensors.
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
