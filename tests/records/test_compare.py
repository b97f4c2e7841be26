"""Comparisons: groups, statistics against their definitions, and the same figures in every form."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from sslzoo.cli.main import main
from sslzoo.files import write_json
from sslzoo.records.compare import Comparison, T, as_csv, as_markdown, as_page, compare, paired, t_quantile
from sslzoo.records.record import Record, records

ACCURACY = {(0.1, 1): 0.80, (0.1, 2): 0.82, (0.1, 3): 0.81, (0.2, 1): 0.83, (0.2, 2): 0.84, (0.2, 3): 0.85}


def write_run(folder: Path, *, accuracy: float, seed: int, **recipe: object) -> None:
    """A finished run."""
    keys = {"name": "r", "seed": seed, "method.name": "simclr", "data.root": f"/data/{seed}"} | {
        key.replace("__", "."): value for key, value in recipe.items()
    }
    sessions = [{"training_seconds": 1800.0}]
    write_json_in(folder / "manifest.json", {"recipe": keys, "exit_code": 0, "sessions": sessions})
    summary = {
        "linear_top1": accuracy,
        "raw_pixels_linear_top1": 0.7,
        "interval_95": {"linear_top1": [0.78, 0.84]},
    }
    write_json_in(folder / "eval" / "summary.json", summary)
    lines = [f"{step},0,{accuracy / step},{accuracy if step == 4 else ''}" for step in (2, 4)]
    (folder / "metrics.csv").write_text("\n".join(["step,epoch,train/loss,val/linear_top1", *lines, ""]))


def write_json_in(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Two temperatures with three seeds each."""
    for (temperature, seed), accuracy in ACCURACY.items():
        folder = tmp_path / "runs" / f"{temperature}-{seed}"
        write_run(folder, accuracy=accuracy, seed=seed, method__temperature=temperature)
    return tmp_path / "runs"


def compared(folder: Path) -> Comparison:
    return compare(records([folder]))


def test_seeds_are_a_group_and_only_differences_are_shown(six: Path) -> None:
    comparison = compared(six)
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [
        ("temperature=0.1", 3),
        ("temperature=0.2", 3),
    ]
    assert comparison.differing == ("method.temperature",)
    head, rows = comparison.table()
    assert head == ["", "method.temperature", "runs", "linear top-1", "minutes"]
    assert rows == [
        ["temperature=0.1", "0.1", "3", "81.0 ± 1.0", "30 ± 0"],
        ["temperature=0.2", "0.2", "3", "84.0 ± 1.0", "30 ± 0"],
    ]


def test_differences_are_paired_by_seed(six: Path) -> None:
    gaps = [ACCURACY[0.2, seed] - ACCURACY[0.1, seed] for seed in (1, 2, 3)]
    half = 4.3027 * stdev(gaps) / math.sqrt(3)
    _, rows = compared(six).differences()
    expected = f"{100 * fmean(gaps):+.1f} ± {100 * half:.1f} (n=3)"
    assert rows == [["temperature=0.2 - temperature=0.1", expected]]
    assert paired({1: 0.5}, {2: 0.5}) is None
    single = paired({1: 0.5, 2: 0.1}, {1: 0.75})
    assert single is not None
    assert (single.mean, single.half, single.n) == (0.25, None, 1)


def test_a_single_run_has_the_interval_of_its_test_images(tmp_path: Path) -> None:
    for name, method in (("a", "simclr"), ("b", "sce")):
        write_run(tmp_path / name, accuracy=0.81, seed=1, method__name=method, name=method)
    _, rows = compared(tmp_path).table()
    assert rows[1] == ["sce", "sce", "1", "81.0 ±3.0", "30"]


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (10, 2.2281), (11, 2.2010), (30, 2.0423), (120, 1.9799)]
)
def test_quantiles_of_student_s_t(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=2e-4)
    assert len(T) == 10


def test_forms_have_the_same_figures(six: Path) -> None:
    comparison = compared(six)
    rows = [row for row in csv.DictReader(io.StringIO(as_csv(comparison))) if row["figure"] == "linear_top1"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.81, 0.84])
    assert [(row["method.temperature"], row["n"]) for row in rows] == [("0.1", "3"), ("0.2", "3")]
    assert "| temperature=0.2 | 0.2 | 3 | 84.0 ± 1.0 |" in as_markdown(comparison)
    page = as_page(comparison)
    assert "84.0 ± 1.0" in page
    assert '"low":[0.4,0.2],"high":[0.41,0.205]' in page, "the band of the loss"


def test_curves_of_other_data_sets_are_drawn_too(six: Path) -> None:
    for file in six.glob("*/metrics.csv"):
        head, *rows = file.read_text().splitlines()
        file.write_text("\n".join([f"{head},val/linear_top1/stl10", *(f"{row},0.5" for row in rows), ""]))
    assert "temperature=0.2: stl10" in as_page(compared(six))


def test_many_differences_have_a_table_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        keys = {f"method__key{i}": f"{name}{i}" for i in range(8)}
        write_run(tmp_path / name, accuracy=0.81, seed=1, **keys)
    comparison = compared(tmp_path)
    assert comparison.table()[0] == ["", "runs", "linear top-1", "minutes"]
    assert comparison.recipes()[1][0] == ["method.key0", "a0", "b0"]
    assert "| method.key7 | a7 | b7 |" in as_markdown(comparison)


def test_the_command_writes_each_form(six: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(six)]) == 0
    assert "84.0 ± 1.0" in capsys.readouterr().out
    out = tmp_path / "page.html"
    assert main(["compare", str(six), "--format", "html", "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")


def test_the_command_needs_two_runs(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(six / "0.1-1")]) == 2
    assert "is a single run; sslzoo report shows it" in capsys.readouterr().err


def test_an_unfinished_run_is_said_to_be_one(six: Path) -> None:
    write_json(six / "0.1-1" / "manifest.json", Record(six / "0.1-1").manifest | {"exit_code": 75})
    assert compared(six).table()[1][0][2] == "3 (1 unfinished)"


def test_finished_runs_of_a_seed_count_with_their_mean_and_unfinished_ones_not(six: Path) -> None:
    aside = {"trainer__num_nodes": 2, "analyses__0__name": "margins"}
    write_run(six / "zz-again", accuracy=0.90, seed=1, method__temperature=0.1, **aside)
    write_run(six / "zz-stopped", accuracy=0.10, seed=2, method__temperature=0.1)
    stopped = six / "zz-stopped" / "manifest.json"
    write_json(stopped, Record(stopped.parent).manifest | {"exit_code": 75})
    comparison = compared(six)
    assert [len(group.runs) for group in comparison.groups] == [4, 3]
    by_seed = comparison.groups[0].by_seed(lambda run: run.figure("linear_top1"))
    assert by_seed == pytest.approx({1: 0.85, 2: 0.82, 3: 0.81})
    assert comparison.notes()[-1].endswith("has their seed: 1.")


def test_later_evaluations_count_and_names_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"key": "honest", "title": "", "data": "data", "layer": "backbone"}
    row |= {"top1": 0.6, "top1_low": 0.5, "top1_high": 0.7}
    result = {"how": "", "step": 4, "data_sets": {"data": {}}}
    older = result | {"step": 2, "results": [row | {"key": "logistic", "top1": 0.1}]}
    result |= {"results": [row, row | {"layer": "layer3", "top1": 0.4}]}
    for name in ("w[v1]", "x[/y]"):
        write_run(tmp_path / name, accuracy=0.81, seed=1, name=name, method__name=name)
        write_json(tmp_path / name / "eval" / "honest.json", result)
        write_json(tmp_path / name / "eval" / "logistic.json", older)
    assert main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "w[v1]" in out and "x[/y]" in out
    assert "60.0 ±10.0" in out and "SGD (honest) (data, layer3)" in " ".join(out.split())
    assert "logistic" not in out, "of an older checkpoint"


def evaluated_on(folder: Path, dataset: str, n_test: int, fingerprint: str) -> None:
    """Add to a run's files on which test images it was evaluated, by the final evaluation and by ``sslzoo eval``."""
    summary = folder / "eval" / "summary.json"
    about = {"data_sets": {"data": {"dataset": dataset, "n_test": n_test}}}
    write_json(summary, Record(folder).summary | about)
    write_json(
        folder / "eval" / "knn.json",
        about
        | {
            "name": "knn",
            "how": "",
            "step": 4,
            "results": [],
            "identity": {"images": ["train", fingerprint]},
        },
    )


@pytest.mark.parametrize(
    ("tested", "left_out"),
    [
        (("fashion", 2000, "aa"), False),
        (("folder", 2000, "aa"), True),
        (("fashion", 45, "aa"), True),
        (("fashion", 2000, "bb"), True),
    ],
)
def test_accuracies_on_other_test_images_are_not_subtracted(
    six: Path, tested: tuple[str, int, str], left_out: bool
) -> None:
    for folder in six.iterdir():
        evaluated_on(folder, *(tested if folder.name == "0.2-3" else ("fashion", 2000, "aa")))
    comparison = compared(six)
    assert (comparison.differences()[1] == []) == left_out
    note = "No differences where the test images are others than those of temperature=0.1: temperature=0.2."
    assert (note in comparison.notes()) == left_out


def test_groups_of_one_recipe_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for number, (name, keys) in enumerate(
        [
            ("other", {"backbone__name": "resnet18"}),
            ("r", {"trainer__max_epochs": 1}),
            ("r", {"trainer__max_epochs": 2}),
            ("r", {"trainer__max_epochs": 2, "backbone__name": "resnet18"}),
        ]
    ):
        common = {
            "name": name,
            "backbone__name": "conv5",
            "backbone__stem": "cifar" if number else "imagenet",
        }
        write_run(tmp_path / str(number), accuracy=0.8, seed=1, **(common | keys))
    assert [group.label for group in compared(tmp_path).groups] == [
        "other",
        "r backbone.name=conv5, max_epochs=1",
        "r backbone.name=conv5, max_epochs=2",
        "r backbone.name=resnet18, max_epochs=2",
    ]


def test_groups_that_differ_in_long_values_are_named_after_their_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, accuracy=0.8, seed=1, data__filter="x" * 60 + name)
    labels = [group.label for group in compared(tmp_path).groups]
    assert [label.rpartition(" ")[2] for label in labels] == [f"{tmp_path.name}/a", f"{tmp_path.name}/b"]


def sections_of(page: str) -> dict[str, list[str]]:
    """Titles of the charts, by section."""
    parts = re.split(r"<h2>(.*?)</h2>", page)[1:]
    charts = (re.findall(r'class="chart"><figcaption>([^<]*?) ?<', part) for part in parts[1::2])
    return dict(zip(parts[::2], charts, strict=True))


def test_sections_of_methods_stand_together_with_their_own_runs(tmp_path: Path) -> None:
    for name in ("sce", "simclr"):
        write_run(tmp_path / name, accuracy=0.8, seed=1, name=name, method__name=name)
        file = tmp_path / name / "metrics.csv"
        head, *rows = file.read_text().splitlines()
        extra = {"sce": "", "simclr": ",val/linear_top5"}[name]
        lines = [f"{head},method/positive_similarity,repr/std{extra}"]
        lines += [f"{row},0.5,0.1{extra and ',1.0'}" for row in rows]
        file.write_text("\n".join([*lines, ""]))
        (tmp_path / name / "system.csv").write_text("step,epoch,sys/images_per_s\n2,0,5.0\n")
    page = as_page(compared(tmp_path))
    assert sections_of(page) == {
        "Figures": [],
        "Learning": ["pre-training loss"],
        "Evaluation": ["linear probe, top-1"],  # without top-5, which is always 100 %
        "Representation": ["feature deviation"],
        "sce": ["similarity of positives"],
        "simclr": ["similarity of positives"],
        "System": ["throughput"],
        "Runs": [],
    }
    charts = json.loads(page.partition('id="charts">')[2].partition("</script>")[0])
    assert [[line["label"] for line in chart["series"]] for chart in charts[3:5]] == [["sce"], ["simclr"]]
    assert [chart["series"][-1]["colour"] for chart in charts] == [1, 1, 1, 0, 1, 1], "of the last run"


def test_figures_are_named_in_words_and_zero_has_no_sign(tmp_path: Path) -> None:
    for name, accuracy in (("a", 0.8001), ("b", 0.8)):
        write_run(tmp_path / name, accuracy=accuracy, seed=1, name=name, method__name=name)
        row = {"key": "knn_k10_t0.07", "title": "k=10, T=0.07", "data": "data", "layer": "backbone"}
        row |= {"top1": 0.6, "top1_low": 0.5, "top1_high": 0.7}
        result = {"name": "knn", "how": "", "step": 4, "data_sets": {"data": {}}, "results": [row]}
        write_json(tmp_path / name / "eval" / "knn.json", result)
    head, rows = compared(tmp_path).differences()
    assert head == ["", "linear top-1", "k-NN, k=10, T=0.07"]
    assert rows == [["b - a", "+0.0 (n=1)", "+0.0 (n=1)"]]


def test_words_stay_whole_on_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for number in range(8):
        keys = {f"method__long_name_of_a_key_{i}": f"value_{number}" for i in range(8)}
        write_run(tmp_path / str(number), accuracy=0.8, seed=1, name=f"recipe_of_many_words_{number}", **keys)
    assert main(["compare", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    for number in range(8):
        assert words.count(f"recipe_of_many_words_{number}") >= 2, "figures, and what differs"
        assert words.count(f"value_{number}") == 8
