"""The NT-Xent loss, as a pure function without modules, state or process groups.

Shapes: N samples on this rank, M on all ranks, V views of which the first G are global, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, product
from sslzoo.nn.streaming import stream, with_gradient


def nt_xent(
    anchors: Sequence[Tensor], candidates: Sequence[Tensor], *, offset: int, temperature: float
) -> Tensor:
    """Cross-entropy of identifying an image's other views among all embeddings of the batch.

    ``anchors``: V views, each (N, D); ``candidates``: the first G of them gathered from all ranks, each
    (M, D), where row ``offset + i`` is anchor row i. All L2-normalised; gradients reach both.
    An anchor is compared with every candidate except itself. The result is the mean over anchors and, with
    more than two views, over the positives of an anchor; each positive also stays in the denominators of
    the others. With two views this is equation 1 of arXiv:2002.05709. This is the readable form, which stores
    several matrices of N x GM similarities; :func:`nt_xent_lean` gives the same result.
    """
    keys = torch.cat(list(candidates))  # (G*M, D)
    rows = torch.arange(len(anchors[0]), device=keys.device)
    own = [g * len(candidates[0]) + offset + rows for g in range(len(candidates))]  # columns of each image
    terms: list[Tensor] = []
    with autocast_off(keys):
        for v, anchor in enumerate(anchors):
            logits = product(anchor, keys.T) / temperature  # (N, G*M)
            positives = [logits[rows, own[g]] for g in range(len(candidates)) if g != v]
            if v < len(candidates):
                logits = logits.index_put((rows, own[v]), logits.new_full((), -torch.inf))
            log_partition = logits.logsumexp(dim=1)
            terms.append(torch.stack([log_partition - positive for positive in positives]).mean())
    return torch.stack(terms).mean()


@compilable
def nt_xent_lean(
    anchors: Sequence[Tensor], candidates: Sequence[Tensor], *, offset: int, temperature: float
) -> Tensor:
    """:func:`nt_xent` with the memory of a block of similarities: the gradient is computed in the forward pass.
    Differentiable once."""
    views, n, m = len(anchors), len(anchors[0]), len(candidates[0])
    rows, keys = torch.cat(list(anchors)), torch.cat(list(candidates))  # (V*N, D), (G*M, D)

    def exclude(part: slice, logits: Tensor) -> None:
        """Remove the anchors themselves, which are candidates in the first G views."""
        for v in range(len(candidates)):
            start, stop = max(part.start, v * n), min(part.stop, (v + 1) * n)
            if start < stop:
                own = logits[start - part.start : stop - part.start, v * (m - n) + offset + start :]
                own.diagonal().fill_(-torch.inf)

    with autocast_off(keys):
        log_sum, pull, push = stream(
            rows.detach(),
            keys.detach(),
            temperature=temperature,
            exclude=exclude,
            weights=None,
            pull=True,
            push=keys.requires_grad,
        )
        scale = 1 / (views * n * temperature)
        partition = with_gradient(log_sum.mean(), (rows, pull.mul_(scale)), (keys, push.mul_(scale)))
        positive = torch.zeros_like(partition)
        for v, anchor in enumerate(anchors):
            partners = [key[offset : offset + n] for g, key in enumerate(candidates) if g != v]
            similar = (anchor * (sum(partners[1:], partners[0]))).sum()
            positive = positive + similar * (scale / len(partners))
        return partition - positive
