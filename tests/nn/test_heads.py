"""MLP heads, by the shapes of the papers."""

from __future__ import annotations

import pytest
from torch import nn

from sslzoo.nn.heads import mlp


def shape(head: nn.Sequential) -> list[str]:
    names = {nn.BatchNorm1d: "bn", nn.ReLU: "relu"}
    return [
        f"{m.in_features}-{m.out_features}{'+b' if m.bias is not None else ''}"
        if isinstance(m, nn.Linear)
        else names[type(m)] + ("" if getattr(m, "affine", True) else "*")
        for m in head
    ]


def test_published_heads_of_sce() -> None:
    projector = mlp((20, 8, 8, 4), output_norm="batch_no_affine", output_bias=False)
    assert shape(projector) == ["20-8", "bn", "relu", "8-8", "bn", "relu", "8-4", "bn*"]
    assert shape(mlp((4, 8, 4), output_bias=False)) == ["4-8", "bn", "relu", "8-4"]
    assert shape(mlp((5, 5, 2))) == ["5-5", "bn", "relu", "5-2+b"]
    assert shape(mlp((5, 9, 2), hidden_norm=False)) == ["5-9+b", "relu", "9-2+b"]


def test_further_forms() -> None:
    assert shape(mlp((5, 2))) == ["5-2+b"]
    assert shape(mlp((5, 4, 2), hidden_bias=True, output_norm="batch")) == [
        "5-4+b",
        "bn",
        "relu",
        "4-2+b",
        "bn",
    ]
    frozen = mlp((5, 2), output_norm="batch_no_shift")[-1]
    assert isinstance(frozen, nn.BatchNorm1d)
    assert frozen.weight.requires_grad
    assert not frozen.bias.requires_grad


def test_refusals() -> None:
    with pytest.raises(ValueError, match="an input and an output width"):
        mlp((5,))
    with pytest.raises(ValueError, match="output_norm must be one of"):
        mlp((5, 2), output_norm="layer")
