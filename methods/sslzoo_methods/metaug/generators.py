"""The meta feature augmentation generators: small MLPs that map features to new features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslzoo.nn.heads import mlp
from sslzoo.nn.numerics import normalize
from sslzoo_methods.metaug.config import SGD, Adam, GeneratorConfig


class Generators(nn.Module):
    """One MLP per view, or one for all views, that maps normalised embeddings (N, D) to new ones.

    Linear, batch norm, ReLU, ..., Linear, all with biases; no skip connection and no noise. The parameters do not
    require gradients, so that DDP ignores them and the encoder's step does not reach them; the bilevel step
    differentiates copies.
    """

    def __init__(self, cfg: GeneratorConfig, *, views: int, dim: int) -> None:
        super().__init__()
        widths, count = (dim, *cfg.hidden, dim), 1 if cfg.shared else views
        self.nets = nn.ModuleList(mlp(widths, hidden_bias=True) for _ in range(count))
        self.requires_grad_(False)

    def forward(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Normalised generated features (N, D) per view from its normalised embeddings (N, D), to which
        gradients are propagated."""
        return [normalize(self.nets[u % len(self.nets)](z)) for u, z in enumerate(embeddings)]


def generator_optimizer(generators: Generators, cfg: SGD | Adam) -> torch.optim.Optimizer:
    """One optimiser for all generators, with a constant rate and weight decay on all parameters."""
    omega, lr, decay = generators.parameters(), cfg.lr, cfg.weight_decay
    if isinstance(cfg, SGD):
        return torch.optim.SGD(omega, lr=lr, momentum=cfg.momentum, weight_decay=decay)
    return torch.optim.Adam(omega, lr=lr, weight_decay=decay)
