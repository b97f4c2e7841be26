"""The k-NN callback: exact over unequal shards, through its hooks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, EvalBatch
from sslzoo.callbacks import evaluation as module
from sslzoo.callbacks.knn import KNN
from sslzoo.method import SSLMethod
from sslzoo.recipe.sections import EvalConfig, MethodConfig
from sslzoo.testing.ranks import run_ranks
from tests.evaluate.test_knn import by_definition, problem

CLASSES = 5


class Tiny(SSLMethod[MethodConfig]):
    Config = MethodConfig

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError


class _Sets:
    def eval_sets(self) -> list[Any]:
        sets = [("", "train", CLASSES), ("", "test", CLASSES), ("other", "train", CLASSES)]
        sets += [("other", "test", CLASSES)]
        return [SimpleNamespace(name=n, split=s, num_classes=c) for n, s, c in sets]


def _measured(rank: int, world: int, k: int = 7) -> dict[str, float]:
    """Both data sets over this rank's shares: the second is the first with test and train exchanged."""
    bank, bank_y, test, test_y = problem()
    pairs = [(bank, bank_y), (test, test_y), (test, test_y), (bank, bank_y)]
    method = Tiny(MethodConfig(name="tiny"), nn.Identity(), bank.shape[1])
    trainer: Any = SimpleNamespace(datamodule=_Sets())
    callback = KNN(EvalConfig(every_epochs=1, size=8, knn_k=k, knn_temperature=0.2))
    with pytest.MonkeyPatch.context() as patch:
        logged: list[dict[str, float]] = []
        patch.setattr(module, "log_metrics", lambda trainer, values: logged.append(dict(values)))
        callback.setup(trainer, method, "fit")
        callback.on_validation_start(trainer, method)
        for i, (x, y) in enumerate(pairs):
            own = torch.arange(rank * len(x) // world, (rank + 1) * len(x) // world)
            for n, rows in enumerate(own.split(16)):
                method.publish(backbone=x[rows])
                callback.on_validation_batch_end(
                    trainer, method, None, EvalBatch(x[rows], rows, y[rows]), n, i
                )
        callback.on_validation_epoch_end(trainer, method)
    assert logged == [callback.results]
    return callback.results


def test_results_equal_the_definition() -> None:
    bank, bank_y, test, test_y = problem()
    settings = {"k": 7, "temperature": 0.2, "classes": CLASSES}
    assert _measured(0, 1) == {
        "val/knn_top1": by_definition(bank, bank_y, test, test_y, **settings),
        "val/knn_top1/other/backbone": by_definition(test, test_y, bank, bank_y, **settings),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_unequal_shards_equal_one_process(world: int) -> None:
    assert run_ranks(world, _measured) == [_measured(0, 1)] * world


def test_more_neighbours_than_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"eval\.knn_k=1000 exceeds the 83"):
        _measured(0, 1, 1000)
