"""k-NN accuracy of the backbone's features at validation."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from sslzoo.callbacks.evaluation import FeatureEvaluation
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.recipe.sections import EvalConfig


class KNN(FeatureEvaluation):
    """Vote each test sample by its nearest training samples: ``val/knn_top1``."""

    def __init__(self, cfg: EvalConfig) -> None:
        super().__init__(layers=("backbone",))
        self.k, self.temperature = cfg.knn_k, cfg.knn_temperature

    def measure(self, pl_module: LightningModule, data: str, layer: str) -> dict[str, float]:
        """The weighted vote of the training features."""
        bank, bank_labels, _ = self.collected(data, "train", layer, pl_module.device)
        test, test_labels, _ = self.collected(data, "test", layer, pl_module.device)
        accuracy = knn_accuracy(
            bank,
            bank_labels,
            test,
            test_labels,
            k=self.k,
            temperature=self.temperature,
            classes=self.classes[data],
        )
        return {"val/knn_top1": accuracy}
