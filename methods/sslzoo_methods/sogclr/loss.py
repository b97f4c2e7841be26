"""SogCLR's unimodal losses (arXiv:2202.12387), as pure functions without modules, process groups or tables.

Shapes: G anchor views, V views in total (V >= G, anchor views first), b samples of this rank, B of all
ranks, D embedding width, M = V * (B - 1) negatives per anchor: all views of all other images.
All embeddings are L2-normalised and at least float32. ``offset`` is the index of this rank's first sample
among the B, that is rank * b.

Only the similarities are differentiated. The estimates of the denominators, which weight them, are
constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslzoo.checks import require
from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, ieee_matmul, product
from sslzoo_methods.sogclr.config import FirstVisit, UWrite

# Similarities computed at once by the lean form: 8 MiB in float32, to fit a CPU's last-level cache.
CHUNK = 2**21


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
    similarity = product(anchors.transpose(0, 1), own.permute(1, 2, 0)).permute(1, 2, 0)  # (G, V, b)
    itself = torch.eye(*similarity.shape[:2], dtype=torch.bool, device=anchors.device)[:, :, None]
    return similarity.masked_fill(itself, 0).sum(dim=1) / (columns.shape[0] - 1)


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
        first = first_visits(log_u, first_visit)
        tau = _per_image(temperature, log_u)
        total, repulsion, log_batch, log_mixed = _Repulsion.apply(
            anchors, columns, log_u, first, tau, gamma, u_floor, offset
        )  # type: ignore[misc]
        positive = positives(anchors, columns, offset)
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
        tau = _per_image(temperature, log_mixed[0])
        rows = slice(offset, offset + own.shape[1])
        repulsion = _ColumnRepulsion.apply(own, anchors, floored(log_mixed, u_floor), tau, offset)
        # This rank's anchors are constant here; their gradient comes from gcl_loss.
        positive = positives(anchors[:, rows], own, 0)
        return repulsion - positive.sum(dim=0).mean()  # type: ignore[no-any-return]


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


def _per_image(temperature: float | Tensor, like: Tensor) -> Tensor:
    return temperature if isinstance(temperature, Tensor) else torch.full_like(like, temperature)


def _blocks(
    anchors: Tensor, columns: Tensor, tau: Tensor, offset: int
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield blocks of anchors: (view, rows, peak (R,), e (R, V*B)), where e = exp(s / tau - peak), and 0 for the
    anchor's own image. The peak is the largest exponent of the row, so nothing overflows at any temperature; a
    row without any other image among the columns is 0."""
    views, batch, _ = columns.shape
    flat = columns.flatten(0, 1).T
    step = max(1, CHUNK // (views * batch))
    buffer = anchors.new_empty(min(step, anchors.shape[1]), views * batch)
    for g in range(anchors.shape[0]):
        for start in range(0, anchors.shape[1], step):
            rows = slice(start, min(start + step, anchors.shape[1]))
            scaled = anchors[g, rows] / tau[rows, None]
            e = torch.mm(scaled, flat, out=buffer[: scaled.shape[0]])
            e.view(-1, views, batch).diagonal(start + offset, dim1=0, dim2=2).fill_(-torch.inf)
            peak = e.amax(dim=1).clamp(min=torch.finfo(e.dtype).min)  # finite, also with no other image
            yield g, rows, peak, e.sub_(peak[:, None]).exp_()


class _Repulsion(torch.autograd.Function):
    """1/b sum_i sum_v 1/M sum_j p_j s_j; computes its gradient in the forward pass too."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        columns: Tensor,
        log_u: Tensor,
        first: Tensor,
        tau: Tensor,
        gamma: float,
        u_floor: float | None,
        offset: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, flat = negatives(columns), columns.flatten(0, 1)
        log_batch = anchors.new_empty(anchors.shape[:2])
        log_mixed, repulsion = torch.empty_like(log_batch), torch.empty_like(log_batch)
        grad_anchors = torch.empty_like(anchors)
        grad_columns = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        for g, rows, peak, e in _blocks(anchors, columns, tau, offset):
            log_batch[g, rows] = peak + e.sum(dim=1).log() - log(count)
            log_mixed[g, rows] = mix(log_u[rows], log_batch[g, rows], first[rows], gamma)
            # p = e * scale. p <= M / gamma, so the scale cannot overflow.
            scale = (peak - floored(log_mixed[g, rows], u_floor)).exp()[:, None] / count
            pulled = (e @ flat) * scale  # (R, D)
            repulsion[g, rows] = (pulled * anchors[g, rows]).sum(dim=1)
            grad_anchors[g, rows] = pulled
            if grad_columns is not None:
                grad_columns.addmm_(e.T, anchors[g, rows] * scale)
        ctx.images = anchors.shape[1]
        ctx.save_for_backward(grad_anchors, None if grad_columns is None else grad_columns.view_as(columns))
        ctx.mark_non_differentiable(repulsion, log_batch, log_mixed)
        return repulsion.sum(dim=0).mean(), repulsion, log_batch, log_mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_anchors, grad_columns = ctx.saved_tensors
        grad = grad / ctx.images
        return grad_anchors * grad, None if grad_columns is None else grad_columns * grad, *[None] * 6


class _ColumnRepulsion(torch.autograd.Function):
    """1/b sum over all ranks' anchors of 1/M sum_j p_j s_j, where j runs over this rank's columns."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, anchors: Tensor, log_divisor: Tensor, tau: Tensor, offset: int
    ) -> Tensor:
        views, images, _ = own.shape
        scale = 1 / (images * views * (anchors.shape[1] - 1))
        flat = own.flatten(0, 1)
        grad_own = torch.zeros_like(flat)
        # The image of anchor row r is this rank's column r - offset.
        for g, rows, peak, e in _blocks(anchors, own, tau, -offset):
            weight = (peak - log_divisor[g, rows]).exp()[:, None] * scale
            grad_own.addmm_(e.T, anchors[g, rows] * weight)
        ctx.save_for_backward(grad_own.view_as(own))
        return (grad_own * flat).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_own,) = ctx.saved_tensors
        return grad_own * grad, None, None, None, None
