"""Memory banks: the latest features of every training image, a bank a view."""

from __future__ import annotations

import torch
from torch import Tensor

from sslzoo.distributed import gather_detached, rank
from sslzoo.nn.numerics import normalize
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo.randomness import key, uniforms

NEGATIVES = 7  # first word of this file's keys; the framework's own end with 6


class MemoryBanks(PerSampleTable):
    """Rows (M, n, D), one an image and view.

    Starts uniform in +-sqrt(3 / D), which gives rows of length about 1, not normalised.
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
        """Copies of rows (M, N, 1+K, D): of each sample (N,) the own one, then K uniformly with replacement,
        the own one not excluded.

        Which, is a function of seed, step, ``call`` within the step and the sample's place in the global
        batch: the same negatives whatever the number of ranks.
        """
        n = len(sample_id)
        place = rank() * n + torch.arange(n, device=sample_id.device)
        drawn = uniforms(key(NEGATIVES, self.seed, step, call), place, self.negatives) * self.rows.shape[1]
        return self.read("rows", torch.cat([sample_id[:, None], drawn.long()], dim=1))

    @torch.no_grad()
    def update(self, sample_id: Tensor, features: Tensor) -> None:
        """Mix ``features`` (M, N, D) of all ranks into the rows ``sample_id`` (N,), and normalise.

        ``momentum`` weighs the old row. A sample that comes twice mixes with the old row both times; the
        last in rank order stays.
        """
        index = gather_detached(sample_id)  # (G,)
        new = gather_detached(features.transpose(0, 1)).transpose(0, 1).to(self.rows.dtype)  # (M, G, D)
        mixed = normalize(self.momentum * self.read("rows", index) + (1 - self.momentum) * new)
        self.write(index, rows=mixed)
