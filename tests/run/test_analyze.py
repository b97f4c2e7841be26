"""An analysis of a stranger's: beside a training, at its checkpoints, and what is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from sslzoo.cli.main import main
from sslzoo.exits import ExitCode
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.run import build
from tests.command import fork, saved, write_recipe

SPREAD = '''
from dataclasses import dataclass

from sslzoo.analysis import Analysis
from sslzoo.recipe.sections import AnalysisConfig


@dataclass(frozen=True, kw_only=True)
class SpreadConfig(AnalysisConfig):
    layer: str = "backbone"
    digits: int = 6


class Spread(Analysis[SpreadConfig]):
    """How far features lie from one another. Draws random numbers, which is its own affair."""

    Config = SpreadConfig

    def look(self, method, batch):
        import torch

        torch.rand(7)
        return method.features(batch.global_views[0])[self.cfg.layer].std(0).mean()

    def describe(self, seen):
        return {"spread": float(sum(seen)) / len(seen)}

    def metrics(self, described):
        return {"spread/mean": described["spread"]}

    def write(self, looks, *, recipe, sample_id, out):
        noted = ", ".join(str(record["step"]) for record in looks[-1].history)
        steps = ", ".join(f"{look.step}: {self.describe(look.seen)['spread']:.{self.cfg.digits}f}" for look in looks)
        (out / "spread.txt").write_text(steps)
        return f"{recipe.name}, {len(sample_id)} images, noted at {noted}; {steps}"
'''
NAME = "spread:Spread"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny.yaml``, the analysis beside it, a run with it and one without."""
    folder = tmp_path_factory.mktemp("analyze")
    write_recipe(folder)
    (folder / "spread.py").write_text(SPREAD)
    watched = f"analyses=[{{name: '{NAME}', every_steps: 4}}]"
    for out, *changes in (("plain",), ("watched", watched)):
        run = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", out, "trainer.max_epochs=1", *changes)
        assert run.wait() == 0, run.said
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def _rows(run: str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_logs_beside_a_training_and_leaves_no_trace_in_it() -> None:
    plain, watched = _rows("plain"), _rows("watched")
    looks = [row for row in watched if row["spread/mean"]]
    assert [row["step"] for row in looks] == ["0", "4"]
    rest = [{k: v for k, v in row.items() if k != "spread/mean"} for row in watched if row not in looks]
    assert rest == plain


def test_it_looks_at_every_checkpoint_of_a_run(capsys: Any) -> None:
    steps = saved(Path("watched"))
    assert len(steps) == 2
    assert main(["analyze", NAME, "watched", "--digits", "2", "--samples", "20"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny, 32 images, noted at 0, 4; ")
    assert [float(part.split(": ")[0]) for part in said.partition("; ")[2].split(", ")] == steps
    assert len(said.strip().rpartition(".")[2]) == 2
    assert Path("watched/Spread/spread.txt").read_text() in said


def test_checkpoints_may_be_named_and_images_changed(capsys: Any) -> None:
    """The name of a checkpoint has the form of a change, which may stand before and behind options."""
    first, last = (path.name for path in sorted(Path("watched/checkpoints").glob("step=*.ckpt")))
    shutil.copy(f"watched/checkpoints/{first}", first)
    shutil.copy(f"watched/checkpoints/{last}", last)
    command = ["analyze", NAME, last, "--out", "out", "--recipe", "watched/recipe.yaml"]
    assert main([*command, "seed=5", first, "data.global_batch_size=8", "--samples", "8"]) == 0
    said = capsys.readouterr().out
    assert "tiny, 8 images" in said and said.count(": ") == 2
    assert main([*command, "seed=6", "--samples", "16"]) == 0
    assert capsys.readouterr().out.partition("; ")[2] != said.partition("; ")[2]


def test_it_looks_at_an_exported_encoder(capsys: Any, caplog: Any) -> None:
    assert main(["analyze", NAME, "watched/exported/backbone.safetensors", "--samples", "8"]) == 0
    said = capsys.readouterr().out
    assert main(["analyze", NAME, f"watched/checkpoints/step={6:09d}.ckpt", "--samples", "8"]) == 0
    # The same features, without the numbers that were recorded during training.
    assert said.partition("; ")[2] == capsys.readouterr().out.partition("; ")[2]
    assert "noted at ; " in said and "is an exported encoder" in caplog.text


def test_the_data_set_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = build.open_source
    monkeypatch.setattr(build, "open_source", lambda cfg: (opened.append(cfg), original(cfg))[1])
    assert main(["analyze", NAME, "watched", "--samples", "8"]) == 0
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody", "watched"], "unknown analysis 'nobody'"),
        (["spread:Nothing", "watched"], "analyses.name 'spread:Nothing' cannot be loaded"),
        ([NAME, "seed=3"], "name a run directory or a checkpoint"),
        ([NAME, "nowhere"], "nowhere: there is no such checkpoint or run directory"),
        ([NAME, "watched/eval"], "there is no checkpoint in watched/eval"),
        ([NAME, "x.ckpt"], "x.ckpt is not in a run directory: name a folder for the report with --out"),
        ([NAME, "x.ckpt", "--out", "out"], "method.name: tests.command:Faulty is code that this file names"),
        ([NAME, "watched", "--samples", "0"], "--samples must be positive, got 0"),
        ([NAME, "watched", "plain"], "these are checkpoints of 2 runs"),
        ([NAME, "watched", "--digits", "few"], "--digits DIGITS: expected a whole number, got 'few'"),
        (
            [NAME, "watched", "--digit", "2", "--layers", "x"],
            "unknown argument '--layers'; did you mean --layer?",
        ),
        ([NAME, "watched", "--recipe", "simclr_fashion_mnist"], "give the recipe of its run with --recipe"),
        (
            [NAME, "watched", "backbone.in_channels=3"],
            "override: backbone.in_channels: 3 channels, but",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, folder: Path, capsys: Any
) -> None:
    shutil.copy(next(folder.glob("watched/checkpoints/step=*.ckpt")), folder / "x.ckpt")
    try:
        code = main(["analyze", *arguments])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "") and message in said.err and said.err.count("\n") == 1


def test_help_has_the_options_of_the_analysis(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", NAME, "--help"])
    said = capsys.readouterr().out
    assert f"options of {NAME}:" in said and "(default: backbone)" in said and "--every-steps" not in said


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_a_method_cannot_show_is_refused_before_the_run(folder: Path, more: list[str]) -> None:
    run = fork(
        folder, "fit", "--recipe", "tiny.yaml", "--out", "refused", "analyses=[{name: margins}]", *more
    )
    assert run.wait() == ExitCode.USAGE, run.said
    assert "has no pairs to analyse" in run.err and len(run.err.splitlines()) == 1
    assert not (folder / "refused").exists()


def test_a_recipe_names_each_analysis_once_and_nothing_else() -> None:
    for changed, message in (
        (
            f"[{{name: '{NAME}'}}, {{name: '{NAME}'}}]",
            r"analyses\.1\.name: spread:Spread is listed twice",
        ),
        (
            "[{name: 'tests.command:Faulty'}]",
            r"analyses\.0\.name: tests\.command:Faulty is not a valid analysis",
        ),
        (f"[{{name: '{NAME}', digit: 3}}]", r"unknown key; did you mean analyses\.0\.digits\?"),
        (f"[{{name: '{NAME}', every_steps: 0}}]", r"analyses\.0\.every_steps: must be positive, got 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("tiny.yaml", [f"analyses={changed}"])
    with pytest.raises(RecipeError, match=r"logging\.margins: unknown key; margins is an analysis"):
        load_recipe("tiny.yaml", ["logging.margins={margins: [[10.0, 0.0]]}"])
