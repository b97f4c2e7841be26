"""Exports: what a run leaves, what ``sslzoo export`` writes and refuses, and that no file is published unverified."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import sslzoo
from sslzoo.checkpoints import AtomicCheckpointIO, load_checkpoint
from sslzoo.data.datasets import open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.export.about import About
from sslzoo.export.encoder import Encoder
from sslzoo.export.formats import FORMATS, Safetensors, format_of
from sslzoo.nn.backbones import build_backbone
from sslzoo.recipe.load import load_recipe, to_yaml
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.sections import BackboneConfig
from tests.command import Command, fork, write_recipe

METHOD = "method={name: simclr, temperature: 0.2, projector: {widths: [16, 8]}}"
NEWEST = "run/checkpoints/step=000000006.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny.yaml`` and a finished ``run`` of it."""
    folder = tmp_path_factory.mktemp("export")
    write_recipe(folder)
    fit = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "run", "trainer.max_epochs=1", METHOD)
    assert fit.wait() == 0, fit.said
    return folder


def _export(folder: Path, *arguments: object, **options: Any) -> Command:
    command = fork(folder, "export", *arguments, **options)
    command.wait()
    return command


def _refused(command: Command, said: str) -> None:
    assert command.wait() == 2 and command.out == "", command.said
    assert said in command.err and len(command.err.splitlines()) == 1, command.said


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["sslzoo"])


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _backbone_of(checkpoint: Path) -> dict[str, Tensor]:
    stored = load_checkpoint(checkpoint)["state_dict"]
    return {k.removeprefix("backbone."): v for k, v in stored.items() if k.startswith("backbone.")}


# -- what a run leaves ------------------------------------------------------------------------------


def test_a_finished_run_leaves_its_encoder(folder: Path) -> None:
    exported = folder / "run" / "exported"
    assert sorted(p.name for p in exported.iterdir()) == ["backbone.safetensors", "backbone.safetensors.md"]
    encoder, _ = sslzoo.load_backbone(exported / "backbone.safetensors")
    assert _same(encoder.state_dict(), _backbone_of(folder / NEWEST))
    manifest = json.loads((folder / "run/manifest.json").read_text())
    summary = json.loads((folder / "run/eval/summary.json").read_text())
    said = _metadata(exported / "backbone.safetensors")
    assert said["run"]["data_fingerprint"] == manifest["data_fingerprint"]
    assert said["step"] == 6 and said["results"] == summary
    transform = {"channels": 1, "resize": None, "size": 12, "mean": [0.5], "std": [0.25]}
    assert said["preprocessing"] == transform | {"interpolation": "bilinear"}
    card = (exported / "backbone.safetensors.md").read_text()
    for text in ("Not verified yet", manifest["data_fingerprint"], "simclr", "seed: 3", "conv5"):
        assert text in card
    low, high = summary["interval_95"]["knn_top1"]
    assert (
        f"| knn_top1 | {100 * summary['knn_top1']:.1f} | {100 * low:.1f} to {100 * high:.1f} | 40 |" in card
    )
    assert summary["data_sets"]["data"]["protocol"] in card


def test_load_backbone_takes_runs_and_checkpoints_too(folder: Path) -> None:
    image = torch.randint(0, 256, (5, 1, 12, 12), dtype=torch.uint8)
    features = []
    for path in ("run", NEWEST, "run/exported/backbone.safetensors"):
        state = torch.random.get_rng_state()
        encoder, transform = sslzoo.load_backbone(folder / path)
        assert torch.equal(state, torch.random.get_rng_state()) and not encoder.training
        features.append(encoder(transform(image)))
    assert features[0].shape == (5, 256)
    assert all(torch.equal(features[0], other) for other in features)


@pytest.mark.parametrize("changes", [[], ["eval.size=10", "eval.resize=16"]])
def test_the_transform_is_that_of_evaluation(folder: Path, changes: list[str]) -> None:
    recipe = load_recipe(str(folder / "run/recipe.yaml"), changes).recipe
    source: Any = open_source(recipe.data)
    plan = plan_of(recipe, len(source), 1)
    data = SSLDataModule(recipe.data, recipe.views, recipe.eval, recipe.probe, plan, 3, source)
    raw = next(iter(data.val_dataloader()[0]))
    batch = data.on_after_batch_transfer(data.on_before_batch_transfer(raw, 0), 0)
    transform = About.of(recipe, features=0, step=0, manifest=None).preprocessing
    images = source.batch(batch.sample_id)
    assert torch.equal(transform(images), batch.image)
    if not changes:  # Pillow resizes alike, but does not round alike
        assert torch.equal(transform(to_pil_image(images[0])), batch.image[0])


# -- the command ------------------------------------------------------------------------------------


def test_the_command_verifies_and_says_so(folder: Path) -> None:
    done = _export(folder, "run", "--out", "out", "--with-projector")
    assert done.wait() == 0, done.said
    path, card, sentence = done.out.splitlines()
    assert path == "out/backbone-projector.safetensors"
    assert sentence.startswith("verified without sslzoo by torch ") and "(allowed: 1e-05)" in sentence
    text = (folder / card).read_text()
    assert sentence[1:] in text and "| projector | 16 - 8;" in text
    assert sorted(p.name for p in (folder / "out").iterdir()) == [Path(path).name, Path(card).name]
    encoder, _ = sslzoo.load_backbone(folder / path)  # which is the backbone, with or without a projector
    assert _same(encoder.state_dict(), _backbone_of(folder / NEWEST))


def test_a_file_that_fails_its_verification_is_not_published(folder: Path) -> None:
    def damage() -> None:
        right = Safetensors.write

        def write(self: Safetensors, path: Path) -> None:
            weight = next(self.encoder.backbone.parameters()).data
            kept = weight.clone()
            weight.mul_(1.001)
            right(self, path)
            weight.copy_(kept)

        Safetensors.write = write

    (folder / "kept").mkdir()
    (folder / "kept/backbone.safetensors").write_text("from before")
    failed = _export(folder, "run", "--out", "kept", before=damage)
    assert failed.wait() == 1 and failed.out == "", failed.said
    assert "backbone.safetensors gives different features: they differ by" in failed.err
    assert failed.err.endswith("nothing was published\n")
    assert [p.name for p in (folder / "kept").iterdir()] == ["backbone.safetensors"]
    assert (folder / "kept/backbone.safetensors").read_text() == "from before"


def test_an_encoder_of_one_s_own_needs_its_recipe(folder: Path, tmp_path: Path) -> None:
    own = "backbone={name: 'tests.tiny:TinyEncoder', in_channels: 1}"
    recipe = load_recipe(str(folder / "run/recipe.yaml"), [own]).recipe
    (tmp_path / "own.yaml").write_text(to_yaml(recipe))
    backbone, _ = build_backbone(recipe.backbone)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    content = {"state_dict": state, "optimizer_steps": 3, "recipe": to_yaml(recipe), "manifest": None}
    (tmp_path / "x").mkdir()
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "x/left.ckpt")
    said = "backbone.name: tests.tiny:TinyEncoder is code that this file names; if you trust it"
    _refused(_export(tmp_path, "x/left.ckpt"), said)
    done = _export(tmp_path, "x/left.ckpt", "--recipe", "own.yaml")
    assert done.wait() == 0, done.said
    exported = tmp_path / "x/exported/backbone.safetensors"
    with pytest.raises(ValueError, match="is code that this file names"):
        sslzoo.load_backbone(exported)
    mine, _ = sslzoo.load_backbone(exported, recipe=str(tmp_path / "own.yaml"))
    assert _same(mine.state_dict(), backbone.state_dict())


@pytest.mark.slow
def test_onnx_from_a_checkpoint_that_left_its_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / NEWEST, tmp_path / "left.ckpt")
    done = _export(tmp_path, "left.ckpt", "--format", "onnx")
    assert done.wait() == 0, done.said
    assert (tmp_path / "exported/backbone.onnx").is_file()
    assert "by onnxruntime" in done.out and "(allowed: 1e-03)" in done.out
    card = (tmp_path / "exported/backbone.onnx.md").read_text()
    assert "Not measured at this step." in card and "data fingerprint" in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("run", "--format", "timm"),
            "timm has no conv5 with 1 channel; it can be exported as safetensors, onnx",
        ),
        (("run", "--format", "torchvision"), "torchvision has no conv5"),
        (("run", "--format", "hf", "--with-projector"), "cannot include a projector"),
        (("run", "--format", "pickle"), "invalid choice: 'pickle'"),
        (("nowhere",), "nowhere: there is no such run directory, checkpoint or export"),
        (("images",), "images: there is no checkpoint in images/checkpoints"),
        (("tiny.yaml",), "tiny.yaml is not an sslzoo checkpoint"),
        (("broken.safetensors",), "broken.safetensors is damaged or no safetensors file"),
        (("run/exported/backbone.safetensors", "--with-projector"), "name the run, or a checkpoint of it"),
        (
            ("run", "--recipe", "simclr_cifar10"),
            f"the backbone in {NEWEST} is not that of resnet18 with stem cifar: it lacks conv1.weight, "
            "bn1.weight, bn1.bias and",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    _refused(_export(folder, *arguments), said)


# -- other libraries --------------------------------------------------------------------------------


def _encoder(cfg: BackboneConfig, size: int) -> Encoder:
    """An encoder whose norms differ from one another."""
    torch.manual_seed(1)
    backbone, features = build_backbone(cfg)
    for value in backbone.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(0.1 * torch.rand_like(value))
    base = load_recipe("simclr_cifar10", [f"eval.size={size}", f"eval.resize={size + 3}"]).recipe
    about = About.of(replace(base, backbone=cfg), features=features, step=1, manifest=None)
    return Encoder(about=about, backbone=backbone)


BOTH = ("safetensors", "timm", "torchvision", "hf")


@pytest.mark.parametrize(
    ("cfg", "formats"),
    [
        (BackboneConfig(name="resnet18"), BOTH),
        (BackboneConfig(name="resnet18", stem="cifar"), ("safetensors",)),
        (BackboneConfig(name="timm/resnet18", stem="small"), ("safetensors",)),
        (BackboneConfig(name="timm/vit_tiny_patch16_224", options={"img_size": 32}), BOTH),
        (BackboneConfig(name="timm/resnet10t"), ("safetensors", "timm", "hf")),
        pytest.param(BackboneConfig(name="resnet50"), BOTH, marks=pytest.mark.slow),
        pytest.param(
            BackboneConfig(name="vit_b_16", options={"image_size": 32}), BOTH, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: f"{value.name}-{value.stem}" if isinstance(value, BackboneConfig) else "",
)
def test_the_code_in_the_card_loads_what_is_written(
    cfg: BackboneConfig, formats: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification runs the same code in a process of its own."""
    encoder = _encoder(cfg, 32)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = encoder.module(images)
    monkeypatch.chdir(tmp_path)
    for name in FORMATS.keys() - {"onnx"}:
        if name not in formats:
            with pytest.raises(ValueError, match=r"^--format \w+: \w+ has no .*; it can be exported as safe"):
                format_of(name, encoder)
            continue
        form = format_of(name, encoder)
        form.write(tmp_path / form.file)
        place: dict[str, Any] = {"images": images.numpy()}
        exec(f"{form.code()}\n{form.call}", place)
        difference = (torch.from_numpy(place["features"]) - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-5, (name, difference)


def test_timm_prepares_images_as_evaluation_does(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]

    encoder = _encoder(BackboneConfig(name="resnet18"), 32)
    form = format_of("hf", encoder)
    form.write(tmp_path / form.file)
    model = timm.create_model(f"local-dir:{tmp_path / form.file}", pretrained=True)
    config = resolve_data_config(model.pretrained_cfg)
    transforms: Any = create_transform(**config)
    resize, crop = transforms.transforms[:2]
    assert resize.size == 35 and tuple(crop.size) == (32, 32)
    assert tuple(config["mean"]) == encoder.about.preprocessing.mean and config["interpolation"] == "bilinear"
