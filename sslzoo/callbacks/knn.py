"""k-NN accuracy of the backbone's features at validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sslzoo.callbacks.features import Shard, eval_sets, labelled, suffix
from sslzoo.callbacks.meter import log_metrics
from sslzoo.config import EvalConfig
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.method import EvalBatch, SSLMethod

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet


class KNN(Callback):
    """Vote each test sample by its nearest training samples: ``val/knn_top1``; of further data sets
    ``val/knn_top1/<data>/backbone``. ``results`` holds the latest values."""

    def __init__(self, cfg: EvalConfig) -> None:
        self.k, self.temperature = cfg.knn_k, cfg.knn_temperature
        self.results: dict[str, float] = {}
        self._sets: list[EvalSet] = []
        self._shards: dict[tuple[str, str], Shard] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn from the DataModule which sets there are."""
        self._sets = eval_sets(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last measurement."""
        self._shards = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect this rank's features."""
        of = self._sets[dataloader_idx]
        if of.num_classes > 0:
            assert isinstance(pl_module, SSLMethod)
            self._shards.setdefault((of.name, of.split), Shard()).add(pl_module.published["backbone"], batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Vote and log; the features are let go."""
        self.results = {}
        classes = labelled(self._sets)
        first = (next(iter(classes), ""), "backbone")
        for data, count in classes.items():
            bank, bank_labels, _ = self._shards.get((data, "train"), Shard()).tensors(pl_module.device)
            test, test_labels, _ = self._shards.get((data, "test"), Shard()).tensors(pl_module.device)
            accuracy = knn_accuracy(
                bank,
                bank_labels,
                test,
                test_labels,
                k=self.k,
                temperature=self.temperature,
                classes=count,
            )
            self.results[f"val/knn_top1{suffix(data, 'backbone', first=first)}"] = accuracy
        self._shards = {}
        log_metrics(trainer, self.results)
