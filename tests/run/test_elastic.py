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
from sslzoo.recipe.sections import BackboneConfig, HeadConfig, Recipe
from sslzoo.run.build import build_experiment
from sslzoo.run.resize import obstacle
from sslzoo.testing.course import train
from sslzoo.testing.kills import Job, output, run, start, wait
from sslzoo.testing.small import BATCH, small_images
from sslzoo_methods.margin.config import Whole
from sslzoo_methods.metaug.config import SGD, MetaConfig
from tests.command import codes, fork, group, manifest, saved, until, write_recipe
from tests.contract.test_methods import METHODS, recipe_of

CLOSE = 1e-9


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
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


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


def _without_norms(recipe: Recipe) -> Recipe:
    """``recipe`` without batch norm."""
    config: Any = recipe.method

    def plain(head: HeadConfig) -> HeadConfig:
        return replace(head, hidden_norm=False, output_norm="none")

    method = replace(config, projector=plain(config.projector))
    if config.name == "sce":
        method = replace(method, predictor=None)
    elif hasattr(config.base, "predictor"):
        method = replace(method, base=replace(config.base, predictor=plain(config.base.predictor)))
    backbone = BackboneConfig(name=f"{Plain.__module__}:{Plain.__name__}", in_channels=1)
    return replace(recipe, method=method, backbone=backbone)


def test_other_micro_batches_where_the_loss_has_one_image_a_term(tmp_path: Path) -> None:
    recipe = _without_norms(recipe_of("sce"))
    run(_job(recipe, 1, 1, steps=6), tmp_path / "whole")
    _run_in_legs(recipe, tmp_path / "legs", [(1, 2), (2, 3), (1, 1)], steps=6, pause=0.05)
    _equals(tmp_path / "legs", tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "variant"),
    [("sce", "local crops"), ("sce", "asymmetric"), ("margin", "mocov2"), ("margin", "byol")],
)
def test_what_other_micro_batches_measure(method: str, variant: str, tmp_path: Path) -> None:
    recipe = _without_norms(recipe_of(method, variant))
    if method == "margin":
        recipe = replace(recipe, method=replace(recipe.method, effects=Whole()))  # type: ignore[call-arg]
    whole, parts = (train(_job(recipe, 1, m, steps=2).recipe, tmp_path / str(m), steps=2) for m in (1, 3))
    assert not whole.measured[0].keys() ^ parts.measured[0].keys()
    for step, measured in enumerate(whole.measured):
        for name, value in measured.items():
            mean = torch.stack([part[name] for part in parts.measured[3 * step : 3 * step + 3]]).mean(dim=0)
            torch.testing.assert_close(mean, value, rtol=CLOSE, atol=CLOSE, msg=name)


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
    plain = _without_norms(recipe_of("sce"))
    assert _obstacle(plain, HALVES) == _obstacle(plain, TWO) == ""


OWN_STEPS = MetaConfig(virtual_lr=0.1, optimizer=SGD(lr=0.1, weight_decay=0.0), sync_virtual_step=False)


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
        ("metaug", "", {"meta": OWN_STEPS}, "method.meta.sync_virtual_step=false", "after each micro-batch"),
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
