"""What an encoder is, wherever its file goes: architecture, preprocessing, the run that trained it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import yaml
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from sslzoo.checks import require
from sslzoo.data.crops import evaluation_crop, to_unit
from sslzoo.data.photometric import normalize
from sslzoo.recipe.load import to_yaml
from sslzoo.recipe.sections import BackboneConfig, PlainView, Recipe

KEY = "sslzoo"  # of the metadata in a safetensors or ONNX file


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image to what the encoder sees, as in evaluation: resized, cut to the central square, normalised."""

    channels: int
    resize: int | None  # shorter side in pixels before the cut; None: as it is
    size: int  # side of the square in pixels
    mean: tuple[float, ...]  # per channel, for images in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bilinear"  # antialiased; the only one

    def __call__(self, image: Image | Tensor) -> Tensor:
        """A PIL image, or uint8 images (..., C, H, W), to float32 (..., C, size, size).

        Raises ``ValueError`` for another type or number of channels, and for images smaller than ``size``.
        """
        if isinstance(image, Image):
            require(self.channels in (1, 3), f"images of {self.channels} channels must be tensors")
            image = TF.pil_to_tensor(image.convert("L" if self.channels == 1 else "RGB"))
        require(
            image.dtype == torch.uint8 and image.ndim >= 3 and image.shape[-3] == self.channels,
            f"expected uint8 images (..., {self.channels}, H, W), got {image.dtype} {tuple(image.shape)}",
        )
        view = PlainView(size=self.size, resize=self.resize)
        return normalize(to_unit(evaluation_crop(image, view)), self.mean, self.std)

    @staticmethod
    def of(recipe: Recipe) -> Preprocessing:
        """That of the recipe's evaluation."""
        return Preprocessing(
            channels=recipe.backbone.in_channels,
            resize=recipe.eval.resize,
            size=recipe.eval.size,
            mean=recipe.data.mean,
            std=recipe.data.std,
        )


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of an encoder. Plain values, which a file carries as JSON."""

    backbone: BackboneConfig
    features: int  # width of the backbone's output
    preprocessing: Preprocessing
    recipe: str  # as YAML
    step: int  # finished optimiser steps
    projector: tuple[int, ...] = ()  # widths of its layers, if it comes along
    run: Mapping[str, Any] = field(default_factory=dict)  # the run's manifest; empty: not known
    results: Mapping[str, Any] = field(default_factory=dict)  # its eval/summary.json; empty: not evaluated

    @staticmethod
    def of(
        recipe: Recipe,
        *,
        features: int,
        step: int,
        projector: tuple[int, ...] = (),
        manifest: Mapping[str, Any] | None,
        results: Mapping[str, Any] | None = None,
    ) -> About:
        """Of an encoder that ``recipe`` trained. Of the ``manifest`` it takes what tells runs apart and what numbers
        depend on, and leaves out machines, paths and commands."""
        kept = ("run_id", "started", "world_size", "data_fingerprint", "versions", "git")
        return About(
            backbone=recipe.backbone,
            features=features,
            preprocessing=Preprocessing.of(recipe),
            recipe=to_yaml(recipe),
            step=step,
            projector=projector,
            run={key: manifest[key] for key in kept if manifest.get(key) is not None} if manifest else {},
            results=dict(results or {}),
        )

    @property
    def values(self) -> dict[str, Any]:
        """The recipe's values, unchecked."""
        return yaml.safe_load(self.recipe)

    def to_json(self) -> str:
        """One line; :meth:`from_json` reads it."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> About:
        """What :meth:`to_json` wrote; ``ValueError`` for anything else."""
        try:
            values = json.loads(text)
            preprocessing = values["preprocessing"]
            for key in ("mean", "std"):
                preprocessing[key] = tuple(float(number) for number in preprocessing[key])
            return About(
                **values
                | {
                    "backbone": BackboneConfig(**values["backbone"]),
                    "preprocessing": Preprocessing(**preprocessing),
                    "projector": tuple(values["projector"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its description is not one of sslzoo's ({error})") from error
