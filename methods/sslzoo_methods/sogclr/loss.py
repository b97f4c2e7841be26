"""SogCLR's unimodal losses (arXiv:2202.12387), as pure functions without modules, process groups or tables.

Shapes: G anchor views, V views in total (V >= G, anchor views first), b samples of this rank, B of all
ranks, D embedding width, M = V * (B - 1) negatives per anchor: all views of all other images.
All embeddings are L2-normalised and at least float32. ``offset`` is the index of this rank's first sample
among the B, that is rank * b.

Only the similarities are differentiated. The estimates of the denominators, which weight them, are
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, ieee_matmul, product
from sslzoo.nn.streaming import stream, with_gradient
from sslzoo_methods.sogclr.config import FirstVisit, UWrite


class Estimates(NamedTuple):
    """A step's estimates for its anchors, detached."""

    log_u: Tensor  # (b,) new entries of the table
    log_mixed: Tensor  # (G, b) log u_hat, the denominators used in the gradient
    log_batch: Tensor  # (G, b) log g_hat, the estimate from this batch alone
    positive: Tensor  # (G, b) similarity to the positive
    slope: Tensor  # (b,) derivative of tau * log g by tau at the anchors' temperature, mean over views


def first_visits(log_u: Tensor, rule: FirstVisit) -> Tensor:
    """Mask (b,) of entries that take the batch's estimate unchanged, as if gamma = 1.

    ``sample``: entries never visited (-inf). ``batch``: all entries if none of them was ever visited, otherwise
    none (official code). ``none``: no entries, so a first visit stores gamma * g_hat (the paper's TPU code).
    """
    unseen = torch.isneginf(log_u)
    if rule == "batch":
        return unseen.all().expand_as(unseen)
    return unseen if rule == "sample" else torch.zeros_like(unseen)


def mix(log_u: Tensor, log_batch: Tensor, first: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma) u + gamma g_hat), or log g_hat where ``first`` is true; ``gamma`` in (0, 1]."""
    require(0 < gamma <= 1, f"gamma must lie in (0, 1], got {gamma}")
    if gamma == 1:
        return log_batch
    mixed = torch.logaddexp(log_u + log(1 - gamma), log_batch + log(gamma))
    return torch.where(first, log_batch, mixed)


def new_entries(log_mixed: Tensor, *, u_write: UWrite, gamma: float) -> Tensor:
    """New table entries (b,): the ``mean`` or ``sum`` of u_hat over the anchor views, from log u_hat (G, b).

    The paper's results use ``sum``, which diverges for gamma <= 0.5; that raises ``ValueError``.
    """
    require(
        u_write == "mean" or gamma > 0.5,
        f"u_write=sum diverges for gamma <= 0.5, got {gamma}; raise method.loss.gamma or set method.loss.u_write=mean",
    )
    total = log_mixed.logsumexp(dim=0)
    return total - log(log_mixed.shape[0]) if u_write == "mean" else total


def floored(log_u: Tensor, u_floor: float | None) -> Tensor:
    """``log_u`` clamped so that u is at least ``u_floor``; None: no bound."""
    return log_u if u_floor is None else log_u.clamp(min=log(u_floor))


def negatives(columns: Tensor) -> int:
    """Number of negatives per anchor, M, for ``columns`` (V, B, D)."""
    views, batch, _ = columns.shape
    require(batch > 1, "a batch of one image has no negatives; raise data.global_batch_size")
    return views * (batch - 1)


def own_image(rows: int, batch: int, offset: int, device: torch.device) -> Tensor:
    """Mask (b, B), bool, that is true where the column is the same image as the row."""
    return torch.arange(batch, device=device) == torch.arange(rows, device=device)[:, None] + offset


def similarities(anchors: Tensor, columns: Tensor) -> Tensor:
    """Similarities (G, b, V, B) of all anchors (G, b, D) to all columns (V, B, D)."""
    s = product(anchors.flatten(0, 1)[None], columns.flatten(0, 1).T[None])
    return s.view(*anchors.shape[:2], *columns.shape[:2])


def positives(anchors: Tensor, columns: Tensor, offset: int) -> Tensor:
    """Mean similarity (G, b) of each anchor (G, b, D) to the other views of its image."""
    own = columns[:, offset : offset + anchors.shape[1]]
    others = (own.sum(dim=0) - own[: len(anchors)]) / (len(columns) - 1)
    return (anchors * others).sum(dim=2)


def gcl_loss(
    anchors: Tensor,
    columns: Tensor,
    log_u: Tensor,
    *,
    temperature: float | Tensor,
    gamma: float,
    first_visit: FirstVisit,
    u_write: UWrite,
    u_floor: float | None,
    offset: int,
) -> tuple[Tensor, Estimates]:
    """The global contrastive loss of b images against all B (Algorithm 1).

    ``anchors`` (G, b, D), ``columns`` (V, B, D), ``log_u`` (b,) the anchors' table entries (-inf: never
    visited), ``temperature`` a number or one per image (b,).

    L = 1/b sum_i sum_v ( -s+ + 1/M sum_j p_j s_j ), where p_j = exp(s_j / tau) / u_hat is constant and j runs
    over all views of the other images. Gradients reach ``anchors`` and ``columns``. L is a surrogate that has
    the right gradient; it is not the objective tau * log g - s+, and is usually negative. ``u_floor`` only
    affects p (as in the official code), not the entries. This is the readable form, which stores several
    tensors of G*b*V*B similarities; :func:`gcl_loss_lean` gives the same result.
    """
    tau = temperature[:, None, None] if isinstance(temperature, Tensor) else temperature
    with autocast_off(anchors):
        count = negatives(columns)
        scores = similarities(anchors, columns)
        with torch.no_grad():
            excluded = own_image(anchors.shape[1], columns.shape[1], offset, anchors.device)[:, None]
            logits = (scores / tau).masked_fill(excluded, -torch.inf)
            log_batch = logits.flatten(2).logsumexp(dim=2) - log(count)
            log_mixed = mix(log_u, log_batch, first_visits(log_u, first_visit), gamma)
            weights = (logits - floored(log_mixed, u_floor)[..., None, None]).exp()  # p
        repulsion = (weights * scores).sum(dim=(2, 3)) / count  # (G, b)
        positive = positives(anchors, columns, offset)
        loss = (repulsion - positive).sum(dim=0).mean()
        return loss, _estimates(log_batch, log_mixed, repulsion, positive, temperature, u_write, gamma)


@compilable
def gcl_loss_lean(
    anchors: Tensor,
    columns: Tensor,
    log_u: Tensor,
    *,
    temperature: float | Tensor,
    gamma: float,
    first_visit: FirstVisit,
    u_write: UWrite,
    u_floor: float | None,
    offset: int,
) -> tuple[Tensor, Estimates]:
    """:func:`gcl_loss` with O(chunk) memory: the gradient is computed in the forward pass, one block of
    anchors at a time, and no similarities are stored. Differentiable once."""
    with autocast_off(anchors), ieee_matmul():
        views, images, _ = anchors.shape
        rows, flat, count = anchors.flatten(0, 1), columns.flatten(0, 1), negatives(columns)
        before, first = log_u.repeat(views), first_visits(log_u, first_visit).repeat(views)

        def mixed(part: slice, log_sum: Tensor) -> Tensor:
            return mix(before[part], log_sum - log(count), first[part], gamma)

        def weight(part: slice, log_sum: Tensor) -> Tensor:
            # p is the softmax times this and M. p <= M / gamma, so it cannot overflow.
            return (log_sum - floored(mixed(part, log_sum), u_floor)).exp() / count

        log_sum, pull, push = stream(
            rows.detach(),
            flat.detach(),
            temperature=temperature.repeat(views) if isinstance(temperature, Tensor) else temperature,
            exclude=_exclude_own(images, columns.shape[1], offset),
            weights=weight,
            pull=True,
            push=columns.requires_grad,
        )
        log_mixed = mixed(slice(None), log_sum).view(views, images)
        with torch.no_grad():
            repulsion = (pull * rows).sum(dim=1).view(views, images)
        gradients = (rows, pull.div_(images)), (flat, push.div_(images))
        log_batch = log_sum.view(views, images) - log(count)
        positive = positives(anchors, columns, offset)
        total = with_gradient(repulsion.sum(dim=0).mean(), *gradients)
        loss = total - positive.sum(dim=0).mean()
        return loss, _estimates(log_batch, log_mixed, repulsion, positive, temperature, u_write, gamma)


@compilable
def gcl_columns_loss(
    own: Tensor,
    anchors: Tensor,
    log_mixed: Tensor,
    *,
    temperature: float | Tensor,
    u_floor: float | None,
    offset: int,
) -> Tensor:
    """Loss term with the gradient that this rank's embeddings get as columns of all ranks' anchors.

    ``own`` (V, b, D) gets the gradient; ``anchors`` (G, B, D) and ``log_mixed`` (G, B) are of all ranks and
    constant; ``temperature`` is a number or (B,). Added to :func:`gcl_loss` with constant ``columns``, it gives
    the gradient of a differentiable gather without reducing (V, B, D) tensors in the backward pass
    (FastCLIP, arXiv:2407.01445). Its value is meaningless.
    """
    with autocast_off(own), ieee_matmul():
        views, images, _ = own.shape
        flat = own.flatten(0, 1)
        scale = 1 / (images * views * (anchors.shape[1] - 1))
        rows, divisor = anchors.flatten(0, 1), floored(log_mixed, u_floor).flatten()

        def weight(part: slice, log_sum: Tensor) -> Tensor:
            return (log_sum - divisor[part]).exp() * scale

        push = stream(
            rows,
            flat.detach(),
            temperature=temperature.repeat(len(anchors)) if isinstance(temperature, Tensor) else temperature,
            exclude=_exclude_own(anchors.shape[1], images, -offset),
            weights=weight,
            pull=False,
            push=True,
        ).push
        repulsion = with_gradient((push * flat.detach()).sum(), (flat, push))
        # This rank's anchors are constant here; their gradient comes from gcl_loss.
        positive = positives(anchors[:, offset : offset + images], own, 0)
        return repulsion - positive.sum(dim=0).mean()


@compilable
def ntxent_loss(anchors: Tensor, columns: Tensor, *, temperature: float, offset: int) -> Tensor:
    """SimCLR's loss in the form of SogCLR's authors: 1/b sum_i sum_v ( logsumexp_j s_j / tau - s+ / tau ).

    Shapes as in :func:`gcl_loss`; j runs over all columns except the anchor itself, including the positive.
    The views are summed, so with two views it is twice the usual mean over 2b anchors.
    """
    with autocast_off(anchors):
        scores = similarities(anchors, columns) / temperature
        views = torch.eye(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
        same = own_image(anchors.shape[1], columns.shape[1], offset, scores.device)
        itself = views[:, None, :, None] & same[None, :, None, :]
        denominator = scores.masked_fill(itself, -torch.inf).flatten(2).logsumexp(dim=2)  # (G, b)
        return (denominator - positives(anchors, columns, offset) / temperature).sum(dim=0).mean()


@torch.no_grad()
def _estimates(
    log_batch: Tensor,
    log_mixed: Tensor,
    repulsion: Tensor,
    positive: Tensor,
    temperature: float | Tensor,
    u_write: UWrite,
    gamma: float,
) -> Estimates:
    slope = (log_mixed - repulsion.detach() / temperature).mean(dim=0)
    log_u = new_entries(log_mixed, u_write=u_write, gamma=gamma)
    return Estimates(log_u, log_mixed, log_batch, positive.detach(), slope)


def _exclude_own(images: int, batch: int, offset: int) -> Callable[[slice, Tensor], None]:
    """For :func:`stream`: removes the columns of a row's own image. Rows are views of ``images`` images, columns views
    of ``batch`` images, of which number i + ``offset``, if there is one, is the rows' number i."""

    def exclude(part: slice, logits: Tensor) -> None:
        for first in range(0, part.stop, images):  # of each view
            start, stop = max(part.start, first), min(part.stop, first + images)
            if start < stop:
                own = logits[start - part.start : stop - part.start].unflatten(1, (-1, batch))
                own.diagonal(start - first + offset, dim1=0, dim2=2).fill_(-torch.inf)

    return exclude
