"""Panels show what methods record, all of it, and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest

from sslzoo.panels import Panel, sections
from sslzoo.recipe.registry import method_config
from sslzoo.testing.course import train
from tests.contract.test_methods import METHODS, VARIANTS, recipe_of


def recorded_by(method: str, folder: Path) -> set[str]:
    """The keys ``method/...`` in the metrics of one step of the method and of each of its variants."""
    keys: set[str] = set()
    for number, variant in enumerate(("", *VARIANTS[method])):
        run = folder / str(number)
        train(recipe_of(method, variant), run, steps=1)
        with (run / "metrics.csv").open(newline="") as file:
            keys |= set(next(csv.reader(file)))
    return {key for key in keys if key.startswith("method/") and not key.endswith("_epoch")}


def shown(panels: Iterable[Panel]) -> list[str]:
    return [curve.key for panel in panels for curve in panel.curves]


@pytest.mark.filterwarnings("ignore:method.queue_size=40 spans an epoch")
@pytest.mark.parametrize("method", METHODS)
def test_panels_show_every_metric_once_and_no_other(method: str, tmp_path: Path) -> None:
    keys = shown(method_config(method).panels)
    assert sorted(keys) == sorted(recorded_by(method, tmp_path))


@pytest.mark.parametrize("method", METHODS)
def test_a_panel_says_how_to_read_it(method: str) -> None:
    for section in sections(method, method_config(method).panels):
        for panel in section.panels:
            assert panel.note.endswith("."), panel.title
            assert panel.title
            assert all(curve.label for curve in panel.curves)


def test_what_a_method_without_panels_records_is_shown() -> None:
    recorded = ["step", "train/loss", "train/loss_epoch", "method/own_figure", "method/own_figure_epoch"]
    own = next(section for section in sections("mine", (), recorded) if section.name == "method")
    assert own.title == "mine"
    assert [(panel.title, shown([panel])) for panel in own.panels] == [("own figure", ["method/own_figure"])]
