"""Names and shapes of an encoder's weights in torchvision and timm.

ResNets go by the same names in both. Vision transformers do not, and torchvision has theirs in a few sizes by name but
in any size by its constructor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslzoo.nn.backbones import CLASSIFIERS
from sslzoo.recipe.registry import is_plugin
from sslzoo.recipe.sections import BackboneConfig

State = Mapping[str, Tensor]

# (timm, torchvision) of a vision transformer; {} stands for the number of a block.
_VIT = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj", "conv_proj"),
    ("blocks.{}.norm1", "encoder.layers.encoder_layer_{}.ln_1"),
    ("blocks.{}.attn.qkv.weight", "encoder.layers.encoder_layer_{}.self_attention.in_proj_weight"),
    ("blocks.{}.attn.qkv.bias", "encoder.layers.encoder_layer_{}.self_attention.in_proj_bias"),
    ("blocks.{}.attn.proj", "encoder.layers.encoder_layer_{}.self_attention.out_proj"),
    ("blocks.{}.norm2", "encoder.layers.encoder_layer_{}.ln_2"),
    ("blocks.{}.mlp.fc1", "encoder.layers.encoder_layer_{}.mlp.0"),
    ("blocks.{}.mlp.fc2", "encoder.layers.encoder_layer_{}.mlp.3"),
    ("norm", "encoder.ln"),
)
_TIMM_SIZES = {
    "b": "base",
    "l": "large",
    "h": "huge",
}  # torchvision's vit_b_16 is timm's vit_base_patch16_224


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a library builds an encoder, and the weights under that library's names."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor]
    model: nn.Module  # made so, with these weights


def timm_layout(cfg: BackboneConfig, model: nn.Module) -> Layout | None:
    """``model``, the encoder that ``cfg`` describes, as timm's ``create_model`` builds it; None if it cannot."""
    import timm

    if not _has_own_stem(cfg):
        return None
    state = _state(model)
    options: dict[str, Any] = {} if cfg.in_channels == 3 else {"in_chans": cfg.in_channels}
    if cfg.name.startswith("timm/"):
        name = cfg.name.removeprefix("timm/")
        options |= cfg.options
    elif match := re.fullmatch(r"vit_([blh])_(\d+)", cfg.name):
        name = f"vit_{_TIMM_SIZES[match[1]]}_patch{match[2]}_224"
        side = cast(Any, model).image_size
        options |= {"img_size": side} if side != 224 else {}
        state = _renamed(state, [(b, a) for a, b in _VIT])
    else:
        name = cfg.name
    if not timm.is_model(name):
        return None
    with torch.random.fork_rng(devices=[]):
        target = timm.create_model(name, num_classes=0, **options)
    return _layout(name, options, state, target)


def torchvision_layout(cfg: BackboneConfig, model: nn.Module) -> Layout | None:
    """``model``, the encoder that ``cfg`` describes, as torchvision builds it; None if it cannot."""
    from torchvision import models

    if not _has_own_stem(cfg) or cfg.in_channels != 3:
        return None
    state = _state(model)
    options = dict(cfg.options)
    name = cfg.name.removeprefix("timm/")
    is_timm = name != cfg.name
    with torch.random.fork_rng(devices=[]):
        if is_timm and hasattr(model, "patch_embed"):
            name = "VisionTransformer"
            options = _transformer(model)
            if not options:
                return None
            state = _renamed(state, _VIT)
            target: nn.Module = models.VisionTransformer(**cast(Any, options))
        elif name in models.list_models(module=models):
            options = {} if is_timm else options
            target = models.get_model(name, weights=None, **options)
        else:
            return None
    setattr(target, classifier_of(target, nn.Module), nn.Identity())
    return _layout(name, options, state, target)


def classifier_of(model: nn.Module, kind: type[nn.Module] = nn.Identity) -> str:
    """The name of the classifier, a module of ``kind``, in torchvision's ``model``."""
    return next(name for name in CLASSIFIERS if isinstance(getattr(model, name, None), kind))


def _has_own_stem(cfg: BackboneConfig) -> bool:
    return cfg.stem == "imagenet" and cfg.name != "conv5" and not is_plugin(cfg.name)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _transformer(model: Any) -> dict[str, int]:
    """Arguments of torchvision's ``VisionTransformer`` equivalent to timm's ``model``; empty if there are none."""
    try:
        (side, width), (patch, other) = model.patch_embed.img_size, model.patch_embed.patch_size
        block = model.blocks[0]
        arguments = {
            "image_size": side,
            "patch_size": patch,
            "num_layers": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "hidden_dim": model.embed_dim,
            "mlp_dim": block.mlp.fc1.out_features,
        }
    except (AttributeError, TypeError, ValueError):
        return {}
    square = side == width and patch == other and side % patch == 0
    return arguments if square and getattr(model, "global_pool", "") == "token" else {}


def _renamed(state: State, names: Any) -> dict[str, Tensor]:
    """Rename the keys of ``state`` from the first to the second of each pair in ``names``; others are kept."""
    patterns = [
        (re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)"), new.replace("{}", r"\1"))
        for old, new in names
    ]

    def renamed(name: str) -> str:
        for pattern, new in patterns:
            if pattern.match(name):
                return pattern.sub(new, name, count=1)
        return name

    return {renamed(name): value for name, value in state.items()}


def _layout(name: str, options: dict[str, Any], state: dict[str, Tensor], target: nn.Module) -> Layout | None:
    own = {key: value.shape for key, value in target.state_dict().items()}
    if own != {key: value.shape for key, value in state.items()}:
        return None
    target.load_state_dict(state)
    return Layout(name=name, options=options, state=state, model=target.eval())
