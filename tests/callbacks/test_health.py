"""A run that goes wrong says so, and one that has collapsed stops where the recipe asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sslzoo.exits import ExitCode
from tests.command import fork, group, manifest, write_recipe

POINT = (
    "method={name: 'tests.data.verdict.record:NoNegatives', temperature: 0.2, projector: {widths: [32, 32]}}",
    "trainer.max_epochs=4",
    "probe={}",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path)
    return tmp_path


def arguments(folder: Path) -> tuple[object, ...]:
    """A run without negatives."""
    return ("fit", "--recipe", "tiny.yaml", "--out", folder / "run", *POINT)


@pytest.mark.parametrize("world", [1, 2])
def test_a_collapse_ends_the_run_where_the_recipe_asks_for_it(folder: Path, world: int) -> None:
    stop = ("eval.stop_on_collapse=true", "trainer.sync_batchnorm=true", f"trainer.devices={world}")
    if world == 1:
        command = fork(folder, *arguments(folder), *stop)
    else:
        command, other = group(folder, *arguments(folder), *stop)
        assert other.wait() == ExitCode.COLLAPSED, other.said
    assert command.wait() == ExitCode.COLLAPSED, command.said
    kept = manifest(folder / "run")
    assert (kept["exit_code"], kept["error"]["kind"]) == (77, "Collapsed")
    assert "complete collapse; usual causes: no negatives" in kept["error"]["message"]
    *_, happened, what_next = command.err.splitlines()
    assert happened.startswith("sslzoo fit: collapsed since epoch ") and "is even" in happened
    assert what_next.startswith("change the recipe, and start a new run")
    assert list((folder / "run" / "checkpoints").glob("step=*.ckpt"))
    assert not (folder / "run" / "eval" / "summary.json").exists()


def test_a_collapse_is_said_once_and_stands_in_the_summary(folder: Path) -> None:
    command = fork(folder, *arguments(folder))
    assert command.wait() == 0, command.said
    assert command.err.count("warning: collapsed since epoch") == 1
    verdict = json.loads((folder / "run" / "eval" / "summary.json").read_text())["verdict"]
    assert verdict["state"] == "collapsed" and verdict["since_epoch"] <= 4
    assert f"collapsed since epoch {verdict['since_epoch']}: {verdict['reason']}" in command.out
