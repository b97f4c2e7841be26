"""The feature queue: order, wrapping, overfull pushes, state."""

from __future__ import annotations

import pytest
import torch

from sslzoo.nn.queue import FeatureQueue


def one_by_one(queue: FeatureQueue, keys: torch.Tensor) -> None:
    for key in keys:
        queue.push(key[None])


@pytest.mark.parametrize("sizes", [[3, 3, 3], [7], [8, 1], [17], [5, 23, 2]])
def test_pushes_equal_writing_one_by_one(sizes: list[int]) -> None:
    """Any number of keys, wrapping, and more than fit."""
    torch.manual_seed(0)
    queue, slow = FeatureQueue(7, 4), FeatureQueue(7, 4)
    slow.load_state_dict(queue.state_dict())
    for n in sizes:
        keys = torch.randn(n, 4)
        queue.push(keys)
        one_by_one(slow, keys)
        assert torch.equal(queue.features, slow.features)
        assert int(queue.position) == int(slow.position) == int(slow.position) % 7


def test_starts_from_normalised_noise_and_keeps_its_dtype() -> None:
    queue = FeatureQueue(50, 8)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(50))
    assert queue.features.std() > 0.1
    queue.push(torch.ones(2, 8, dtype=torch.float64))
    assert queue.features.dtype == torch.float32
    assert set(queue.state_dict()) == {"features", "position"}
    assert not list(queue.parameters())


def test_pushed_keys_are_copies_without_gradient() -> None:
    queue = FeatureQueue(4, 2)
    keys = torch.ones(2, 2, requires_grad=True)
    queue.push(keys)
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(queue.features[:2], torch.ones(2, 2))
    assert not queue.features.requires_grad


def test_refuses_no_room() -> None:
    with pytest.raises(ValueError, match="size of a queue must be at least 1"):
        FeatureQueue(0, 4)
