"""SimCLR: A Simple Framework for Contrastive Learning (Chen et al., ICML 2020, arXiv:2002.05709)."""

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.distributed import gather, rank
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import build_head
from sslzoo.nn.numerics import normalize
from sslzoo_methods.simclr.config import SimCLRConfig
from sslzoo_methods.simclr.loss import nt_xent_lean


class SimCLR(SSLMethod[SimCLRConfig]):
    """SimCLR: identify the two views of an image among all views of the batch. Stateless."""

    Config = SimCLRConfig

    def __init__(self, cfg: SimCLRConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = build_head(feature_dim, cfg.projector)

    def loss(self, batch: Batch) -> Tensor:
        """NT-Xent over all views; local crops are used only as anchors."""
        features = [self.backbone(view) for view in (*batch.global_views, *batch.local_views)]
        projected = [self.projector(h) for h in features]
        self.publish(backbone=features[0], projector=projected[0])
        embeddings = [normalize(z) for z in projected]  # V x (N, D)
        candidates = [gather(z) for z in embeddings[: len(batch.global_views)]]  # G x (M, D)
        with torch.no_grad():
            self.record("method/positive_similarity", (embeddings[0] * embeddings[1]).sum(dim=1).mean())
        offset = rank() * len(batch.sample_id)
        return nt_xent_lean(embeddings, candidates, offset=offset, temperature=self.cfg.temperature)

    def depends_on_processes(self) -> str:
        """It does not: the loss has the images of all processes."""
        return ""

    def depends_on_micro_batches(self) -> str:
        """It does."""
        return "SimCLR contrasts the images of a micro-batch with one another"

    def contrasted(self, batch: Batch) -> Contrast:
        """Projections of two global views."""
        return Contrast.of_views(
            batch, lambda x: self.projector(self.backbone(x)), temperature=self.cfg.temperature
        )

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone`` (N, F) and ``projector`` (N, D)."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}
