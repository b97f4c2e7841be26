"""Evaluation by protocols: any number of processes, continued after a kill, adapted to other data, compared."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import sslzoo
from sslzoo.checks import ConfigError
from sslzoo.data.crops import evaluation_crop
from sslzoo.data.loading import ViewDataset
from sslzoo.data.module import EvalSet, SSLDataModule
from sslzoo.data.sources import ArraySource, FakeSource, UnreadableImageError, fake_source, resized
from sslzoo.nn.backbones import build_backbone
from sslzoo.posthoc.target import read_target
from sslzoo.protocols.adapt import adapted
from sslzoo.protocols.classifiers import Classifiers, Length
from sslzoo.protocols.dinov2 import DINOV2_GRID
from sslzoo.protocols.honest import HONEST
from sslzoo.protocols.layers import last_layers
from sslzoo.protocols.protocol import LinearResult, Protocol, ViewProtocol, protocol_named
from sslzoo.protocols.published import published
from sslzoo.protocols.run import evaluate_linear
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import BackboneConfig, PlainView, Recipe, ViewConfig
from sslzoo.records.directory import Run
from sslzoo.run.build import build_run
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.margin.protocols import MARGIN
from sslzoo_methods.metaug.protocols import METAUG
from sslzoo_methods.mmcl.protocols import MMCL_CIFAR
from sslzoo_methods.sce.protocols import SCE, SCE_CIFAR
from sslzoo_methods.sogclr.protocols import SOGCLR, SOGCLR_TF
from tests.tiny import TinyEncoder

CPU = torch.device("cpu")
OVERRIDES = ("eval.size=12", "eval.batch_size=5", "eval.knn_k=1", "probe.holdout=0.3", "data.workers=0")
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 16}


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("simclr_fashion_mnist", [*OVERRIDES, *overrides]).recipe


def evaluated(
    protocol: ViewProtocol, recipe: Recipe | None = None, n: int = 33, **options: Any
) -> tuple[LinearResult, list[Tensor]]:
    """The result on ``n`` generated images, and all weights after the last whole epoch."""
    recipe = recipe_of() if recipe is None else recipe
    torch.manual_seed(0)
    encoder = TinyEncoder(1).double().eval()
    source = fake_source(n, 1, 12, 3)
    plan = TrainingPlan(dataset_size=n, global_batch_size=1, max_epochs=1)
    data = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
    )
    seen: list[Tensor] = []
    before = options.pop("after_epoch", lambda epoch: None)

    def after(epoch: int, classifiers: Classifiers) -> None:
        before(epoch)
        seen[:] = [p.detach().clone() for p in classifiers.linear.parameters()]

    found = evaluate_linear(protocol, encoder, recipe, data, device=CPU, after_epoch=after, **options)
    return found["data"], seen


# The last batch of MMCL's has one image: with three processes, two have none.
SEVERAL = [
    replace(SOGCLR, **SHORT),
    replace(MMCL_CIFAR, test_epochs=2, **SHORT),
    replace(MARGIN, milestones=(1, 2), **SHORT),
]


def _all(rank: int, world: int) -> list[tuple[LinearResult, list[Tensor]]]:
    return [evaluated(protocol) for protocol in SEVERAL]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_finds_what_one_does(world: int) -> None:
    alone = _all(0, 1)
    for found in run_ranks(world, _all):
        for (result, weights), (expected, single) in zip(found, alone, strict=True):
            assert result == expected
            for ours, theirs in zip(weights, single, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Killed(Exception):
    """Stands for a signal."""


def _kill(epoch: int) -> None:
    if epoch == 2:
        raise Killed


@pytest.mark.parametrize("protocol", SEVERAL, ids=lambda p: p.name)
def test_continued_after_a_kill_it_ends_with_the_same_bits(protocol: ViewProtocol, tmp_path: Path) -> None:
    expected, weights = evaluated(protocol)
    # Saved in the middle of an epoch as well as at its end.
    recipe = recipe_of("logging.checkpoint_every_steps=4")
    with pytest.raises(Killed):
        evaluated(protocol, recipe, folder=tmp_path, after_epoch=_kill)
    (state,) = tmp_path.iterdir()
    stopped = torch.load(state, weights_only=True)["step"]
    assert 0 < stopped < 3 * 3
    found, continued = evaluated(protocol, recipe, folder=tmp_path)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(continued, weights, strict=True))
    found, none = evaluated(protocol, recipe, folder=tmp_path)
    assert found == expected and none == [], "a finished evaluation takes no step"


def test_unreadable_images_are_counted_over_a_kill_too(tmp_path: Path) -> None:
    """Other images stand in for them while it learns; they are left out of the test."""

    class Torn(FakeSource):
        is_array = False

        def read(self, sample_id: int) -> Tensor:
            if sample_id % 16 == 3:
                raise UnreadableImageError("torn")
            return super().read(sample_id)

    recipe = recipe_of("data.max_bad_fraction=0.5")
    source = cast(Any, resized(Torn(33, 1, 14, 3), 12))
    sets = [
        EvalSet(name="", split=s, num_classes=3, source=source, sample_id=torch.arange(33))
        for s in ("a", "b")
    ]

    def run(folder: Path | None, after_epoch: Any = None) -> LinearResult:
        plan = TrainingPlan(dataset_size=33, global_batch_size=1, max_epochs=1)
        data = SSLDataModule(
            recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
        )
        data.eval_sets = lambda: sets  # type: ignore[method-assign]
        torch.manual_seed(0)
        encoder = TinyEncoder(1).eval()
        return evaluate_linear(
            SEVERAL[0], encoder, recipe, data, device=CPU, folder=folder, after_epoch=after_epoch
        )["data"]

    whole = run(None)
    assert (whole.n_test, whole.n_unreadable) == (31, 4)

    def kill(epoch: int, classifiers: Classifiers) -> None:
        _kill(epoch)

    with pytest.raises(Killed):
        run(tmp_path, kill)
    assert run(tmp_path) == whole
    assert run(tmp_path) == whole


def test_a_state_of_something_else_is_not_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    protocol = SEVERAL[0]
    evaluated(protocol, folder=tmp_path)
    other = replace(protocol, lrs=(0.3,))
    (found, weights), (expected, fresh) = evaluated(other, folder=tmp_path), evaluated(other)
    assert found == expected and torch.equal(weights[0], fresh[0])
    assert "belongs to another evaluation; starting anew" in caplog.text


@pytest.mark.parametrize("override", ["data.mean=[0.2] data.std=[0.3]", "probe.holdout=0.4"])
def test_a_state_of_other_images_or_preprocessing_is_not_continued(override: str, tmp_path: Path) -> None:
    protocol, other = SEVERAL[2], recipe_of(*override.split())
    with pytest.raises(Killed):
        evaluated(protocol, folder=tmp_path, after_epoch=_kill)
    (found, weights), (expected, fresh) = (
        evaluated(protocol, other, folder=tmp_path),
        evaluated(protocol, other),
    )
    assert found == expected and all(map(torch.equal, weights, fresh))


def test_nothing_is_learned_from_held_out_images() -> None:
    """Nor from what may stand in for an unreadable image."""

    class Torn(FakeSource):
        def read(self, sample_id: int) -> Tensor:
            if sample_id < 4:
                raise UnreadableImageError("torn")
            return super().read(sample_id)

    source = resized(Torn(40, 1, 14, 3), 12)  # one that is read image by image
    among = torch.arange(40) % 2 == 0
    views = ViewDataset(source, [ViewConfig(size=8, padding=0)], 0, 8, among=among)
    batch = cast(Any, views.__getitems__([(0, i) for i in range(0, 16, 2)]))
    assert len(batch.bad) >= 2
    assert all(among[i] for i in batch.sample_id) and not set(batch.sample_id.tolist()) & {0, 2}
    assert batch.images[0].shape == (8, 1, 8, 8)


def test_rows_that_are_not_finite_teach_nothing() -> None:
    def trained(x: Tensor, label: Tensor) -> Tensor:
        made = Classifiers(SOGCLR, {"": 3}, 2, Length(1, 2), seed=0, device=CPU)
        for step in range(2):
            made.add({"": x}, label)
            made.step(step)
        return made.linear[0].weight  # type: ignore[return-value]

    x, label = torch.randn(8, 3), torch.arange(8) % 2
    broken = x.clone()
    broken[3] = torch.nan
    kept = torch.arange(8) != 3
    assert torch.equal(trained(broken, label), trained(x[kept], label[kept]))


def test_several_data_sets(tmp_path: Path) -> None:
    recipe = recipe_of("probe.data=[{dataset: fashion_mnist, root: nowhere}]")
    encoder, source = TinyEncoder(1).eval(), fake_source(33, 1, 12, 3)
    plan = TrainingPlan(dataset_size=33, global_batch_size=1, max_epochs=1)
    data = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
    )
    found = evaluate_linear(SEVERAL[0], encoder, recipe, data, device=CPU, folder=tmp_path)
    assert list(found) == ["data", "fashion_mnist"]
    assert {path.name for path in tmp_path.iterdir()} == {"sogclr_data.pt", "sogclr_fashion_mnist.pt"}


# -- adapted to other data ------------------------------------------------------------------------


def test_a_protocol_keeps_its_proportions_on_other_images() -> None:
    grey, colour = fake_source(8, 1, 28, 3), fake_source(8, 3, 64, 3)
    made, changes = adapted(SCE, recipe_of("eval.size=28"), grey, 12_000)
    assert (made.view.size, made.plain) == (28, PlainView(size=28, resize=32))
    assert changes == ("images of 28 px instead of 224, all lengths in proportion",)
    made, changes = adapted(SCE_CIFAR, recipe_of("eval.size=64", "eval.resize=64"), colour, 200)
    assert (made.view.size, made.view.padding, made.batch_size, made.lrs) == (64, 8, 200, (30.0,))
    assert made.plain == PlainView(size=64, resize=64)
    assert changes[1] == "batches of 200 images instead of 256: there are no more"
    made, changes = adapted(MMCL_CIFAR, recipe_of("eval.size=64"), grey, 12_000)
    assert (made.view.blur_kernel, made.view.saturation, made.view.hue, made.view.grayscale_p) == (7, 0, 0, 0)
    assert changes[1] == "no saturation, hue and greyscale: the images are grey"
    made, _ = adapted(SOGCLR_TF, recipe_of("eval.size=28"), grey, 4096)
    assert made.plain == PlainView(size=28, proportion=0.875, interpolation="bicubic")
    assert adapted(SCE, recipe_of("eval.size=224"), colour, 12_000) == (SCE, ())
    *_, changes = adapted(SCE, recipe_of("eval.size=224", "probe.train_size=500"), colour, 500)
    assert changes[-1] == "probe.train_size=500"


def test_padded_crops_are_of_images_as_evaluation_resizes_them() -> None:
    source = fake_source(6, 3, 20, 3)
    small = resized(source, 10)
    assert resized(source, 20) is source
    assert (len(small), small.num_classes, small.where(3)) == (6, 3, source.where(3))
    assert small.fingerprint != source.fingerprint
    shown = evaluation_crop(source.batch(torch.arange(6)), PlainView(size=10, resize=10))
    assert torch.equal(torch.stack([small.read(i) for i in range(6)]), shown)
    images = np.random.default_rng(0).integers(0, 256, (33, 1, 24, 24), dtype=np.uint8)
    labels = np.arange(33, dtype=np.int64) % 3
    recipe = recipe_of("eval.resize=12", "eval.size=12")
    plan = TrainingPlan(dataset_size=33, global_batch_size=1, max_epochs=1)
    source = ArraySource("mine", "train", images, labels, ("a", "b", "c"))
    data = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
    )
    data.eval_sets = lambda: _train_and_test(source)  # type: ignore[method-assign]
    encoder = TinyEncoder(1).eval()
    found = evaluate_linear(replace(SCE_CIFAR, milestones=(1,), **SHORT), encoder, recipe, data, device=CPU)
    assert found["data"].n_test == 33


def _train_and_test(source: ArraySource) -> list[Any]:
    return [
        EvalSet(name="", split=split, num_classes=3, source=source, sample_id=torch.arange(33))
        for split in ("train", "test")
    ]


# -- encoders -------------------------------------------------------------------------------------


def test_all_backbones_of_a_method_need_the_method() -> None:
    with pytest.raises(ValueError, match="give a run directory or a checkpoint instead of an export"):
        evaluated(METAUG)
    stranger = cast(Any, type("Method", (), {"cfg": recipe_of().method}))
    with pytest.raises(ValueError, match="backbones of MetAug, not of simclr"):
        evaluated(METAUG, method=stranger)


def test_the_backbones_of_a_checkpoint_are_evaluated_together(tmp_path: Path) -> None:
    """Three of MetAug's, on L, ab and Lab; the features of the generators are left out."""
    small = (
        "backbone.name=tests.tiny:TinyEncoder", "views.0.size=12", "eval.size=12", "eval.resize=null", "eval.knn_k=1",
        "method.projector.widths=[8, 4]", "method.generator.hidden=[8, 8]", "method.keys.negatives=4",
        "data.global_batch_size=8", "data.workers=0", "trainer.max_epochs=1", "trainer.accelerator=cpu",
        "logging.wandb=null",
    )  # fmt: skip
    recipe = load_recipe("metaug_official_cifar10", small).recipe
    source = fake_source(16, 3, 12, 3)
    run = build_run(recipe, Run(tmp_path, "colours"), source=source)
    run.trainer.fit(run.method, datamodule=run.data)
    target = read_target(str(tmp_path / "checkpoints" / "last.ckpt"), recipe)
    trained = run.method.backbone.eval()
    x = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(target.backbone(x), trained(x))
    seen: list[int] = []
    found = evaluate_linear(
        replace(METAUG, epochs=1, milestones=(1,)), target.backbone, recipe, run.data, device=CPU, method=target.method,
        after_epoch=lambda epoch, classifiers: seen.append(cast(Any, classifiers.linear[0]).in_features),
    )  # fmt: skip
    assert seen == [3 * TinyEncoder.num_features]
    assert found["data"].n_test == 16


def test_layers_of_a_vision_transformer() -> None:
    """Class tokens of the last blocks after the final norm, and the mean of the last patch tokens, as in DINOv2."""
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 5, "num_heads": 2}
    vit, width = build_backbone(BackboneConfig(name="timm/vit_tiny_patch16_224", options=options))
    vit.eval()
    blocks: list[Tensor] = []
    for block in cast(Any, vit).blocks:
        block.register_forward_hook(lambda _, __, out: blocks.append(out))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = last_layers(vit)(x)
        normed = [cast(Any, vit).norm(out) for out in blocks[-4:]]
    assert {name: features.shape[1] for name, features in found.items()} == {
        "1 layer": width, "1 layer, average": 2 * width, "4 layers": 4 * width, "4 layers, average": 5 * width,
    }  # fmt: skip
    torch.testing.assert_close(found["1 layer"], normed[-1][:, 0])
    torch.testing.assert_close(found["4 layers"], torch.cat([out[:, 0] for out in normed], dim=1))
    torch.testing.assert_close(found["4 layers, average"][:, 4 * width :], normed[-1][:, 1:].mean(1))


@pytest.mark.parametrize(("name", "last"), [("resnet18", 512), ("timm/test_resnet", 64)])
def test_layers_of_a_convolutional_network(name: str, last: int) -> None:
    net, _ = build_backbone(BackboneConfig(name=name))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = last_layers(net.eval())(x)
        torch.testing.assert_close(found["1 layer"][:, :last], net(x)[:, :last])
    assert found["4 layers"].shape[1] > found["1 layer"].shape[1]
    assert list(last_layers(TinyEncoder(3))(x)) == ["1 layer"]


def test_the_grid_is_chosen_on_held_out_images_and_says_what_the_test_set_would_choose() -> None:
    net, _ = build_backbone(BackboneConfig(name="resnet18", in_channels=1))
    recipe, source = recipe_of(), fake_source(33, 1, 12, 3)
    plan = TrainingPlan(dataset_size=33, global_batch_size=1, max_epochs=1)
    data = SSLDataModule(
        recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
    )
    protocol = replace(DINOV2_GRID, epochs=1, batch_size=8)
    found = evaluate_linear(protocol, net.eval(), recipe, data, device=CPU)["data"]
    assert found.held_out_top1 is not None and found.best is not None
    assert found.best.top1 >= found.top1
    assert found.best.classifier.startswith("rate ") and found.best.classifier.endswith(
        (", 1 layer", ", 4 layers")
    )


# -- where protocols come from --------------------------------------------------------------------

ROOT = Path(sslzoo.__file__).parents[1]


def test_every_protocol_is_registered_under_its_name() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "sslzoo.protocols"
    ]
    for name, target in points.items():
        protocol = EntryPoint(name=name, value=target, group="sslzoo.protocols").load()
        assert isinstance(protocol, Protocol)
        assert protocol.name == name
        assert protocol.source and protocol.summary
    names = "honest sce sce_cifar sogclr sogclr_cifar sogclr_tf mmcl mmcl_cifar metaug margin dinov2_grid"
    assert set(points) == set(names.split())


def test_a_protocol_of_ones_own_is_named_by_module_and_attribute() -> None:
    assert protocol_named("sslzoo_methods.sce.protocols:SCE") is SCE
    with pytest.raises(ValueError, match="did you mean sce"):
        protocol_named("scee")
    with pytest.raises(ValueError, match="is no protocol of linear evaluation, but 0"):
        protocol_named("sslzoo.randomness:VIEWS")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        protocol_named("sslzoo_methods.sce.protocols:SCEE")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lrs": ()}, "lrs must not be empty"),
        ({"lrs": (0.1, 0.2)}, "several classifiers need held_out=True"),
        ({"milestones": (1,)}, "schedule steps needs milestones, and no other does"),
        ({"test_epochs": None}, "reported=best needs test_epochs"),
    ],
)
def test_a_protocol_without_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SCE, **changes)


# -- published figures ----------------------------------------------------------------------------


def test_a_published_figure_is_comparable_by_its_own_recipe_and_protocol_alone() -> None:
    same = published(load_recipe("sce_in1k", ["data.workers=2", "trainer.devices=2", "seed=7"]).recipe)
    assert same is not None
    assert (same.figure, same.source) == ("72.7", "README of the official code")
    assert same.incomparable(SCE) == ""
    assert same.incomparable(SCE, ["images of 160 px"]) == "the protocol is adapted"
    assert same.incomparable(HONEST) == "by protocol sce"
    other = published(load_recipe("sce_in1k", ["optim.lr=0.4", "trainer.max_epochs=199"]).recipe)
    assert other is not None
    assert other.incomparable(SCE) == "the recipe differs in optim.lr, trainer.max_epochs"
    unknown = published(load_recipe("sogclr_in1k").recipe)
    assert unknown is not None
    assert unknown.incomparable(SOGCLR_TF) == "by a protocol that is not known or not offered"
    assert published(recipe_of()) is None
    assert published(replace(load_recipe("sce_in1k").recipe, name="mine")) is None
