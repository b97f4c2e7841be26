"""Averages of measurements are those of all images, whichever way these are divided."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sslzoo.nn.measurements import moments, ratio, reported


def test_parts_of_equal_size_give_the_value_of_the_whole() -> None:
    rows = nn.functional.normalize(
        torch.randn(12, 5, dtype=torch.float64, generator=torch.manual_seed(0)), dim=1
    )
    expected = float(rows.std(dim=0, correction=0).mean() * 5**0.5)
    parts = torch.stack([moments(part) for part in rows.split(4)])
    assert reported(parts.mean(dim=0)) == pytest.approx(expected, rel=1e-12)
    assert reported(moments(rows[:1].expand(7, 5))) == pytest.approx(0, abs=1e-7)
    assert moments(rows.bfloat16()).dtype == torch.float32


def test_ratios_are_of_sums_and_zero_of_nothing() -> None:
    parts = torch.stack([ratio(torch.tensor(a), torch.tensor(b)) for a, b in ((3.0, 1.0), (1.0, 3.0))])
    assert reported(parts.mean(dim=0)) == 1.0
    assert reported(torch.zeros(2)) == 0.0
    assert reported(torch.tensor(2.5)) == 2.5
