"""Weights to start from: the libraries' caches, files, what does not fit, and what is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.weights import MissingWeights
from sslzoo.recipe.sections import PRETRAINED, BackboneConfig
from tests.tiny import TinyEncoder

TINY = "tests.tiny:TinyEncoder"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of both libraries, and no network."""

    def unreachable(*_: Any) -> None:
        raise URLError("no network here")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def built(name: str, weights: Path | str, **options: Any) -> nn.Module:
    return build_backbone(BackboneConfig(name=name, weights=str(weights), **options))[0]


def filled(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that no initialisation gives."""
    return {
        name: torch.full_like(value, i % 7 + 1) for i, (name, value) in enumerate(model.state_dict().items())
    }


def in_torch_hub(caches: Path) -> dict[str, Tensor]:
    """ResNet-18 where torchvision would have put it."""
    state = filled(models.resnet18())
    path = caches / "torch" / "hub" / "checkpoints" / Path(models.ResNet18_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return state


def in_hugging_face(caches: Path, drop: str = "") -> dict[str, Tensor]:
    """A small timm model where Hugging Face's client would have put it, without ``drop``."""
    state = filled(timm.create_model("test_resnet"))
    folder = caches / "hf" / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    kept = {name: value for name, value in state.items() if name != drop}
    save_file(kept, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return state


def check_same(model: nn.Module, state: dict[str, Tensor], first: str = "") -> None:
    for name, value in model.state_dict().items():
        if name != first:
            assert torch.equal(value, state[name]), name
    if first:  # a grey image is what it was as RGB
        torch.testing.assert_close(model.state_dict()[first], state[first].sum(dim=1, keepdim=True))


@pytest.mark.parametrize("channels", [3, 1])
def test_torchvisions_own_from_torchs_cache(channels: int, caches: Path) -> None:
    state = in_torch_hub(caches)
    model = built("resnet18", PRETRAINED, in_channels=channels, options={"zero_init_residual": True})
    assert isinstance(model.fc, nn.Identity)
    check_same(model, state, "conv1.weight" if channels == 1 else "")


@pytest.mark.parametrize("channels", [3, 1])
def test_timms_own_from_hugging_faces_cache(channels: int, caches: Path) -> None:
    state = in_hugging_face(caches)
    model = built("timm/test_resnet", PRETRAINED, in_channels=channels)
    check_same(model, state, "conv1.0.weight" if channels == 1 else "")
    assert not any(isinstance(v, dict) for v in cast(Any, model).pretrained_cfg.values()), (
        "a second copy of the weights"
    )


def test_a_cached_file_that_lacks_something_is_refused(caches: Path) -> None:
    in_hugging_face(caches, drop="layer1.0.conv1.weight")
    with pytest.raises(
        ValueError, match=r"model.safetensors lacks tensors of timm/test_resnet.*layer1.0.conv1"
    ):
        built("timm/test_resnet", PRETRAINED)


def test_offline_one_line_says_which_file_is_missing_and_how_to_get_it(caches: Path) -> None:
    with pytest.raises(MissingWeights) as vision:
        built("resnet18", PRETRAINED)
    assert str(vision.value) == (
        f"backbone.weights: resnet18-f37072fd.pth is not in {caches}/torch/hub/checkpoints and cannot be "
        "downloaded (<urlopen error no network here>); download "
        "https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere and copy it there, "
        "or set TORCH_HOME to a folder with hub/checkpoints"
    )
    with pytest.raises(MissingWeights) as hugging:
        built("timm/resnet18.a1_in1k", PRETRAINED)
    said = str(hugging.value)
    assert "\n" not in said and f"model.safetensors of timm/resnet18.a1_in1k is not in {caches}/hf" in said
    assert "`hf download timm/resnet18.a1_in1k model.safetensors` elsewhere" in said and "HF_HOME" in said


@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pth", "wrapped.pth"])
def test_a_file(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also as DDP and others save it, with a classifier, and with a changed stem that it was made with."""
    whole = models.resnet18()
    whole.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    state, path = filled(whole), tmp_path / kind
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
        torch.save(wrapped if kind == "wrapped.pth" else state, path)
    with caplog.at_level("INFO"):
        check_same(built("resnet18", path, stem="cifar"), state)
    assert f"tensors in {path} that the encoder does not have were ignored: fc." in caplog.text
    if kind != "weights.safetensors":  # one is enough
        return
    check_same(built("resnet18", path, stem="small", in_channels=1), state, "conv1.weight")
    with pytest.raises(ValueError, match=r"conv1.weight \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"):
        built("resnet18", path)


def test_a_plug_ins_file(tmp_path: Path) -> None:
    state = filled(TinyEncoder())
    torch.save(state, tmp_path / "tiny.pt")
    check_same(built(TINY, tmp_path / "tiny.pt", in_channels=1), state)


class Code:
    """Of a pickle that would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_are_refused(tmp_path: Path) -> None:
    state = TinyEncoder().state_dict()
    files = {
        "code.pth": ({"x": Code(tmp_path / "ran")}, "code in a file is never executed"),
        "part.pth": (
            {"0.weight": state["0.weight"]},
            r"lacks 5 of the 6 tensors of .*: 0.bias|lacks 4 of the 6",
        ),
        "list.pth": ([1, 2], "contains no state dict"),
        "step=1.ckpt": ({"optimizer_steps": 1, "state_dict": state}, "--init-from .*step=1.ckpt"),
    }
    for name, (content, said) in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=said):
            built(TINY, tmp_path / name, in_channels=1)
    assert not (tmp_path / "ran").exists()
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "part.pth").read_bytes()[:200])
        with pytest.raises(ValueError, match="damaged"):
            built(TINY, tmp_path / name, in_channels=1)
    with pytest.raises(MissingWeights, match=r"there is no file .*none.pth; give a file, or pretrained"):
        built(TINY, tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet18", "options": {"weights": "x"}}, "options.weights must be left out; set backbone.weights"),
        ({"name": "timm/resnet18", "options": {"pretrained": True}}, "options.pretrained must be left out"),
        ({"name": "conv5", "weights": PRETRAINED}, "weights must be a file, or left out: conv5"),
        ({"name": TINY, "weights": PRETRAINED}, "weights must be a file, or left out"),
        ({"name": "resnet18", "weights": PRETRAINED, "stem": "cifar"}, "stem must be imagenet with weights pretrained"),
        ({"name": "resnet18", "weights": ""}, "weights must be pretrained, a file, or null"),
        ({"name": "resnet18", "options": {"depth": 3}}, "backbone.options must be arguments of resnet18: .*depth"),
        ({"name": "timm/test_resnet.none", "weights": PRETRAINED}, "no weights for test_resnet.none; there are"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_backbone(BackboneConfig(**options))
