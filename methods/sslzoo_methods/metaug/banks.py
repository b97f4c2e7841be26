"""Memory banks with the latest features of every training image, one bank per view."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached, rank
from sslzoo.nn.numerics import normalize
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo.randomness import key, uniforms

NEGATIVES = 7  # first word of the random keys in this file; the framework's purposes are 0 to 6


class MemoryBanks(PerSampleTable):
    """Rows (M, n, D): one per view and image.

    Initialised uniformly in +-sqrt(3 / D), so that rows have length about 1; they are not normalised.
    """

    rows: Tensor

    def __init__(
        self, views: int, size: int, dim: int, *, negatives: int, momentum: float, seed: int
    ) -> None:
        bound, generator = (3 / dim) ** 0.5, torch.Generator().manual_seed(key(NEGATIVES, seed))
        rows = torch.empty(views, size, dim).uniform_(-bound, bound, generator=generator)
        super().__init__(dim=1, rows=rows)
        self.negatives, self.momentum, self.seed = negatives, momentum, seed

    def draw(self, sample_id: Tensor, *, step: int, call: int) -> Tensor:
        """Copies of rows (M, N, 1+K, D): for each sample (N,) its own row, then K rows drawn uniformly with
        replacement, which may include its own.

        The draw is a function of seed, step, ``call`` within the step and the sample's position in the global
        batch, so it does not depend on the number of ranks.
        """
        n = len(sample_id)
        place = rank() * n + torch.arange(n, device=sample_id.device)
        drawn = uniforms(key(NEGATIVES, self.seed, step, call), place, self.negatives) * self.rows.shape[1]
        return self.read("rows", torch.cat([sample_id[:, None], drawn.long()], dim=1))

    @torch.no_grad()
    def update(self, sample_id: Tensor, features: Tensor) -> None:
        """Gather ``features`` (M, N, D) from all ranks, average them into the rows ``sample_id`` (N,), and normalise.

        ``momentum`` is the weight of the old row. If a sample occurs twice, both are averaged with the old row and
        the last in rank order is stored.
        """
        index = gather_detached(sample_id)  # (G,)
        new = gather_detached(features.transpose(0, 1)).transpose(0, 1).to(self.rows.dtype)  # (M, G, D)
        mixed = normalize(self.momentum * self.read("rows", index) + (1 - self.momentum) * new)
        self.write(index, rows=mixed)
