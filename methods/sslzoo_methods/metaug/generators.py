"""The meta augmentation generators: small MLPs that make features from features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sslzoo.heads import mlp
from sslzoo.numerics import normalize


class Generators(nn.Module):
    """One MLP a view, or one for all: from the view's normalised embedding to another one.

    Linear, batch norm, ReLU, ... Linear, with biases everywhere; no skip connection and no noise. Frozen, so
    that DDP's reducer leaves them alone and the encoder's step sends no gradient into them: the bilevel step
    differentiates copies.
    """

    def __init__(self, dim: int, hidden: int, layers: int, views: int, *, shared: bool) -> None:
        super().__init__()
        self.views = views
        widths = (dim, *[hidden] * (layers - 1), dim)
        self.nets = nn.ModuleList(mlp(widths, hidden_bias=True) for _ in range(1 if shared else views))
        self.requires_grad_(False)

    def forward(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """View u's generated features (N, D), normalised, from its normalised embeddings (N, D), which
        get their gradient."""
        return [normalize(self.nets[u % len(self.nets)](z)) for u, z in enumerate(embeddings)]
