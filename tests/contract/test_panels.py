"""Panels show what methods record, all of it, and nothing else."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from sslzoo.panels import Curve, Panel, sections
from sslzoo.recipe.registry import analyses, analysis_class, method_config
from sslzoo.run.build import build_experiment
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


@pytest.mark.parametrize("name", analyses())
def test_panels_show_every_metric_of_an_analysis_and_no_other(name: str) -> None:
    analysis = analysis_class(name)(analysis_class(name).Config(name=name))
    experiment = build_experiment(recipe_of("simclr", "local crops"))
    batch = experiment.data.batch_of(range(8))
    recorded = analysis.metrics(analysis.describe([analysis.observe(experiment.method, batch)]))
    keys = shown(type(analysis).panels)
    assert len(set(keys)) == len(keys) and set(keys) <= set(recorded)
    # Of other margins, and other pairs of views.
    assert [key for key in recorded if not any(key == of or key.startswith(f"{of}/") for of in keys)] == []
    found = sections("simclr", (), recorded, analyses=[(name, type(analysis).panels)])
    (section,) = [section for section in found if section.name == "analysis"]
    assert section.title == f"Analysis: {name}"


@pytest.mark.parametrize("method", METHODS)
def test_a_panel_says_how_to_read_it(method: str) -> None:
    of_analyses = [(name, analysis_class(name).panels) for name in analyses()]
    for section in sections(method, method_config(method).panels, analyses=of_analyses):
        for panel in section.panels:
            if panel.unit == "%":
                assert not re.search(r"[Nn]ear 1\b", panel.note), f"{panel.title}: shown times 100"
            assert panel.note.endswith("."), panel.title
            assert panel.title
            assert all(curve.label for curve in panel.curves)


def test_what_is_recorded_without_panels_is_shown() -> None:
    recorded = [
        "step",
        "train/loss",
        "train/loss_epoch",
        "method/own_figure",
        "method/own_figure_epoch",
        "my/spread",
    ]
    own, other = [
        section for section in sections("mine", (), recorded) if section.name in ("method", "analysis")
    ]
    assert (own.title, other.title) == ("mine", "Analyses")
    assert [(panel.title, shown([panel])) for panel in own.panels] == [("own figure", ["method/own_figure"])]
    assert [(panel.title, shown([panel])) for panel in other.panels] == [("my spread", ["my/spread"])]


def test_a_curve_stands_also_for_its_metric_elsewhere() -> None:
    recorded = ["method/x", "method/x_epoch", "method/x/y", "method/x/y_epoch", "method/xy"]
    x, other = Curve(key="method/x", label="X"), Curve(key="method/z", label="Z")
    alone, two = Panel(title="t", curves=(x,)), Panel(title="t", curves=(x, other))
    assert alone.lines(recorded) == [("method/x", ""), ("method/x/y", "y")]
    assert two.lines(recorded) == [("method/x", "X"), ("method/x/y", "X, y"), ("method/z", "Z")]
    assert [key for key in recorded[:3:2] if re.search(x.pattern, key)] == ["method/x", "method/x/y"]
    assert not re.search(x.pattern, "method/xy")
