"""Stateless random numbers: a pure function of purpose, seed and position, without a generator.

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the
finaliser is Stafford's variant 13) used as a hash of a counter, for a whole batch at once. A sample
gets the same numbers in any worker, on any rank, and after a resume.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

# First word of every key: the purpose of the numbers. Methods use text for theirs, such as "mine: dropped rows".
VIEWS, ORDER, HOLDOUT, SUBSET, FAKE, STEP, SHUFFLE, PROBE, STAND_IN = range(9)


def _signed(x: int) -> int:
    """The int64 with the same bits as the uint64 ``x``."""
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's ``>>`` is arithmetic and copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for bits, factor in _MIX:
        x = (x ^ _shifted(x, bits)) * _signed(factor)
    return x ^ _shifted(x, 31)


def key(*words: int | str) -> int:
    """Hash a sequence of integers and text, such as (purpose, seed, epoch), to a 64-bit integer."""
    state = 0
    for word in words:
        number = int.from_bytes(sha256(word.encode()).digest()[:8]) if isinstance(word, str) else word
        state = (state + _GOLDEN + number) & _MASK
        for bits, factor in _MIX:
            state = ((state ^ (state >> bits)) * factor) & _MASK
        state ^= state >> 31
    return state


def hash64(stream: int, counter: Tensor) -> Tensor:
    """Hash each entry of the int64 tensor ``counter`` to an int64, on its device; ``stream`` comes from :func:`key`."""
    return _mix(_mix(counter + _signed(_GOLDEN)) + _signed(stream))


def uniforms(stream: int, counter: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (N, draws), one row per entry of ``counter`` (N,)."""
    steps = torch.arange(1, draws + 1, device=counter.device) * _signed(_GOLDEN)
    bits = _mix(hash64(stream, counter)[:, None] + steps)
    return _shifted(bits, 11).double() * 2.0**-53


def view_uniforms(seed: int, epoch: int, view: int, sample_id: Tensor, draws: int) -> Tensor:
    """The random numbers (N, draws) that determine view ``view`` of each sample in ``sample_id`` (N,)."""
    return uniforms(key(VIEWS, seed, epoch, view), sample_id, draws)


def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of samples in an epoch: a permutation of ``range(size)``, int64."""
    # In chunks that fit into the processor's cache: hashing many samples takes a tenth of the time.
    hashes = [hash64(key(ORDER, seed, epoch), part) for part in torch.arange(size).split(2**15)]
    return torch.cat(hashes).argsort(stable=True)


def subset(seed: int, size: int, keep: int | None) -> Tensor:
    """A random subset of ``range(size)`` with ``keep`` entries, ascending; all if ``keep`` is None or >= ``size``."""
    if keep is None or keep >= size:
        return torch.arange(size)
    order = hash64(key(SUBSET, seed), torch.arange(size)).argsort(stable=True)
    return order[:keep].sort().values


def is_holdout(sample_id: Tensor, fraction: float, seed: int) -> Tensor:
    """Whether each sample (N,) is in the held-out fraction of the training labels, bool (N,).

    Runs on the tensor's device without synchronising.
    """
    return uniforms(key(HOLDOUT, seed), sample_id, 1)[:, 0] < fraction
