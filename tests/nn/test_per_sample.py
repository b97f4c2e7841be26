"""Tables per training sample: what a write leaves, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.distributed import gather_detached
from sslzoo.nn.per_sample import PerSampleTable, tables_of
from sslzoo.nn.undo import Undo
from sslzoo.testing.ranks import run_ranks


class Visits(PerSampleTable):
    """A key and a count for each of five samples."""

    key: Tensor
    times: Tensor

    def __init__(self) -> None:
        super().__init__(key=torch.zeros(5, 2), times=torch.zeros(5, dtype=torch.int64))


def test_the_last_row_of_a_sample_stays() -> None:
    table = Visits()
    ids = torch.tensor([3, 1, 3, 0, 1, 3])
    table.write(ids, key=torch.arange(12.0).view(6, 2), times=torch.arange(6))
    assert table.times.tolist() == [3, 4, 0, 5, 0]
    assert table.read("key", torch.tensor([[3], [2]])).tolist() == [[[10.0, 11.0]], [[0.0, 0.0]]]


def test_samples_may_be_counted_in_another_dimension() -> None:
    start = torch.randn(2, 5, 3)
    table = PerSampleTable(dim=1, rows=start.clone())
    rows = torch.randn(2, 2, 3)
    rows[1, 0, 2] = torch.inf  # of sample 4
    table.write(torch.tensor([4, 1]), rows=rows)
    start[:, 1] = rows[:, 1]
    assert torch.equal(table.state_dict()["rows"], start)
    assert table.read("rows", torch.tensor([[1, 4], [0, 0], [2, 3]])).shape == (2, 3, 2, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_leaves_all_of_its_sample_alone(value: float) -> None:
    table = Visits()
    table.write(
        torch.tensor([0, 2]), key=torch.tensor([[1.0, value], [1.0, 1.0]]), times=torch.tensor([7, 7])
    )
    assert table.times.tolist() == [0, 0, 7, 0, 0]
    assert table.key.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0], [0, 0]]


def test_undo_puts_tables_and_buffers_back() -> None:
    """Of several writes to one sample too; what was written before stays, and so does what comes after."""
    table, norm = Visits(), nn.BatchNorm1d(2)
    module = nn.ModuleDict({"table": table, "norm": norm})
    assert tables_of(module) == {"table": table}

    def step(n: int) -> None:
        norm(torch.randn(4, 2))
        for ids in ([0, 1, 1], [1, 4, 0]):
            n += 1
            table.write(torch.tensor(ids), key=torch.randn(3, 2), times=torch.full((3,), n))

    step(0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    undo = Undo(module)
    step(10)
    assert not any(torch.equal(before[name], value) for name, value in module.named_buffers())
    undo.take_back()
    undo.close()
    assert all(torch.equal(before[name], value) for name, value in module.named_buffers())
    step(20)
    undo = Undo(module)
    undo.close()
    assert table.times.tolist() == [22, 22, 0, 0, 22]


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16-mixed"):
        Visits().bfloat16().read("key", torch.tensor([0]))


def _rank(rank: int, world: int) -> dict[str, Any]:
    table, ids = Visits(), torch.tensor([[0, 3], [3, 4]])[rank]
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
    table.write(gather_detached(ids), key=gather_detached(rows))
    return dict(table.state_dict())


def test_ranks_hold_the_same_rows() -> None:
    first, second = run_ranks(2, _rank)
    expected: Tensor = torch.tensor([[1.0, 2], [0, 0], [0, 0], [11, 12], [13, 14]])
    assert torch.equal(first["key"], expected) and torch.equal(second["key"], expected)
