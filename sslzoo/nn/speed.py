"""What a recipe's ``speed`` section does to an encoder: memory layout and activation checkpointing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sslzoo.checks import require
from sslzoo.recipe.sections import SpeedConfig

STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, in torchvision and in timm


def speed_up(backbone: nn.Module, cfg: SpeedConfig, *, name: str) -> None:
    """Change ``backbone``, the encoder ``name``, as ``cfg`` says. Names and values of its weights stay the same, and
    copies made by ``copy.deepcopy`` are changed likewise.

    Raises ``ValueError`` if it has no blocks to checkpoint.
    """
    if cfg.channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        backbone.register_forward_pre_hook(_images_channels_last)
    if cfg.activation_checkpointing:
        _checkpoint_blocks(backbone, name)


def _images_channels_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])


def _checkpoint_blocks(backbone: nn.Module, name: str) -> None:
    stages = [getattr(backbone, stage, None) for stage in STAGES]
    if all(isinstance(stage, nn.Sequential) for stage in stages):
        for stage, blocks in zip(STAGES, stages, strict=True):
            assert isinstance(blocks, nn.Sequential)
            setattr(backbone, stage, Checkpointed(OrderedDict(blocks.named_children())))
        return
    own = getattr(backbone, "set_grad_checkpointing", None)
    # A model's own checkpointing would update batch-norm statistics twice.
    has_norms = any(isinstance(module, _BatchNorm) for module in backbone.modules())
    require(
        callable(own) and not has_norms,
        f"speed.activation_checkpointing needs a ResNet or a timm model without batch norm, got {name}; leave it out",
    )
    assert callable(own)
    own(True)


class Checkpointed(nn.Sequential):
    """A sequence of blocks that keeps only their inputs for the backward pass, which computes each block once more.

    Gradients, random numbers and batch-norm statistics are exactly those of ``nn.Sequential``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The output of the last block."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        for block in self:
            input = checkpoint(block, input, use_reentrant=False, context_fn=partial(_contexts, block))
        return input


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """The contexts of a block's first computation, and of the second."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Context in which batch norms update copies of their buffers, because the first computation has updated them."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    buffers = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for key, buffer in norm._buffers.items():
            norm._buffers[key] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, before in zip(norms, buffers, strict=True):
            norm._buffers.update(before)
