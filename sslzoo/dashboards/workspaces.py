"""Saved W&B workspaces, made from the definitions of panels: one to compare runs, and one per method.

A workspace has a name at the server that follows from its title, so that a second call finds it and replaces its
sections; what else was changed in the browser (further sections, colours, filters) stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sslzoo.dashboards.login import logged_in, server_url
from sslzoo.panels import AT_A_GLANCE, FRAMEWORK, Section, sections
from sslzoo.pictures import FOLDER, NAMES, name_of
from sslzoo.recipe import registry

PACKAGE = "wandb_workspaces"
PATIENCE = 20  # seconds to reach the server
COMPARISON = "sslzoo: comparison"
# Columns of the table of runs. The server keeps a config under `value`, after the first part of a key.
PINNED = (
    "config:method.value.name",
    "config:name.value",
    "config:seed.value",
    "summary:eval/linear_top1",
    "summary:eval/knn_top1",
    "summary:repr/rankme",
    "summary:verdict/state",
    "summary:sys/images_per_s",
)
_OPEN = ("learning", "evaluation", "method")  # sections that are open at first


def is_installed() -> bool:
    """Whether the package is installed."""
    return find_spec(PACKAGE) is not None


def require_package() -> None:
    """Raise ``ValueError`` if the package is not installed."""
    if not is_installed():
        raise ValueError("needs the package wandb-workspaces: pip install 'sslzoo[dashboards]'")


def build(entity: str, project: str) -> list[Any]:
    """The workspaces of ``project``: for comparison, with runs grouped by method and recipe, then one for each
    registered method."""
    found = [_workspace(entity, project, COMPARISON, FRAMEWORK, method=None)]
    analyses = [(name, registry.analysis_class(name).panels) for name in registry.analyses()]
    for name in registry.methods():
        shown = sections(name, registry.method_config(name).panels, analyses=analyses)
        found.append(_workspace(entity, project, f"sslzoo: {name}", shown, method=name))
    return found


def as_json(workspaces: list[Any]) -> str:
    """What is saved, by title."""
    specs = {view.name: view._to_model().spec for view in workspaces}
    return json.dumps(
        {
            name: spec.model_dump(mode="json", by_alias=True, exclude_none=True)
            for name, spec in specs.items()
        },
        indent=2,
    )


def save(project: str, entity: str | None) -> list[str]:
    """Create or update the workspaces of ``project``, of the login's default entity if ``entity`` is None; returns
    their addresses.

    Raises ``ValueError`` if there is no login, and other exceptions if the server cannot be reached.
    """
    if not logged_in():
        raise ValueError(f"there is no login for {server_url()}: run wandb login, or set WANDB_API_KEY")
    _library()
    import wandb

    owner = entity or str(wandb.Api(timeout=PATIENCE).default_entity)
    return [_updated(workspace).save().url for workspace in build(owner, project)]


def _workspace(
    entity: str, project: str, title: str, shown: tuple[Section, ...], *, method: str | None
) -> Any:
    ws, wr = _library()
    by_recipe, by_method = ws.Config("name"), ws.Config("method.value.name")
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            _at_a_glance(ws, wr),
            *([_results(ws, wr)] if method is None else []),
            *(_section(ws, wr, section) for section in shown),
            _pictures(ws, wr, analyses=[] if method is None else registry.analyses()),
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=20),
        runset_settings=ws.RunsetSettings(
            groupby=[by_method, by_recipe] if method is None else [by_recipe],
            filters="" if method is None else f"Config('method.value.name') = '{method}'",
            pinned_columns=list(PINNED),
        ),
    )
    workspace._internal_name = f"nw-{_id(title)}-v"
    workspace._internal_runset_id = _id(title + " runs")
    return workspace


def _section(ws: Any, wr: Any, section: Section) -> Any:
    return ws.Section(
        name=section.title,
        is_open=section.name in _OPEN,
        panels=[
            _known(
                wr.LinePlot(
                    title=panel.title,
                    x="step",
                    y=[curve.key for curve in panel.curves],
                    metric_regex="|".join(curve.pattern for curve in panel.curves),
                    title_x="optimiser step",
                    title_y="" if panel.unit == "%" else panel.unit,
                    log_y=panel.log_scale or None,
                    groupby_aggfunc="mean",
                    groupby_rangefunc="stddev",
                    max_runs_to_show=20,
                ),
                f"{section.title} {panel.title}",
            )
            for panel in section.panels
        ],
    )


def _at_a_glance(ws: Any, wr: Any) -> Any:
    """Numbers of all runs that are shown."""
    tiles = [
        _known(
            wr.ScalarChart(
                title=figure.title,
                metric=wr.SummaryMetric(figure.key),
                groupby_aggfunc=figure.over_runs,
                font_size="large",
            ),
            figure.key,
        )
        for figure in AT_A_GLANCE
    ]
    return ws.Section(name="At a glance", is_open=True, panels=tiles)


def _results(ws: Any, wr: Any) -> Any:
    """Final figures as bars, with the spread over seeds, and the keys in which recipes differ."""
    figures = {"eval/linear_top1": "linear probe, top-1", "eval/knn_top1": "k-NN, top-1"}
    bars = [
        _known(
            wr.BarPlot(
                title=title,
                metrics=[wr.SummaryMetric(key)],
                groupby_aggfunc="mean",
                groupby_rangefunc="stddev",
            ),
            key,
        )
        for key, title in figures.items()
    ]
    return ws.Section(
        name="Results",
        is_open=True,
        panels=[*bars, _known(wr.RunComparer(diff_only=True), "differences of recipes")],
    )


def _pictures(ws: Any, wr: Any, *, analyses: Iterable[str]) -> Any:
    drawn = [
        name_of(name, drawing) for name in analyses for drawing in registry.analysis_class(name).drawings
    ]
    keys = [*(f"{FOLDER}/{name}" for name in (*NAMES, *drawn)), "report"]
    media = wr.MediaBrowser(title="pictures and report", media_keys=keys, num_columns=2)
    return ws.Section(name="Pictures", panels=[_known(media, "pictures")])


def _known(panel: Any, name: str) -> Any:
    """``panel`` with an id that follows from ``name``, so that changes made in the browser are kept for it."""
    panel._id = _id(name)
    return panel


def _updated(workspace: Any) -> Any:
    """The workspace at the server with the sections of ``workspace``, or ``workspace`` itself if there is none."""
    internal = import_module(f"{PACKAGE}.workspaces.internal")
    try:
        view = internal.View.from_name(workspace.entity, workspace.project, workspace._internal_name)
    except ValueError:  # there is no such view, or no run in the project yet
        return workspace
    kept = type(workspace)._from_model(view)
    before = {section.name: section for section in kept.sections}
    for section in workspace.sections:
        if section.name in before:
            section._id = before.pop(section.name)._id
    kept.sections = [*workspace.sections, *before.values()]
    return kept


def _id(text: str) -> str:
    return hashlib.sha256(f"sslzoo {text}".encode()).hexdigest()[:11]


def _library() -> tuple[Any, Any]:
    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own use of pydantic
        return import_module(f"{PACKAGE}.workspaces"), import_module(f"{PACKAGE}.reports.v2")
