"""The NT-Xent loss, as a pure function without modules, state or process groups.

Shapes: N samples on this rank, M on all ranks, V views of which the first G are global, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, product


@compilable
def nt_xent(
    anchors: Sequence[Tensor], candidates: Sequence[Tensor], *, offset: int, temperature: float
) -> Tensor:
    """Cross-entropy of identifying an image's other views among all embeddings of the batch.

    ``anchors``: V views, each (N, D); ``candidates``: the first G of them gathered from all ranks, each
    (M, D), where row ``offset + i`` is anchor row i. All L2-normalised; gradients reach both.
    An anchor is compared with every candidate except itself. The result is the mean over anchors and, with
    more than two views, over the positives of an anchor; each positive also stays in the denominators of
    the others. With two views this is equation 1 of arXiv:2002.05709.
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
