"""Results: what their files say again when read, and the published figure beside them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from sslzoo.posthoc.evaluations import Bench, _compared
from sslzoo.posthoc.results import Results, Row
from sslzoo.protocols.protocol import protocol_named
from sslzoo.recipe.load import load_recipe

ROWS = (
    Row(
        key="x",
        title="last epoch",
        top1=0.5,
        top5=0.75,
        n=400,
        chosen="rate 0.1",
        holdout_top1=0.45,
        n_held_out=100,
    ),
    Row(key="x_best", title="best", top1=0.625, n=400, published="63.0", gap=-0.5),
    Row(key="x", data="cifar10", layer="projector", top1=0.25, n=100),
)
FOUND = Results(
    name="x",
    how="By trying.",
    rows=ROWS,
    counts={"data": {"n_train": 900, "n_test": 400}, "cifar10": {"n_bank": 50, "n_test": 100}},
    datasets={"data": "stl10", "cifar10": "cifar10"},
    identity={"seed": 1, "weights": {"backbone": "ab"}},
    about={"step": 7},
)


def test_files_say_the_same_again(tmp_path: Path) -> None:
    path = FOUND.write(tmp_path)
    assert Results.read(path).plain() == FOUND.plain()
    (tmp_path / "y.json").write_text('{"name": "y"}')
    with pytest.raises(ValueError, match=r"y\.json is no result of an evaluation"):
        Results.read(tmp_path / "y.json")
    assert (
        (tmp_path / "x.csv")
        .read_text()
        .splitlines()[1]
        .startswith("x,x,last epoch,data,backbone,0.5,0.4512,0.5488")
    )


def test_keys_are_those_of_the_summary() -> None:
    assert FOUND.figures() == {
        "x_top1": 0.5,
        "x_top5": 0.75,
        "x_best_top1": 0.625,
        "x_top1/cifar10/projector": 0.25,
    }
    low, high = FOUND.intervals()["x_top1/cifar10/projector"]
    assert 0.17 < low < 0.25 < high < 0.35  # 100 images, not 400


def test_one_table_for_each_data_set() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(*FOUND.tables())
    text = " ".join(cast(io.StringIO, console.file).getvalue().split())
    assert "x on stl10 (%)" in text and "x on cifar10 (%)" in text
    assert "50.0 ±4.9" in text and "rate 0.1 (held-out 45.0 ±9.6)" in text and "63.0 (-0.5)" in text
    assert "900 for training, 400 for testing" in text and "50 to search for neighbours" in text


def _bench(step: int, *overrides: str) -> Bench:
    """With an encoder of sce_in1k, of which the header publishes 72.7 by the protocol sce."""
    target = SimpleNamespace(recipe=load_recipe("sce_in1k", overrides).recipe, step=step)
    return cast(Bench, SimpleNamespace(target=target, data=SimpleNamespace(train_source=range(1_281_167))))


@pytest.mark.parametrize(
    ("name", "step", "override", "gap", "said"),
    [
        ("sce", 5, "seed=1", None, "the encoder is from step 5 of "),
        ("sce", 0, "seed=1", 0.3, "Published: 72.7 (README of the official code)."),
        ("sce", 0, "optim.lr=0.2", None, "the recipe differs in optim.lr"),
        ("honest", 0, "seed=1", None, "by protocol sce"),
    ],
)
def test_a_gap_needs_the_recipe_the_protocol_and_the_whole_training(
    name: str, step: int, override: str, gap: float | None, said: str
) -> None:
    recipe: Any = load_recipe("sce_in1k").recipe
    whole = 1_281_167 // recipe.data.global_batch_size * recipe.max_epochs
    protocol = protocol_named(name)
    key = f"{name}_best" if protocol.reported == "best" else name
    rows = [Row(key=key, top1=0.73, n=50_000), Row(key=key, data="cifar10", top1=0.5, n=10)]
    (row, other), remark = _compared(_bench(step or whole, override), protocol, rows)
    assert row.published == "72.7" and other.published == ""
    assert (row.gap is None) if gap is None else abs((row.gap or 0) - gap) < 1e-9
    assert said in remark
