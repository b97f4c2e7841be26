"""The page of a run: what it shows, whatever is missing, and that it never gets large."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from sslzoo.cli.main import main
from sslzoo.files import write_json
from sslzoo.records import provenance
from sslzoo.records.page import page, write_page
from sslzoo.records.record import Record, records
from tests.command import ROOT

RECIPE = {
    "method.name": "sce",
    "data.dataset": "cifar10",
    "backbone.name": "resnet18",
    "trainer.max_epochs": 2,
}
SUMMARY = {
    "linear_top1": 0.9,
    "random_init_linear_top1": 0.5,
    "interval_95": {"linear_top1": [0.88, 0.92], "random_init_linear_top1": [0.48, 0.52]},
    "data_sets": {"data": {"dataset": "cifar10", "protocol": "As always."}},
}


def write_run(folder: Path, *, rows: int = 4, **changes: Any) -> Path:
    """The files of a finished run with an evaluation, and of one that ``changes`` of the manifest describe."""
    manifest = {
        "run_id": "id",
        "recipe": RECIPE,
        "world_size": 1,
        "exit_code": 0,
        "error": None,
        "sessions": [],
    }
    write_json(folder / "manifest.json", manifest | changes)
    keys = ["train/loss", "method/momentum", "method/target_count", "method/unheard_of", "val/linear_top1"]
    lines = [f"{s},0,{8 / (s + 1)},0.99,{s + 1},1.0,{'0.75' if s == rows - 1 else ''}" for s in range(rows)]
    (folder / "metrics.csv").write_text("\n".join([f"step,epoch,{','.join(keys)}", *lines, ""]))
    return folder


def run_with_summary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "eval").mkdir()
    write_json(folder / "eval" / "summary.json", SUMMARY)
    return write_run(folder)


def test_figures_have_intervals_and_curves_have_baselines(tmp_path: Path) -> None:
    text = page(Record(run_with_summary(tmp_path / "recipe" / "id")))
    assert "recipe/id" in text
    for shown in (
        "90.0 %",
        "95 % interval 88.0 to 92.0",
        "90.0 ±2.0",
        "momentum of the target encoder",
        "unheard of",
    ):
        assert shown in text, shown
    charts = json.loads(text.partition('id="charts">')[2].partition("</script>")[0])
    probe = next(chart for chart in charts if chart["series"][0]["label"] == "linear probe, top-1")
    assert probe["series"][0]["y"] == [75.0]
    assert probe["levels"] == [{"label": "random init", "y": 50.0}]
    assert "refresh" not in text


def test_a_machine_without_a_gpu_has_no_row_for_one(tmp_path: Path) -> None:
    hardware = {"cpu": "Some CPU", "gpus": [], "cuda": "13.0"}
    text = page(Record(write_run(tmp_path, hardware=hardware)))
    assert "Some CPU" in text and ">gpus<" not in text and ">cuda<" not in text
    text = page(Record(write_run(tmp_path, hardware=hardware | {"gpus": ["Some GPU"]})))
    assert ">gpus<" in text and ">cuda<" in text and "Some GPU" in text


def test_the_processor_is_named_by_its_model(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: Some CPU @ 2 GHz\n")
    assert provenance._processor(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert provenance._processor(tmp_path / "missing")


@pytest.mark.parametrize(
    ("code", "error", "shown"),
    [
        (75, "SIGTERM: saved at step 4", "pre-empted"),
        (76, "train/loss is nan by step 4", "diverged"),
        (1, "RuntimeError: <b>no</b>", "failed"),
        (None, "", "killed"),
    ],
)
def test_a_run_that_did_not_finish_says_why(tmp_path: Path, code: int | None, error: str, shown: str) -> None:
    run = write_run(tmp_path, exit_code=code, error={"message": error} if error else None)
    text = page(Record(run))
    assert f"<strong>{shown}</strong>" in text
    assert error.replace("<", "&lt;").replace(">", "&gt;") in text
    assert "75.0 %" in text, "the last evaluation"


def test_evaluations_of_older_checkpoints_are_named_and_no_figures_of_the_run(tmp_path: Path) -> None:
    run = run_with_summary(tmp_path / "recipe" / "id")
    row = {
        "key": "honest",
        "data": "data",
        "layer": "backbone",
        "top1": 0.6,
        "top1_low": 0.5,
        "top1_high": 0.7,
    }
    result = {"name": "honest", "how": "", "data_sets": {"data": {"dataset": "cifar10"}}, "results": [row]}
    for step, top1, folder in ((1000, 0.4, "step=000001000"), (2000, 0.6, "step=000002000"), (1000, 0.3, "")):
        (run / "eval" / folder).mkdir(exist_ok=True)
        values = result | {"step": step, "results": [row | {"top1": top1}]}
        write_json(run / "eval" / folder / "honest.json", values)
    (run / "checkpoints").mkdir()
    for name in ("step=000002000.ckpt", "step=000001000.ckpt", "step=000003000.ckpt.damaged", "last.ckpt"):
        (run / "checkpoints" / name).touch()
    record = Record(run)
    assert record.figure("honest_top1") == 0.6 and record.interval("honest_top1") == (0.5, 0.7)
    assert record.accuracies == {"honest_top1": 0.6, "linear_top1": 0.9, "random_init_linear_top1": 0.5}
    shown = re.findall(r">(SGD[^<]*)</th>.*?([\d.]+) ±", page(record))
    assert shown == [
        ("SGD (honest), step 1,000", "40.0"),
        ("SGD (honest)", "60.0"),
        ("SGD (honest), step 1,000", "30.0"),
    ]
    (run / "checkpoints" / "step=000003000.ckpt").touch()  # the run continued
    assert Record(run).figure("honest_top1") is None


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    text = page(Record(tmp_path))
    assert "killed" in text
    write_json(tmp_path / "manifest.json", {"recipe": {"method.name": "not_installed"}, "exit_code": None})
    assert "not_installed" in page(Record(tmp_path))


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    path = write_page(write_run(tmp_path, rows=30_000))
    assert path.stat().st_size < 400_000


def _killed_while_writing(run: Path) -> None:
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    write_page(run)


def test_the_next_page_deletes_what_a_kill_left_of_this_one(tmp_path: Path) -> None:
    run = run_with_summary(tmp_path / "run")
    writer = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(run,))
    writer.start()
    writer.join()
    (part,) = run.glob("*.part")
    assert f".{writer.pid}." in part.name
    assert main(["report", str(run)]) == 0
    assert not list(run.glob("*.part")) and (run / "report.html").exists()


def test_names_in_files_cannot_add_elements(tmp_path: Path) -> None:
    run = write_run(tmp_path, recipe=RECIPE | {"data.dataset": "</script><script>alert(1)</script>"})
    (run / "train.log").write_text("</pre><script>alert(1)</script>")
    write_json(run / "eval.json", {})
    assert "<script>alert" not in page(Record(run))


def test_the_command_draws_every_run_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a"):
        run_with_summary(tmp_path / "runs" / "recipe" / name)
    assert main(["report", str(tmp_path / "runs")]) == 0
    pages = [tmp_path / "runs" / "recipe" / name / "report.html" for name in ("a", "b")]
    assert capsys.readouterr().out.split() == [str(path) for path in pages]
    assert all(path.exists() for path in pages)


def test_the_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory and contains none" in capsys.readouterr().err


def test_runs_are_found_at_any_depth_once(tmp_path: Path) -> None:
    one, two = run_with_summary(tmp_path / "x" / "one"), run_with_summary(tmp_path / "x" / "y" / "z" / "two")
    found = records([tmp_path, one])
    assert [record.path for record in found] == [one.resolve(), two.resolve()]
    assert [record.path for record in records([tmp_path / "x" / "o*"])] == [one.resolve()]


@pytest.mark.parametrize("code", [None, 77])
def test_a_run_without_a_final_evaluation_is_judged_by_its_rows(tmp_path: Path, code: int | None) -> None:
    run = write_run(tmp_path, exit_code=code)
    rows = (ROOT / "tests/data/verdict/no-negatives-42.csv").read_text()
    (run / "metrics.csv").write_text(rows + "99,")
    assert Record(run).verdict["state"] == "collapsed"
    assert "complete collapse; usual causes" in page(Record(run))
    assert not Record(run).final_verdict, "lists of runs do not judge"


def test_a_continued_run_shows_its_newest_figures(tmp_path: Path) -> None:
    run = run_with_summary(tmp_path / "recipe" / "id")
    assert Record(run).figure("linear_top1") == 0.9
    write_run(run, exit_code=None)
    os.utime(run / "eval" / "summary.json", (1, 1))
    record = Record(run)
    assert (record.figure("linear_top1"), record.interval("linear_top1")) == (0.75, None)
    assert record.best("linear_top1") == [0.9]
    assert "that of its earlier end" in page(record)
    os.utime(run / "eval" / "summary.json")
    assert Record(run).figure("linear_top1") == 0.9, "evaluated at its new end"


@pytest.mark.parametrize(("top5", "shown"), [(1.0, False), (0.98, True)])
def test_a_top_5_of_at_most_five_classes_is_left_out(tmp_path: Path, top5: float, shown: bool) -> None:
    run = run_with_summary(tmp_path / "run")
    intervals = SUMMARY["interval_95"] | {"linear_top5": [0.9, 1.0]}
    write_json(run / "eval" / "summary.json", SUMMARY | {"linear_top5": top5, "interval_95": intervals})
    file = run / "metrics.csv"
    file.write_text(file.read_text().replace("linear_top1", "linear_top5").replace("0.75", str(top5)))
    assert ("top-5" in page(Record(run))) == shown
