"""The wheel, installed away from the repository, finds its methods, recipes and data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone."""
    folder = tmp_path_factory.mktemp("wheel")
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run(
        [*python, "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel],
        check=True,
        capture_output=True,
    )
    return folder / "site"


def _sslzoo(installed: Path, cwd: Path, *arguments: str) -> str:
    """Output of the installed command, run outside the repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    code = "import sslzoo, sys; print(sslzoo.__file__); from sslzoo.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, _, output = done.stdout.partition("\n")
    assert Path(where).is_relative_to(installed), f"the repository was imported instead: {where}"
    return output


def test_lists_every_method_and_recipe(installed: Path, tmp_path: Path):
    output = _sslzoo(installed, tmp_path, "ls")
    recipes = {path.stem for path in (ROOT / "recipes/sslzoo_recipes").glob("*.yaml")}
    methods = {path.parent.name for path in (ROOT / "methods/sslzoo_methods").glob("*/method.py")}
    words = set(output.replace(",", " ").split())
    assert recipes and recipes <= words, recipes - words
    assert methods and methods <= words, methods - words


def test_carries_cards_licences_and_embedded_data(installed: Path):
    for path in (ROOT / "methods/sslzoo_methods").glob("*/README.md"):
        assert (installed / "sslzoo_methods" / path.parent.name / "README.md").is_file()
    assert (installed / "sslzoo/data/embedded/LICENSE").is_file()
    assert list((installed / "sslzoo/data/embedded").glob("*.npz"))
    assets = {path.name for path in (installed / "sslzoo/pages/assets").iterdir()}
    assert {"LICENSE", "page.css", "page.js", "uPlot.iife.min.js", "uPlot.min.css"} <= assets


def test_trains_a_step_outside_the_repository(installed: Path, tmp_path: Path):
    output = _sslzoo(installed, tmp_path, "fit", "--recipe", "quickstart", "--dry-run")
    assert "a checkpoint of" in output and "passed" in output


def test_checks_a_method_outside_the_repository(installed: Path, tmp_path: Path):
    shutil.copy(installed / "sslzoo_methods/simclr/method.py", tmp_path / "mine.py")
    overrides = ["method.temperature=0.2", "method.projector={widths: [16, 8]}"]
    output = _sslzoo(installed, tmp_path, "check-method", "mine:SimCLR", *overrides, "--only", "labels,bf16")
    assert "mine:SimCLR keeps 2 of 2 promises" in output
