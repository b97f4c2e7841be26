"""What ``make zoo`` would train, and the table that it writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sslzoo.files import write_json
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import methods

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("zoo", ROOT / "docs/results/zoo.py")
assert _spec is not None
assert _spec.loader is not None
zoo = importlib.util.module_from_spec(_spec)
sys.modules["zoo"] = zoo  # dataclasses look it up
_spec.loader.exec_module(zoo)


def finish(plan: Any) -> None:
    """The files of finished runs, as if they had been trained."""
    for number, (out, arguments) in enumerate(plan.runs()):
        (out / "eval").mkdir(parents=True)
        method = arguments[2].partition("_")[0]
        seed = int(next(a for a in arguments if a.startswith("seed=")).removeprefix("seed="))
        recipe = {
            "name": arguments[2],
            "method.name": method,
            "seed": seed,
            "trainer.max_epochs": plan.epochs,
        }
        write_json(out / "manifest.json", {"recipe": recipe, "exit_code": 0, "versions": {"torch": "9.9"}})
        figures = {"linear_top1": 0.8 + number / 100, "knn_top1": 0.75, "raw_pixels_linear_top1": 0.7}
        write_json(out / "eval" / "summary.json", figures)


def test_every_method_and_seed_is_trained_with_the_same_budget(tmp_path: Path) -> None:
    runs = zoo.Plan(tmp_path).runs()
    loaded = [load_recipe(arguments[2], arguments[7:]).recipe for _, arguments in runs]
    assert {recipe.method.name for recipe in loaded} == methods().keys()
    assert len({out for out, _ in runs}) == len(runs) == 18
    assert {(r.max_epochs, r.data.dataset, r.data.global_batch_size) for r in loaded} == {
        (zoo.EPOCHS, "fashion_mnist_12k", 128)
    }


def test_the_table_has_means_over_seeds_and_goes_into_readme(tmp_path: Path) -> None:
    plan = zoo.Plan(tmp_path / "runs", ("simclr", "sce"), (1, 2))
    finish(plan)
    readme, document = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    zoo.write(plan, document, readme)
    table = readme.read_text()
    assert table.startswith("before\n") and table.endswith("after\n") and "old" not in table
    assert "| simclr | 81.0 ± 1.4 | 75.0 ± 0.0 |" in table
    assert "| sce | 82.0 ± 1.4 | 75.0 ± 0.0 |" in table
    assert "| raw pixels | 70.0 ± 0.0 | - |" in table
    assert "+1.0 ± 0.0 (n=2)" in document.read_text(), "paired differences"
    zoo.write(plan, document, readme)
    assert readme.read_text() == table


def test_finished_runs_are_kept_and_failures_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(zoo.Plan(tmp_path, ("simclr",), (1,)))
    started: list[str] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[command.index("--out") + 1])

        def wait(self) -> int:
            return int("sce" in started[-1])

    monkeypatch.setattr(subprocess, "Popen", Process)
    plan = zoo.Plan(tmp_path, ("simclr", "sce", "mmcl"), (1,))
    assert zoo.train(plan, 1) == [tmp_path / "sce_fashion_mnist" / "seed-1"]
    assert [Path(out).parent.name for out in started] == ["sce_fashion_mnist", "mmcl_fashion_mnist"]
    with pytest.raises(
        ValueError, match=r"not finished: sce_fashion_mnist/seed-1, mmcl_fashion_mnist/seed-1"
    ):
        zoo.results(plan)


def test_readme_has_a_place_for_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(zoo.BEGIN) == text.count(zoo.END) == 1


@pytest.mark.parametrize("options", [["--write"], []])
def test_runs_of_another_budget_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    finish(zoo.Plan(tmp_path, ("simclr",), (1,)))
    common = ["--folder", str(tmp_path), "--methods", "simclr", "--seeds", "1", "--epochs", "9", "--try"]
    assert zoo.main([*common, *options]) == 2
    folder = tmp_path / "simclr_fashion_mnist" / "seed-1"
    assert f"{folder} has trainer.max_epochs=6, not 9" in capsys.readouterr().err
