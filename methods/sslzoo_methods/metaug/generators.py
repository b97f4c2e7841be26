"""The meta augmentation generators: small MLPs that make features from features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslzoo.nn.heads import mlp
from sslzoo.nn.numerics import normalize
from sslzoo_methods.metaug.config import SGD, Adam, GeneratorConfig


class Generators(nn.Module):
    """One MLP for each of ``views``, or one for all: from the view's normalised embedding to another one.

    Linear, batch norm, ReLU, ... Linear, with biases everywhere; no skip connection and no noise. Frozen, so
    that DDP's reducer leaves them alone and the encoder's step sends no gradient into them: the bilevel step
    differentiates copies.
    """

    def __init__(self, cfg: GeneratorConfig, *, views: int, dim: int) -> None:
        super().__init__()
        widths, count = (dim, *cfg.hidden, dim), 1 if cfg.shared else views
        self.nets = nn.ModuleList(mlp(widths, hidden_bias=True) for _ in range(count))
        self.requires_grad_(False)

    def forward(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """View u's generated features (N, D), normalised, from its normalised embeddings (N, D), which
        get their gradient."""
        return [normalize(self.nets[u % len(self.nets)](z)) for u, z in enumerate(embeddings)]


def generator_optimizer(generators: Generators, cfg: SGD | Adam) -> torch.optim.Optimizer:
    """One optimiser for all generators, at a constant rate; decay acts on every parameter."""
    omega, lr, decay = generators.parameters(), cfg.lr, cfg.weight_decay
    if isinstance(cfg, SGD):
        return torch.optim.SGD(omega, lr=lr, momentum=cfg.momentum, weight_decay=decay)
    return torch.optim.Adam(omega, lr=lr, weight_decay=decay)
