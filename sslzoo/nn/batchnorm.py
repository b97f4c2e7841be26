"""Batch norms that torch lacks: synchronised (on any device, twice differentiable) and split into groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum, world_size

FUSED = ["drop", "act"]  # layers inside timm's batch norms, in the order in which they are applied


def _then(norm: nn.Module, y: Tensor) -> Tensor:
    """Apply the layers inside ``norm`` to the normalised ``y``."""
    for layer in norm.children():
        y = layer(y)
    return y


class _Standardise(torch.autograd.Function):
    """Standardised ``x`` (N, C, ...) and the reciprocal deviation (C,), over the ``count`` rows of all ranks; mean and
    variance (C,) without gradients. One collective forward and one backward, with derivatives of any order, because
    the gradient is a function of the outputs."""

    @staticmethod
    def forward(x: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = _layout(x)
        rows = max(x.numel() // x.shape[1], 1)
        mean = x.sum(dims) / rows
        centred = x - mean.view(shape)
        var = centred.square().sum(dims) / rows
        if world_size() > 1:
            # Both moments at once; in float64, because their difference would lose digits in float32.
            own, spread = torch.stack([mean, var]).double().unbind()
            moments = torch.stack([own, torch.addcmul(spread, own, own)])
            overall, second = all_reduce_sum(moments * (x.numel() // x.shape[1] / count)).unbind()
            var = torch.addcmul(second, overall, overall, value=-1).clamp(min=0).to(x.dtype)
            mean = overall.to(x.dtype)
            centred += (own - overall).to(x.dtype).view(shape)
        scale = torch.rsqrt(var + eps)
        return centred.mul_(scale.view(shape)), scale, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        standardised, scale, mean, var = output
        ctx.count = inputs[1]
        ctx.save_for_backward(standardised, scale)
        ctx.mark_non_differentiable(mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, scale_grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        z, scale = ctx.saved_tensors
        dims, shape = _layout(z)
        sums = torch.stack([grad.sum(dims), (grad * z).sum(dims), scale_grad])
        mean, along, through_scale = (all_reduce_sum(sums) / ctx.count).unbind()
        along = torch.addcmul(along, scale, through_scale)
        rest = torch.addcmul(grad - mean.view(shape), z, along.view(shape), value=-1)
        return rest * scale.view(shape), None, None


def _layout(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions of ``x`` (N, C, ...) that batch norm averages over, and the shape of its averages."""
    return [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all ranks, followed by the layers inside it, if any.

    Equal to single-process batch norm on the concatenated batch, with derivatives of any order; torch's
    SyncBatchNorm fails on CPU and has no second derivative. Input (N, C, ...), with N equal on all ranks unless
    ``uneven``.
    """

    def __init__(self, num_features: int, *, uneven: bool = False, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.uneven = uneven

    def _check_input_dim(self, input: Tensor) -> None:
        require(input.ndim >= 2, f"batch norm expects (N, C, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with statistics of the global batch in training mode, running statistics in evaluation mode."""
        self._check_input_dim(input)
        if not self.training:
            return _then(self, super().forward(input))
        _, shape = _layout(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.numel() // x.shape[1] * world_size()
        if self.uneven:
            count = int(all_reduce_sum(torch.tensor(x.numel() // x.shape[1], device=x.device)))
        require(
            count > 1, f"batch norm needs more than one value per channel, got shape {tuple(input.shape)}"
        )
        y, _, mean, var = _Standardise.apply(x, count, self.eps)  # type: ignore[misc]
        if self.affine:
            y = torch.addcmul(self.bias.view(shape), y, self.weight.view(shape))
        if self.track_running_stats:
            self._update_running(mean, var * (count / (count - 1)))
        return _then(self, y.to(input.dtype))

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)


class SplitBatchNorm(_BatchNorm):
    """Batch norm in ``splits`` groups on one device, simulating that many devices without synchronisation.

    Sample n is in group n mod splits. Each group updates the running statistics on its own, and the mean
    over the groups is stored. In evaluation mode it is plain batch norm.
    """

    def __init__(self, num_features: int, *, splits: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.splits = splits

    def _check_input_dim(self, input: Tensor) -> None:
        require(
            not self.training or input.shape[0] % self.splits == 0,
            f"split batch norm needs a batch divisible by {self.splits}, got {input.shape[0]}; "
            "change data.global_batch_size",
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (N, C, ...); in training mode N must be divisible by ``splits``."""
        self._check_input_dim(input)
        if not self.training:
            return _then(self, super().forward(input))
        n, c, *rest = input.shape
        s = self.splits
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        # Group g has samples g, g+S, ...: reshaped to (N/S, S*C, ...), each group has its own channels.
        y = F.batch_norm(
            input.reshape(n // s, s * c, *rest),
            mean,
            var,
            self.weight.repeat(s) if self.affine else None,
            self.bias.repeat(s) if self.affine else None,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(s, c).mean(0))
        self.running_var.copy_(var.view(s, c).mean(0))
        self.num_batches_tracked.add_(1)
        return _then(self, y.reshape(input.shape))


def _replace(module: nn.Module, old: type, build: Any) -> nn.Module:
    """Replace every batch norm of type ``old`` in ``module`` by ``build(norm)``, sharing parameters, buffers and
    inner layers. Raises ``ValueError`` for a subclass that computes anything else."""
    if isinstance(module, old) and isinstance(module, _BatchNorm):
        inside = dict(module.named_children())
        require(
            (list(inside) == FUSED or (not inside and _is_plain(module)))
            and not isinstance(module, SplitBatchNorm),
            f"{type(module).__module__}.{type(module).__name__} computes more than a batch norm and can be neither "
            "synchronised (set trainer.sync_batchnorm=false) nor split (set method.momentum_batchnorm=same)",
        )
        new = build(module)
        for name, layer in inside.items():
            new.add_module(name, layer)
        new.weight, new.bias = module.weight, module.bias
        new.running_mean, new.running_var = module.running_mean, module.running_var
        new.num_batches_tracked, new.training = module.num_batches_tracked, module.training
        return new
    for name, child in module.named_children():
        setattr(module, name, _replace(child, old, build))
    return module


def _is_plain(norm: _BatchNorm) -> bool:
    forward = type(norm).forward
    return forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


def _options(m: _BatchNorm) -> dict[str, Any]:
    return {
        "eps": m.eps,
        "momentum": m.momentum,
        "affine": m.affine,
        "track_running_stats": m.track_running_stats,
    }


def to_sync(module: nn.Module, *, uneven: bool = False) -> nn.Module:
    """Replace every batch norm in ``module`` by :class:`SyncBatchNorm`."""
    return _replace(module, _BatchNorm, lambda m: SyncBatchNorm(m.num_features, uneven=uneven, **_options(m)))


def to_split(module: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm2d in ``module`` by :class:`SplitBatchNorm`."""
    return _replace(
        module, nn.BatchNorm2d, lambda m: SplitBatchNorm(m.num_features, splits=splits, **_options(m))
    )


class LayerSync(TorchSyncBatchNorm):
    """Implements ``trainer.sync_batchnorm: true``: torch's fused layer on CUDA, :class:`SyncBatchNorm` on
    other devices and for methods that need second derivatives."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert ``model`` in place."""
        # torch's conversion would drop layers inside batch norms.
        plain = all(_is_plain(m) for m in model.modules() if isinstance(m, _BatchNorm))
        if torch.cuda.is_available() and plain and not getattr(model, "needs_double_backward", False):
            return super().apply(model)
        return to_sync(model)
