"""MLP heads, by the shapes of the papers."""

from __future__ import annotations

import pytest
from torch import nn

from sslzoo.nn.heads import build_head, mlp
from sslzoo.recipe.sections import HeadConfig


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


def test_as_a_recipe_says_it() -> None:
    cfg = HeadConfig(widths=(8, 4), output_norm="batch_no_affine", output_bias=False)
    assert shape(build_head(20, cfg)) == ["20-8", "bn", "relu", "8-4", "bn*"]
    cfg = HeadConfig(widths=(8, 4), hidden_bias=True)
    assert shape(build_head(20, cfg)) == ["20-8+b", "bn", "relu", "8-4+b"]
    assert shape(build_head(20, HeadConfig(widths=(8, 4), hidden_norm=False))) == ["20-8+b", "relu", "8-4+b"]
    assert shape(build_head(20, HeadConfig(widths=(4,)))) == ["20-4+b"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="an input and an output width"):
        mlp((5,))
    with pytest.raises(ValueError, match="widths must hold at least the embedding width"):
        HeadConfig(widths=())
    with pytest.raises(ValueError, match="widths must be positive"):
        HeadConfig(widths=(4, 0))
    with pytest.raises(ValueError, match="hidden_norm must be true with one width"):
        HeadConfig(widths=(4,), hidden_norm=False)
    for widths, norm in (((4,), True), ((4, 2), False)):
        with pytest.raises(ValueError, match="hidden_bias must be false"):
            HeadConfig(widths=widths, hidden_norm=norm, hidden_bias=True)
