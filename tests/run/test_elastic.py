"""A run continues on another number of processes where that cannot change its numbers, and is refused elsewhere."""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.recipe.plan import Division
from sslzoo.recipe.sections import BackboneConfig, Recipe
from sslzoo.run.build import build_experiment
from sslzoo.run.resize import obstacle
from sslzoo.testing.kills import Job, output, run, start, wait
from sslzoo.testing.small import BATCH, small_images
from tests.command import codes, fork, group, manifest, saved, until, write_recipe
from tests.contract.test_methods import METHODS, recipe_of

CLOSE = 1e-9
# Diagnostics of the images of one process, averaged over processes: another number of them, another mean.
OF_A_PROCESS = {
    *("method/online_std", "method/second_order_share", "method/log_u_min", "method/log_u_max"),
}


def _job(recipe: Recipe, processes: int, micro_batches: int, *, steps: int, pause: float = 0.0) -> Job:
    trainer = {
        "devices": processes,
        "accumulate_grad_batches": micro_batches,
        "max_epochs": 2,
        "precision": "64-true",
        "sync_batchnorm": True,
    }
    divided = replace(recipe, trainer=recipe.trainer | trainer)
    return Job(recipe=divided, samples=steps * BATCH, pause=pause)


def _run_in_legs(
    recipe: Recipe, folder: Path, legs: Sequence[tuple[int, int]], *, steps: int, pause: float
) -> None:
    """Each leg with its number of processes and of micro-batches; all but the last are killed at a random moment after
    they have saved."""
    draw = random.Random(0)
    for processes, micro_batches in legs[:-1]:
        before = saved(folder)[-1:]
        ranks = start(_job(recipe, processes, micro_batches, steps=steps, pause=pause), folder)
        assert until(lambda b=before, r=ranks: saved(folder)[-1:] > b or any(p.exitcode for p in r))
        time.sleep(draw.uniform(0.0, 2 * pause))
        for rank in ranks:
            rank.kill()
        assert set(wait(ranks)) == {-9}, output(folder)
    processes, micro_batches = legs[-1]
    run(_job(recipe, processes, micro_batches, steps=steps), folder)


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    elif isinstance(value, Tensor | float):
        yield key, torch.as_tensor(value, dtype=torch.float64)
    for name, item in items:
        yield from _tensors(item, f"{key}.{name}")


def _weights(folder: Path) -> dict[str, Tensor]:
    path = latest(folder / "checkpoints")
    assert path is not None
    content = load_checkpoint(path)
    return dict(_tensors({part: content[part] for part in ("state_dict", "optimizer_states")}))


def _metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {
                key: float(cell)
                for key, cell in row.items()
                if cell and key.removesuffix("_epoch") not in OF_A_PROCESS
            }
            for row in csv.DictReader(file)
        ]


def _equals(legs: Path, whole: Path) -> None:
    """Weights, state, optimiser and metrics, up to rounding."""
    one, other = _weights(whole), _weights(legs)
    assert one.keys() == other.keys()
    differ = {
        key: float((other[key] - value).abs().max())
        for key, value in one.items()
        if not torch.allclose(other[key], value, rtol=CLOSE, atol=CLOSE, equal_nan=True)
    }
    assert not differ
    assert _metrics(legs) == [pytest.approx(row, rel=CLOSE, abs=CLOSE) for row in _metrics(whole)]


@pytest.mark.slow  # ten processes each
@pytest.mark.parametrize("method", METHODS)
def test_four_then_two_then_three_processes_then_one(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(method)
    run(_job(recipe, 4, 1, steps=8), tmp_path / "whole")
    _run_in_legs(recipe, tmp_path / "legs", [(4, 1), (2, 1), (3, 1), (1, 1)], steps=8, pause=0.1)
    _equals(tmp_path / "legs", tmp_path / "whole")


class Plain(nn.Sequential):
    """An encoder without batch norm."""

    num_features = 16

    def __init__(self, in_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _without_norms(*overrides: str) -> Recipe:
    """SCE with a queue that no step fills evenly, and without batch norm."""
    recipe = recipe_of("sce")
    head = replace(recipe.method.projector, hidden_norm=False, output_norm="none")  # type: ignore[attr-defined]
    method = replace(recipe.method, projector=head, predictor=None)  # type: ignore[call-arg]
    backbone = BackboneConfig(name=f"{Plain.__module__}:{Plain.__name__}", in_channels=1)
    return replace(recipe, method=method, backbone=backbone)


def test_other_micro_batches_where_the_loss_has_one_image_a_term(tmp_path: Path) -> None:
    recipe = _without_norms()
    run(_job(recipe, 1, 1, steps=6), tmp_path / "whole")
    _run_in_legs(recipe, tmp_path / "legs", [(1, 2), (2, 3), (1, 1)], steps=6, pause=0.05)
    _equals(tmp_path / "legs", tmp_path / "whole")


# -- what is refused ----------------------------------------------------------------------------------------


def _obstacle(recipe: Recipe, before: Division, *, draws: bool = False) -> str:
    method = build_experiment(recipe, source=small_images(recipe, 2)).method
    return obstacle(method, recipe, before, draws=draws)


TWO, HALVES = Division(2, 1), Division(1, 2)


def test_reasons_to_refuse_another_division() -> None:
    recipe = recipe_of("simclr")
    synchronised = replace(recipe, trainer=recipe.trainer | {"sync_batchnorm": True})
    assert _obstacle(recipe, Division(1, 1), draws=True) == ""
    assert "trainer.sync_batchnorm=false" in _obstacle(recipe, TWO)
    assert _obstacle(synchronised, TWO) == ""
    assert "dropout" in _obstacle(synchronised, TWO, draws=True)
    assert "one micro-batch" in _obstacle(synchronised, HALVES)
    assert _obstacle(_without_norms(), HALVES) == _obstacle(_without_norms(), TWO) == ""


@pytest.mark.parametrize(
    ("method", "variant", "change", "processes", "micro_batches"),
    [
        ("simclr", "", {}, "", "SimCLR contrasts"),
        ("sce", "", {}, "", ""),
        ("sce", "keys and queue", {}, "", "batch_negatives=true contrasts"),
        ("sce", "", {"momentum_batchnorm": "split"}, "momentum_batchnorm=split", "momentum_batchnorm=split"),
        ("mmcl", "", {}, "", "MMCL separates"),
        ("mmcl", "", {"gather": False}, "method.gather=false", "MMCL separates"),
        ("sogclr", "", {}, "", "SogCLR contrasts"),
        ("sogclr", "bimodal", {}, "", "SogCLR contrasts"),
        ("metaug", "", {}, "", "after each micro-batch"),
        ("margin", "", {}, "", "method.base=simclr contrasts"),
        ("margin", "macl", {}, "", "method.base=simclr contrasts"),
        ("margin", "mocov2", {}, "", ""),
        ("margin", "simsiam", {}, "", "method.effects=isolated"),
    ],
)
def test_what_each_method_says(
    method: str, variant: str, change: dict[str, Any], processes: str, micro_batches: str
) -> None:
    recipe = recipe_of(method, variant)
    built = build_experiment(recipe, source=small_images(recipe, 2)).method
    built.cfg = replace(built.cfg, **change)
    for says, expected in (
        (built.depends_on_processes(), processes),
        (built.depends_on_micro_batches(), micro_batches),
    ):
        assert (expected in says) if expected else not says


# -- a user's run ----------------------------------------------------------------------------------------------

LONG = ("trainer.max_epochs=40", "eval.every_epochs=40")  # for a signal to arrive in it
SIMCLR = "method={name: simclr, temperature: 0.2, projector: {widths: [16, 8]}}"


@pytest.mark.slow  # eight starts
def test_fit_continues_on_other_processes_or_says_why_not(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    common = ("fit", "--recipe", "tiny.yaml", "--resume", "auto", *LONG, "trainer.precision=64-true")
    common = (*common, "probe={online: false}")  # it learns in float32
    sync = "trainer.sync_batchnorm=true"

    def stopped(out: str, *more: str) -> None:
        """A run of two processes that a signal has ended."""
        ranks = group(tmp_path, *common, "--out", out, "trainer.devices=2", *more)
        assert until(lambda: saved(tmp_path / out) or ranks[0].ended), ranks[0].said
        assert not ranks[0].ended, ranks[0].said
        ranks[0].signal(15)
        assert codes(ranks) == [75, 75], ranks[0].said

    stopped("plain", SIMCLR)
    alone = fork(tmp_path, *common, "--out", "plain", SIMCLR)
    assert alone.wait() == 2
    assert (
        "is of a run with 2 processes x 1 micro-batch, and cannot be continued with 1 process x 1"
        in alone.err
    )
    assert "(trainer.sync_batchnorm=false); change trainer.devices" in alone.err
    stopped("dropout", sync)
    alone = fork(tmp_path, *common, "--out", "dropout", sync)
    assert alone.wait() == 2 and "random numbers such as those of dropout depend on both" in alone.err

    stopped("one", SIMCLR, sync)
    alone = fork(tmp_path, *common, "--out", "one", SIMCLR, sync)
    assert alone.wait() == 0, alone.said
    assert "before this start 2 processes x 1 micro-batch" in " ".join(alone.out.split())
    assert "continuing with a changed trainer.devices: was 2, is 1" in alone.err
    starts = manifest(tmp_path / "one")["sessions"]
    assert [(s["world_size"], s["micro_batches"], s["nodes"]) for s in starts] == [(2, 1, 1), (1, 1, 1)]
    whole = group(tmp_path, *common, "--out", "whole", SIMCLR, sync, "trainer.devices=2")
    assert codes(whole) == [0, 0]
    _equals(tmp_path / "one", tmp_path / "whole")
