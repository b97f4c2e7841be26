"""Saved W&B workspaces: every panel is there, and a second call changes nothing that a person has changed.

All that is saved is in ``workspaces.jsonl``. ``python -m tests.dashboards.test_workspaces`` writes it anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sslzoo.dashboards import workspaces
from sslzoo.exits import ExitCode
from sslzoo.panels import sections
from sslzoo.recipe import registry
from tests.command import fork
from tests.wandb_server import serving

KNOWN = Path(__file__).parent / "workspaces.jsonl"
needed = pytest.mark.skipif(not workspaces.is_installed(), reason="needs wandb-workspaces")


def _sections(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec["section"]["panelBankConfig"]["sections"]


def _curves(spec: dict[str, Any]) -> set[str]:
    return {
        key
        for part in _sections(spec)
        for panel in part["panels"]
        if panel["viewType"] == "Run History Line Plot"
        for key in panel["config"]["metrics"]
    }


def described(specs: dict[str, dict[str, Any]]) -> list[str]:
    """``specs`` as lines of JSON: of each workspace, section and panel; a section that an earlier workspace has too is
    only named."""
    lines: list[Any] = []
    known: dict[str, str] = {}  # workspace by section
    for name, spec in specs.items():
        sections = _sections(spec)
        bank = spec["section"]["panelBankConfig"] | {"sections": "below"}
        lines.append({"workspace": name} | spec | {"section": spec["section"] | {"panelBankConfig": bank}})
        for section in sections:
            before = known.setdefault(json.dumps(section), name)
            if before != name:
                lines.append({"section": section["name"], "as in": before})
                continue
            panels = section["panels"]
            lines += [{"section": section["name"]} | section | {"panels": len(panels)}, *panels]
    return [json.dumps(line) for line in lines]


@needed
def test_what_is_printed_is_known_in_full(tmp_path: Path) -> None:
    command = fork(tmp_path, "dashboard", "--project", "p", "--print")
    assert command.wait() == 0 and command.err == "", command.said
    specs = json.loads(command.out)
    known = KNOWN.read_text().splitlines()
    assert described(specs) == known, "if that is meant: python -m tests.dashboards.test_workspaces"


@needed
def test_each_method_has_a_workspace_with_all_its_panels() -> None:
    specs = json.loads(workspaces.as_json(workspaces.build("", "p")))
    assert list(specs) == [workspaces.COMPARISON, *(f"sslzoo: {name}" for name in registry.methods())]
    analyses = [(name, registry.analysis_class(name).panels) for name in registry.analyses()]
    for name in registry.methods():
        spec = specs[f"sslzoo: {name}"]
        shown = sections(name, registry.method_config(name).panels, analyses=analyses)
        keys = {curve.key for section in shown for panel in section.panels for curve in panel.curves}
        assert _curves(spec) == keys
        (runs,) = spec["section"]["runSets"]
        (only,) = runs["filters"]["filters"]
        assert (only["key"]["name"], only["value"]) == ("method.value.name", name)


@needed
def test_workspaces_are_created_and_then_updated_in_place(tmp_path: Path) -> None:
    with serving() as server:
        for name in ("created", "updated"):
            command = fork(tmp_path, "dashboard", "--project", "p", environment=server.environment, name=name)
            assert command.wait() == 0 and command.err == "", command.said
            addresses = command.out.split()
            assert len(addresses) == len(server.views) == 1 + len(registry.methods())
            assert all(address.startswith(f"{server.url}/e/p?nw=") for address in addresses)
            if name == "created":  # somebody adds a section and colours in the browser
                view = next(iter(server.views.values()))
                assert "id" not in view and view["displayName"] == workspaces.COMPARISON
                spec = json.loads(view["spec"])
                mine = _sections(spec)[1] | {"name": "mine", "panels": []}
                _sections(spec).append(mine)
                spec["section"]["customRunColors"] = {"a": "#ff0000"}
                del _sections(spec)[1]["panels"][0]
                view["spec"] = json.dumps(spec)
        view = next(iter(server.views.values()))
        spec = json.loads(view["spec"])
        assert view["id"] == f"V-{view['name']}"
        assert [part["name"] for part in _sections(spec)][-1] == "mine"
        assert spec["section"]["customRunColors"] == {"a": "#ff0000"}
        assert "train/loss" in _curves(spec)


def _without_package() -> None:
    workspaces.find_spec = lambda name, package=None: None  # type: ignore[assignment]


def test_refusals(tmp_path: Path) -> None:
    command = fork(tmp_path, "dashboard", "--project", "p", before=_without_package)
    assert command.wait() == ExitCode.USAGE
    assert command.err.startswith(
        "sslzoo dashboard: needs the package wandb-workspaces: pip install 'sslzoo["
    )
    if workspaces.is_installed():
        nobody = {"NETRC": os.devnull, "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
        command = fork(tmp_path, "dashboard", "--project", "p", environment=nobody)
        assert command.wait() == ExitCode.USAGE and "no login for http://127.0.0.1:9" in command.err


if __name__ == "__main__":
    KNOWN.write_text("\n".join([*described(json.loads(workspaces.as_json(workspaces.build("", "p")))), ""]))
