"""Export formats: the encoders that they support, their files, and the code that loads these without sslzoo."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sslzoo.checks import require
from sslzoo.export.about import KEY, Preprocessing
from sslzoo.export.encoder import SUFFIX, Encoder
from sslzoo.export.layouts import Layout, classifier_of, timm_layout, torchvision_layout
from sslzoo.recipe.registry import is_plugin

IMAGES = 2  # in the batch from which an ONNX graph is traced; it takes any number


class Format(ABC):
    """Base class of the export formats. ``name`` is the value of ``--format``."""

    name: ClassVar[str]
    ending: ClassVar[str]  # of the file's name
    tolerance: ClassVar[float] = 1e-5  # of features, as a fraction of the largest one
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
    )  # that load it; what the verification reports versions of

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.refusal = ""  # why the encoder cannot be exported in this format; empty if it can

    @property
    def file(self) -> str:
        """The name of the file, or of the folder."""
        return ("backbone" if self.encoder.projector is None else "backbone-projector") + self.ending

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the file or folder ``path``."""

    @abstractmethod
    def code(self) -> str:
        """Python code without sslzoo that loads :attr:`file` from the working directory as ``model``, which maps a
        batch of images to features."""

    # Run after the code, with a NumPy array ``images``.
    call: ClassVar[str] = (
        "with torch.inference_mode():\n    features = model(torch.from_numpy(images)).numpy()"
    )


class Safetensors(Format):
    """The weights under the names of the encoder's library, with the description as metadata."""

    name = "safetensors"
    ending = SUFFIX
    packages = ("torch", "safetensors")

    def write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(
            _separate(self.encoder.module.state_dict()),
            path,
            metadata={"format": "pt", KEY: self.encoder.about.to_json()},
        )

    def code(self) -> str:
        imports, lines = _architecture(self.encoder)
        imports = {*imports, "from safetensors.torch import load_file", "import torch"}
        load = [f"model.load_state_dict(load_file({self.file!r}))", "model.eval()"]
        return "\n".join([*sorted(imports), "", *lines, *load])


class Timm(Format):
    """The weights under timm's names, for its ``create_model``."""

    name = "timm"
    ending = ".timm" + SUFFIX
    packages = ("torch", "timm")

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.layout = timm_layout(encoder.about.backbone, encoder.backbone)
        self.refusal = _refusal(encoder, self.layout, "timm")

    def write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(_of(self.layout), path, metadata={"format": "pt"})

    def code(self) -> str:
        assert self.layout is not None
        arguments = _call_with(
            self.layout.name, num_classes=0, **self.layout.options, checkpoint_path=self.file
        )
        return f"import timm\nimport torch\n\nmodel = timm.create_model({arguments}).eval()"


class Torchvision(Format):
    """The weights under torchvision's names, as ``torch.save`` writes a state dict."""

    name = "torchvision"
    ending = ".torchvision.pth"
    packages = ("torch", "torchvision")

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.layout = torchvision_layout(encoder.about.backbone, encoder.backbone)
        self.refusal = _refusal(encoder, self.layout, "torchvision")

    def write(self, path: Path) -> None:
        torch.save(_of(self.layout), path)

    def code(self) -> str:
        assert self.layout is not None
        imports, lines = _torchvision(self.layout.name, self.layout.options, classifier_of(self.layout.model))
        load = [f"model.load_state_dict(torch.load({self.file!r}, weights_only=True))", "model.eval()"]
        return "\n".join([*sorted(imports), "", *lines, *load])


class HuggingFace(Timm):
    """timm's folder for the Hugging Face Hub: ``config.json`` with the preprocessing, and ``model.safetensors``."""

    name = "hf"
    ending = ".hf"

    def write(self, path: Path) -> None:
        from timm.models import save_for_hf

        assert self.layout is not None
        model: Any = self.layout.model
        model.pretrained_cfg = {
            "architecture": self.layout.name,
            "num_classes": 0,
            **_timm_preprocessing(self.encoder.about.preprocessing),
            **{
                key: model.pretrained_cfg[key]
                for key in ("fixed_input_size", "first_conv", "classifier")
                if key in model.pretrained_cfg
            },
        }
        model.load_state_dict(_of(self.layout))
        save_for_hf(model, str(path), model_args=self.layout.options or None, safe_serialization=True)

    def code(self) -> str:
        return (
            "import timm\nimport torch\n\n"
            f'model = timm.create_model("local-dir:{self.file}", pretrained=True).eval()'
        )


class Onnx(Format):
    """The computation graph, for ONNX Runtime and others. Batches of any size; images of the evaluation's size."""

    name = "onnx"
    ending = ".onnx"
    tolerance = 1e-3
    packages = ("onnxruntime",)
    call = 'features = model.run(None, {"images": images})[0]'

    def write(self, path: Path) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--format onnx needs {error.name}, which is not installed: pip install 'sslzoo[onnx]'"
            ) from error
        about = self.encoder.about
        side = about.preprocessing.size
        program = torch.onnx.export(
            self.encoder.module,
            (torch.zeros(IMAGES, about.preprocessing.channels, side, side),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[KEY] = about.to_json()
        program.save(path, external_data=False)

    def code(self) -> str:
        return f"import onnxruntime\n\nmodel = onnxruntime.InferenceSession({self.file!r})"


FORMATS: dict[str, type[Format]] = {f.name: f for f in (Safetensors, Timm, Torchvision, Onnx, HuggingFace)}


def format_of(name: str, encoder: Encoder) -> Format:
    """Return the format ``name`` for ``encoder``. Raises ``ValueError`` with the supported ones if it is not one."""
    chosen = FORMATS[name](encoder)
    if chosen.refusal:
        others = [other for other, kind in FORMATS.items() if not kind(encoder).refusal]
        raise ValueError(f"--format {name}: {chosen.refusal}; it can be exported as {', '.join(others)}")
    return chosen


def _refusal(encoder: Encoder, layout: Layout | None, library: str) -> str:
    cfg = encoder.about.backbone
    if encoder.projector is not None:
        return f"{library}'s models cannot include a projector"
    if layout is not None:
        return ""
    stem = "" if cfg.stem == "imagenet" else f" with stem {cfg.stem}"
    channels = "" if cfg.in_channels == 3 else f" with {cfg.in_channels} channel{'s' * (cfg.in_channels > 1)}"
    return f"{library} has no {cfg.name}{stem}{channels}"


def _of(layout: Layout | None) -> dict[str, torch.Tensor]:
    assert layout is not None
    return _separate(layout.state)


def _separate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy ``state`` so that no tensors share memory, as safetensors requires."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _timm_preprocessing(transform: Preprocessing) -> dict[str, Any]:
    """What timm's ``create_transform`` makes of it: it resizes always, to ``size / crop_pct``, rounded down."""
    resize = transform.resize or transform.size
    fraction = transform.size / resize
    while math.floor(transform.size / fraction) < resize:
        fraction = math.nextafter(fraction, 0.0)
    return {
        "input_size": (transform.channels, transform.size, transform.size),
        "interpolation": transform.interpolation,
        "crop_pct": fraction,
        "crop_mode": "center",
        "mean": transform.mean,
        "std": transform.std,
    }


# -- the code that builds an encoder without sslzoo ------------------------------------------------


def _architecture(encoder: Encoder) -> tuple[set[str], list[str]]:
    """Imports and lines of code that build ``model`` with the names of weights that sslzoo uses."""
    cfg, backbone = encoder.about.backbone, encoder.backbone
    if cfg.name == "conv5":
        imports, lines = set(), [f"model = {_sequential(backbone)}"]
    elif is_plugin(cfg.name):
        module, _, name = cfg.name.partition(":")
        imports = {f"from {module} import {name}"}
        lines = [f"model = {name}({_call_with(cfg.in_channels, **cfg.options)})"]
    elif cfg.name.startswith("timm/"):
        options = {} if cfg.in_channels == 3 else {"in_chans": cfg.in_channels}
        arguments = _call_with(cfg.name.removeprefix("timm/"), num_classes=0, **options, **cfg.options)
        imports, lines = {"import timm"}, [f"model = timm.create_model({arguments})"]
    else:
        imports, lines = _torchvision(cfg.name, cfg.options, classifier_of(backbone))
        if cfg.in_channels != 3 and cfg.stem == "imagenet":
            lines.append(f"model.conv1 = {_layer(backbone.conv1)}")  # type: ignore[arg-type]
    if cfg.stem != "imagenet":
        lines.append(f"model.conv1 = {_layer(backbone.conv1)}")  # type: ignore[arg-type]
    if cfg.stem == "cifar":
        lines.append("model.maxpool = torch.nn.Identity()")
    if encoder.projector is not None:
        imports |= {"from collections import OrderedDict"}
        lines.append(f"projector = {_sequential(encoder.projector)}")
        lines.append("model = torch.nn.Sequential(OrderedDict(backbone=model, projector=projector))")
    return imports, lines


def _torchvision(name: str, options: dict[str, Any], classifier: str) -> tuple[set[str], list[str]]:
    if name == "VisionTransformer":  # of any size
        made = f"torchvision.models.VisionTransformer({_call_with(**options)})"
    else:
        made = f"torchvision.models.get_model({_call_with(name, **options)})"
    lines = [f"model = {made}", f"model.{classifier} = torch.nn.Identity()"]
    return {"import torch", "import torchvision"}, lines


def _call_with(*values: Any, **named: Any) -> str:
    """Arguments of a call as code."""
    require(
        all(key.isidentifier() for key in named), f"options must be names of arguments, got {list(named)}"
    )
    return ", ".join([*(repr(v) for v in values), *(f"{key}={value!r}" for key, value in named.items())])


def _sequential(module: nn.Module) -> str:
    layers = "".join(f"    {_layer(layer)},\n" for layer in module.children())
    return f"torch.nn.Sequential(\n{layers})"


def _layer(layer: nn.Module) -> str:
    """Code that builds a layer of torch, which is its ``repr``."""
    kind = type(layer)
    require(
        getattr(torch.nn, kind.__name__, None) is kind and not list(layer.children()),
        f"{kind.__name__} is not one of torch's layers; leave out --with-projector",
    )
    return f"torch.nn.{layer!r}"
