"""The inner moving-average rate gamma as a pure function of the optimiser step."""

from __future__ import annotations

from math import cos, pi

from sslzoo_methods.sogclr.config import CosineGamma


def inner_rate(step: int, gamma: float | CosineGamma, *, steps_per_epoch: int, max_epochs: int) -> float:
    """gamma of optimiser step ``step``, the weight of the new estimate.

    The cosine goes from 1 in epoch 0 to ``min`` in epoch E = ``decay_epochs``, without which E is half of the
    training epochs, rounded down. It has one value an epoch (FastCLIP, arXiv:2407.01445; LibAUC's code, whose
    prose omits the 1 of 1 + cos); ``interval: step`` is the same with fractional epochs, our extension.
    """
    if not isinstance(gamma, CosineGamma):
        return gamma
    decay_epochs = gamma.decay_epochs or max(max_epochs // 2, 1)
    epoch = step // steps_per_epoch if gamma.interval == "epoch" else step / steps_per_epoch
    if epoch >= decay_epochs:
        return gamma.min
    return gamma.min + (1 - gamma.min) * (1 + cos(pi * epoch / decay_epochs)) / 2
