"""Evaluation at validation: over unequal shards, of every data set and layer, under the right names."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, EvalBatch
from sslzoo.callbacks import evaluation as module
from sslzoo.callbacks.evaluation import KNN, FeatureEvaluation, LinearProbe, published
from sslzoo.evaluate.figures import Measured
from sslzoo.evaluate.task import Samples
from sslzoo.method import SSLMethod
from sslzoo.recipe.sections import EvalConfig, MethodConfig, ProbeConfig
from sslzoo.testing.ranks import run_ranks
from tests.evaluate.test_knn import by_definition, problem

CLASSES = 5
PROBE = ProbeConfig(holdout=0.25, layers=("double", "backbone"))
EVAL = EvalConfig(every_epochs=1, size=8, knn_k=7, knn_temperature=0.2)


class Tiny(SSLMethod[MethodConfig]):
    Config = MethodConfig

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError


class _Sets:
    """Eval sets of a DataModule: the training data's own, and one of probe.data, in which train and test change
    places."""

    def __init__(self, names: tuple[str, ...], missing: int) -> None:
        self.names, self.missing = names, missing

    def validation_sets(self) -> list[Any]:
        sizes = {
            ("", "train"): 83 + self.missing,
            ("", "test"): 41,
            ("other", "train"): 41,
            ("other", "test"): 83,
        }
        return [
            SimpleNamespace(
                name=name,
                split=split,
                num_classes=CLASSES,
                size=sizes[name, split],
                source=range(sizes[name, split]),
            )
            for name in self.names
            for split in ("train", "test")
        ]


def _measured(
    rank: int,
    world: int,
    names: tuple[str, ...] = ("", "other"),
    probe: ProbeConfig = PROBE,
    evaluation: EvalConfig = EVAL,
    missing: int = 0,
) -> tuple[Measured, dict[str, float]]:
    """What is found over this rank's shares, and what is logged. ``missing`` training images could not be read."""
    bank, bank_y, test, test_y = problem()
    pairs = {"": [(bank, bank_y), (test, test_y)], "other": [(test, test_y), (bank, bank_y)]}
    method = Tiny(MethodConfig(name="tiny"), nn.Identity(), bank.shape[1])
    trainer: Any = SimpleNamespace(datamodule=_Sets(names, missing), is_global_zero=rank == 0)
    none: Any = SimpleNamespace(measure=lambda *_: {}, state_dict=dict)  # see test_representation.py
    callback = FeatureEvaluation([LinearProbe(probe), KNN(evaluation)], none, probe, evaluation, seed=3)
    logged: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "log_metrics", lambda trainer, values: logged.update(values))
        callback.setup(trainer, method, "fit")
        callback.on_validation_start(trainer, method)
        for i, (x, y) in enumerate(pair for name in names for pair in pairs[name]):
            own = torch.arange(rank * len(x) // world, (rank + 1) * len(x) // world)
            for n, rows in enumerate(own.split(16)):
                method.publish(backbone=x[rows], double=2 * x[rows])
                callback.on_validation_batch_end(
                    trainer, method, None, EvalBatch(x[rows], rows, y[rows]), n, i
                )
        callback.on_validation_epoch_end(trainer, method)
    assert callback.latest is not None
    return callback.latest, logged


def test_plain_names_are_the_backbones_on_the_first_data() -> None:
    found, logged = _measured(0, 1)
    ends = ("", "/data/double", "/other/backbone", "/other/double")
    linear = {f"linear_{metric}{end}" for metric in ("top1", "top5", "l2") for end in ends}
    assert set(found.figures) == linear | {"knn_top1", "knn_top1/other/backbone"}
    assert logged == {f"val/{key}": value for key, value in found.figures.items()}
    bank, bank_y, test, test_y = problem()
    settings = {"k": 7, "temperature": 0.2, "classes": CLASSES}
    assert found.figures["knn_top1"] == by_definition(bank, bank_y, test, test_y, **settings)
    assert found.figures["knn_top1/other/backbone"] == by_definition(test, test_y, bank, bank_y, **settings)
    assert found.figures["linear_top1"] == found.figures["linear_top1/data/double"] > 0.5  # scale is nothing


def test_where_labels_are_elsewhere_alone_these_are_first() -> None:
    found, _ = _measured(0, 1, ("other",))
    assert {key for key in found.figures if "/" in key} == {
        f"linear_{metric}/other/double" for metric in ("top1", "top5", "l2")
    }
    assert list(found.samples) == ["other"]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_what_one_process_does(world: int) -> None:
    assert run_ranks(world, _measured) == [_measured(0, 1)] * world


def test_samples_are_counted_by_what_they_are_for() -> None:
    found, _ = _measured(0, 1, missing=2)
    data = found.samples["data"]
    assert data.n_train + data.n_held_out == 83 and 10 < data.n_held_out < 35
    assert (data.n_bank, data.n_test, data.n_unreadable) == (83, 41, 2)
    assert found.samples["other"].n_unreadable == 0
    assert Measured.from_state(found.to_state()) == found


@pytest.mark.parametrize("world", [1, 3])
def test_a_small_bank_leaves_the_linear_probe_alone_and_the_other_way_round(world: int) -> None:
    full, _ = _measured(0, 1)
    for probe, evaluation, moved in (
        (PROBE, replace(EVAL, bank_size=9), "knn"),
        (replace(PROBE, train_size=40), EVAL, "linear"),
    ):
        ranks = run_ranks(world, _measured, ("",), probe, evaluation)
        (cut, _) = ranks[0]
        assert ranks == [ranks[0]] * world
        changed = {key for key, value in cut.figures.items() if value != full.figures[key] and "top1" in key}
        assert changed and all(moved in key for key in changed)
        data, whole = cut.samples["data"], full.samples["data"]
        if moved == "knn":
            assert data == whole._replace(n_bank=9)
        else:
            assert data.n_train + data.n_held_out == 40 and data.n_bank == 83


def test_the_log_says_on_what_and_for_how_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sslzoo"):
        _measured(0, 1)
    _, own, other = (record.getMessage() for record in caplog.records)
    assert own.startswith("evaluated on data: ") and "83 for k-NN, 41 for testing, 0 unreadable; " in own
    assert "linear probe 0." in own and "k-NN 0." in own
    assert other.startswith("evaluated on other: ")


def test_an_unknown_layer_names_those_there_are() -> None:
    method = Tiny(MethodConfig(name="tiny"), nn.Identity(), 6)
    method.publish(backbone=torch.zeros(1, 6))
    with pytest.raises(ValueError, match="publishes backbone"):
        published(method, "projector")


def test_samples_in_words() -> None:
    said = Samples(10_786, 1_214, 12_000, 2_000, 0).in_words()
    assert (
        said
        == "10,786 images for training, 1,214 for selection, 12,000 for k-NN, 2,000 for testing, 0 unreadable"
    )
