"""Random numbers depend on what they are for, and on nothing else."""

from __future__ import annotations

import torch

from sslzoo.randomness import _mix, epoch_order, hash64, is_holdout, key, subset, uniforms, view_uniforms


def splitmix64(state: int) -> int:
    """The generator's next output, in Python integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_mixer_is_splitmix64() -> None:
    # First output for seed 0, as published with the reference implementation.
    assert splitmix64(0) == key(0) == 0xE220A8397B1DCDAF
    states = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
    signed = torch.tensor([s - 2**64 if s >> 63 else s for s in states])
    got = _mix(signed + (0x9E3779B97F4A7C15 - 2**64))
    assert [g % 2**64 for g in got.tolist()] == [splitmix64(s) for s in states]


def test_numbers_do_not_depend_on_the_batch_around() -> None:
    ids = torch.tensor([5, 999_999, 0, 7])
    whole = view_uniforms(3, 4, 1, ids, 36)
    for row, i in zip(whole, ids, strict=True):
        assert torch.equal(view_uniforms(3, 4, 1, i[None], 36)[0], row)
    assert torch.equal(whole[:, :10], view_uniforms(3, 4, 1, ids, 10))


def test_every_word_of_the_key_matters() -> None:
    ids = torch.arange(100)
    base = view_uniforms(0, 0, 0, ids, 4)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not (view_uniforms(*other, ids, 4) == base).any()
    assert len({key(0, 1), key(1, 0), key(0), key(0, 0), key(1)}) == 5


def test_a_purpose_may_be_text() -> None:
    assert key("mine: dropped rows", 3) == 0x708E1BD47C1D9B94  # for good: checkpoints continue it
    assert len({key(word, 3) for word in ("mine", "yours", "", *range(8))}) == 11


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(key(1), torch.arange(40_000), 8)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.002
    neighbours = torch.cat([u, u.roll(1, 0)], dim=1).T
    assert (torch.corrcoef(neighbours) - torch.eye(16)).abs().max() < 0.025


def test_epoch_order_is_a_new_permutation_each_epoch() -> None:
    first, second = epoch_order(0, 0, 1000), epoch_order(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first == second).sum() < 10
    assert torch.equal(first, epoch_order(0, 0, 1000))


def test_holdout_is_a_property_of_the_sample() -> None:
    ids = torch.arange(20_000)
    held = is_holdout(ids, 0.1, seed=0)
    assert abs(held.float().mean() - 0.1) < 0.01
    assert torch.equal(is_holdout(ids[77:99], 0.1, seed=0), held[77:99])
    assert is_holdout(ids, 0.2, seed=0)[held].all()
    assert not torch.equal(is_holdout(ids, 0.1, seed=1), held)


def test_subset_is_deterministic_and_sorted() -> None:
    chosen = subset(0, 1000, 100)
    assert len(chosen) == 100 and (chosen.diff() > 0).all()
    assert torch.equal(chosen, subset(0, 1000, 100))
    assert len(subset(0, 1000, None)) == len(subset(0, 1000, 5000)) == 1000
    assert hash64(key(0), torch.arange(5)).dtype == torch.int64
