"""The rate gamma of the inner moving average, as a pure function of the optimiser step."""

from __future__ import annotations

from math import cos, pi

from sslzoo_methods.sogclr.config import CosineGamma


def inner_rate(step: int, gamma: float | CosineGamma, *, steps_per_epoch: int, max_epochs: int) -> float:
    """gamma at optimiser step ``step``: the weight of the new estimate in the moving average.

    The cosine goes from 1 in epoch 0 to ``min`` in epoch ``decay_epochs``, by default half of the training epochs,
    rounded down. It is constant within an epoch (FastCLIP, arXiv:2407.01445, and LibAUC's code, whose
    documentation omits the 1 in 1 + cos); with ``interval: step``, our extension, epochs are fractional.
    """
    if not isinstance(gamma, CosineGamma):
        return gamma
    decay_epochs = gamma.decay_epochs or max(max_epochs // 2, 1)
    epoch = step // steps_per_epoch if gamma.interval == "epoch" else step / steps_per_epoch
    if epoch >= decay_epochs:
        return gamma.min
    return gamma.min + (1 - gamma.min) * (1 + cos(pi * epoch / decay_epochs)) / 2
