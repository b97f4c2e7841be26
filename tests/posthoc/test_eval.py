"""``sslzoo eval`` as a user types it: its screen and files, several processes, kills, damage, and bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslzoo.cli.main import main
from sslzoo.posthoc import evaluations, store
from sslzoo.protocols.classifiers import Classifiers
from sslzoo.records.lock import RunLock
from sslzoo.run import evaluate
from sslzoo_methods.sce import protocols
from tests.command import (
    Command,
    codes,
    fork,
    group,
    short_evaluation,
    until,
    write_images,
    write_recipe,
)

METHOD = "method={name: simclr, temperature: 0.2, projector: {widths: [16, 8]}}"
FOLDER = ("data.root=folder", "data.mean=[0.5]", "data.std=[0.25]")
LAYERS = "probe.layers=[backbone, projector]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny.yaml``, a finished ``run`` of it with two layers, and its images."""
    folder = tmp_path_factory.mktemp("eval")
    write_recipe(folder)
    options = ("--recipe", "tiny.yaml", "--out", "run", METHOD, LAYERS, "trainer.max_epochs=1")
    run = fork(folder, "fit", *options, before=short_evaluation)
    assert run.wait() == 0, run.said
    return folder


def _eval(folder: Path, *arguments: str, before: Callable[[], None] = short_evaluation) -> Command:
    done = fork(folder, "eval", *arguments, before=before)
    done.wait()
    return done


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_what_is_shown_is_what_is_written(folder: Path) -> None:
    logged = "logging.tensorboard=true"
    done = _eval(folder, "knn", "run", "--k", "5,20", "--temperature", "0.07,0.5", logged)
    assert done.wait() == 0, done.said
    rows = _rows(folder / "run/eval/knn.csv")
    settings = [f"k={k}, T={t}" for k in (5, 20) for t in (0.07, 0.5)]
    assert [(row["layer"], row["title"]) for row in rows] == [
        (layer, title) for layer in ("backbone", "projector") for title in settings
    ]
    written = json.loads((folder / "run/eval/knn.json").read_text())
    assert [row["top1"] for row in written["results"]] == [float(row["top1"]) for row in rows]
    assert written["data_sets"]["data"]["n_test"] == 40 and written["step"] == 6
    for row in rows:
        assert float(row["top1_low"]) < float(row["top1"]) + 1e-4 < float(row["top1_high"])
        half = 50 * (float(row["top1_high"]) - float(row["top1_low"]))
        shown = re.search(rf"│ {row['layer']} +│ {row['title']} +│ +([\d.]+) ±([\d.]+) │", done.out)
        assert shown is not None, done.said
        assert float(shown[1]) == round(100 * float(row["top1"]), 1)
        assert abs(float(shown[2]) - half) < 0.06
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    (event,) = events.Scalars("eval/knn_k5_t0.5_top1/data/projector")
    (row,) = [row for row in rows if (row["key"], row["layer"]) == ("knn_k5_t0.5", "projector")]
    assert (event.step, round(event.value, 6)) == (6, float(row["top1"]))
    kept = sum(path.stat().st_size for path in (folder / "run/eval/features").glob("*.safetensors"))
    assert f"{kept / 1024:.1f} KiB of features are kept in {folder}/run/eval/features; the next" in done.out
    assert "k-NN, k=20, T=0.07" in (folder / "run/report.html").read_text()


def test_a_page_that_cannot_be_drawn_ends_no_evaluation(folder: Path) -> None:
    def broken() -> None:
        short_evaluation()
        evaluate.write_page = lambda folder: 1 / 0  # type: ignore[assignment]

    done = _eval(folder, "knn", "run", "probe.layers=[backbone]", before=broken)
    assert done.wait() == 0, done.said
    assert "warning: report.html could not be drawn: ZeroDivisionError" in done.err


def test_results_are_written_without_a_manifest_too(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "manifest.json").unlink()
    (run / "report.html").unlink()
    done = _eval(folder, "knn", str(run), "probe.layers=[backbone]")
    assert done.wait() == 0, done.said
    assert done.err.count("warning: ") == 1, done.said
    assert "warning: neither report.html nor dashboards show the results: the run directory" in done.err
    assert (run / "eval/knn.json").exists() and not (run / "report.html").exists()


def test_the_page_of_a_run_that_is_alive_is_left_to_it(folder: Path) -> None:
    page, lock = folder / "run/report.html", RunLock(folder / "run", seconds=dict, on_lost=print)
    before = page.read_text()
    lock.acquire()
    try:
        done = _eval(folder, "knn", "run", "--k", "7", "probe.layers=[backbone]")
    finally:
        lock.release()
    assert done.wait() == 0, done.said
    assert page.read_text() == before


def test_any_number_of_processes_gives_the_same_bytes(folder: Path) -> None:
    """Features too: 96 images in shards of 16, of which three ranks get two each."""

    def small_shards() -> None:
        short_evaluation()
        store.SHARD = 16

    def arguments(world: int) -> tuple[str, ...]:
        return "eval", "linear", "run", "--out", f"of{world}"

    alone = fork(folder, *arguments(1), before=small_shards)
    assert alone.wait() == 0, alone.said
    ranks = group(folder, *arguments(3), world=3, before=small_shards)
    assert codes(ranks) == [0] * 3, [r.said for r in ranks]
    assert ranks[1].out == ranks[2].out == "" and "honest on fashion_mnist" in ranks[0].out
    assert (folder / "of1/honest.csv").read_bytes() == (folder / "of3/honest.csv").read_bytes()
    assert _files(folder / "of1/features") == _files(folder / "of3/features")
    assert len(_files(folder / "of1/features")) == 4


def test_features_are_extracted_once(folder: Path) -> None:
    """By whatever they are named, and whatever they are used for."""

    def refuse() -> None:
        short_evaluation()
        store._extract = None  # type: ignore[assignment]

    first = _eval(folder, "features", "run/exported/backbone.safetensors")
    assert first.wait() == 0, first.said
    assert "is an encoder without heads: projector is not evaluated" in first.err
    again = _eval(folder, "logistic", "run", "probe.layers=[backbone]", before=refuse)
    assert again.wait() == 0, again.said
    other = _eval(folder, "logistic", "run", "probe.layers=[backbone]", "eval.size=10", before=refuse)
    assert other.wait() == 1 and "TypeError" in other.err


def test_a_killed_extraction_continues(folder: Path) -> None:
    def limited(most: int) -> Callable[[], None]:
        """Kill the process after ``most`` shards of its own, and note each."""

        def before() -> None:
            short_evaluation()
            store.SHARD = 16
            right = store._extract_shards

            def counted(*arguments: object) -> object:
                for done, shard in enumerate(right(*arguments), 1):  # type: ignore[arg-type]
                    with (folder / "noted").open("a") as file:
                        file.write(f"{shard} ")
                    if done == most:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield shard

            store._extract_shards = counted  # type: ignore[assignment]

        return before

    out = ("knn", "run", "--out", "killed", "probe.layers=[backbone]")
    assert _eval(folder, *out, before=limited(4)).wait() == -signal.SIGKILL
    done = _eval(folder, *out, before=limited(100))
    assert done.wait() == 0, done.said
    assert (folder / "noted").read_text().split() == [
        *"012345",
        *"012",
    ]  # train, then test; none of them twice
    whole = _eval(folder, "knn", "run", "--out", "whole", "probe.layers=[backbone]")
    assert whole.wait() == 0, whole.said
    for name, expected in _files(folder / "whole/features").items():
        found = load_file(folder / "killed/features" / name)
        for key, value in load_file(folder / "whole/features" / name).items():
            assert torch.equal(found[key], value), (name, key, len(expected))
    assert not [path for path in (folder / "killed/features").iterdir() if path.is_dir()]


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_ends_all_ranks_and_the_same_command_continues(folder: Path, world: int) -> None:
    def slow() -> None:
        short_evaluation()
        store.SHARD = 16
        right = store._extract_shards

        def paused(*arguments: object) -> object:
            for shard in right(*arguments):  # type: ignore[arg-type]
                yield shard
                time.sleep(0.5)

        store._extract_shards = paused  # type: ignore[assignment]

    arguments = ("eval", "knn", "run", "--out", f"left{world}", "probe.layers=[backbone]")
    ranks = group(folder, *arguments, world=world, before=slow)
    shards = folder / f"left{world}/features"
    assert until(lambda: ranks[0].ended or list(shards.glob("*/*.safetensors"))), ranks[0].said
    ranks[-1].signal(signal.SIGTERM)
    assert codes(ranks) == [75] * world, [r.said for r in ranks]
    assert ranks[0].last == (
        "sslzoo eval: SIGTERM while evaluating; what was extracted so far is kept, and the same command continues from "
        "there"
    )
    kept = len(list(shards.glob("*/*.safetensors")))
    done = fork(folder, *arguments, before=lambda: setattr(store, "SHARD", 16))
    assert done.wait() == 0 and 0 < kept < 6, done.said


def test_a_failing_rank_ends_the_others_and_is_named(folder: Path) -> None:
    def fail() -> None:
        short_evaluation()
        if os.environ.get("RANK") == "1":
            evaluations._knn = None  # type: ignore[assignment]

    ranks = group(folder, "eval", "knn", "run", "--out", "failed", world=2, before=fail)
    assert codes(ranks) == [1, 1], [r.said for r in ranks]
    assert "rank 1 on" in ranks[0].last and "failed first: TypeError" in ranks[0].last, ranks[0].said


def test_damaged_features_are_extracted_again(folder: Path) -> None:
    out = folder / "damaged"
    arguments = ("knn", "run", "--out", "damaged", "probe.layers=[backbone]")
    assert _eval(folder, *arguments).wait() == 0
    before, csv_before = _files(out / "features"), (out / "knn.csv").read_bytes()
    (path,) = (out / "features").glob("backbone-data-train-*.safetensors")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged in (content[:-4], bytes(flipped)):
        path.write_bytes(damaged)
        done = _eval(folder, *arguments)
        assert done.wait() == 0, done.said
        assert done.err.count("is damaged; its features are extracted again") == 1, done.said
        assert _files(out / "features") == before and (out / "knn.csv").read_bytes() == csv_before


def test_features_for_other_programs(folder: Path) -> None:
    for form in ("safetensors", "npy", "parquet"):
        done = _eval(folder, "features", "run", "--out", f"as-{form}", "--format", form, "--keep", "0")
        assert done.wait() == 0, done.said
        assert not (folder / f"as-{form}/features").exists()
        assert "of features were deleted, because --keep 0 GiB is less; the next evaluation" in done.out
    found = load_file(folder / "as-safetensors/features-projector-data-test.safetensors")
    assert found["x"].shape == (40, 8) and found["sample_id"].tolist() == list(range(40))
    assert found["label"].tolist() == [i % 10 for i in range(40)]
    for name, ending in (("x", ""), ("label", ".label"), ("sample_id", ".sample_id")):
        array = np.load(folder / f"as-npy/features-projector-data-test{ending}.npy")
        assert torch.equal(torch.from_numpy(array), found[name])
    table = parquet.read_table(folder / "as-parquet/features-projector-data-test.parquet").to_pydict()
    assert {name: torch.tensor(values).tolist() for name, values in table.items()} == {
        name: value.tolist() for name, value in found.items()
    }


BAD: list[tuple[tuple[str, ...], str]] = [
    (("knn", "nowhere"), "nowhere is neither a run directory, a checkpoint nor an export; for an encoder of"),
    (("knn", "x/step=1.ckpt"), "x/step=1.ckpt: there is no such run directory, checkpoint or export"),
    (("knn", "resnet19", "--recipe", "tiny.yaml", "--out", "o"), "did you mean resnet18?"),
    (("knn", "tiny.yaml"), "tiny.yaml is not an sslzoo checkpoint"),
    (("knn", "run", "backbone.name=resnet18"), "it lacks conv1.weight, bn1.weight, bn1.bias and 117 more"),
    (
        ("knn", "run", "method.projector.widths=[16, 4]"),
        "lacks projector.3.weight, projector.3.bias of simclr",
    ),
    (("knn", "run", "--k", "5,97"), "--k 97 exceeds the 96 training images of fashion_mnist"),
    (("knn", "run", "--k", "five"), "--k takes numbers separated by commas, got 'five'"),
    (("linear", "run", "probe.holdout=0.999"), "lower probe.holdout=0.999"),
    (("logistic", "run", "probe.holdout=0.0001"), "raise probe.holdout=0.0001"),
    (("linear", "run", "--k", "5"), "--k is an option of knn, not of linear"),
    (("linear", "run", "--protocol", "honets"), "unknown protocol 'honets'; did you mean honest?"),
    (("knn", "run", "data.root=empty"), "there is no train-images-idx3-ubyte"),
    (("knn", "run", "data.root=none"), "fashion_mnist split 'test' has no images to evaluate"),
    (
        ("knn", "run", *FOLDER, "data.dataset=folder"),
        "folder has no labels to evaluate by: name labelled data",
    ),
    (("knn", "run", *FOLDER, "data.dataset=imagefolder"), "have different classes (2 and 1)"),
    (
        ("knn", "moved.ckpt"),
        "moved.ckpt belongs to no run directory: name a folder for the results with --out",
    ),
    (("knn", "weights.pth"), "weights.pth has only weights; give architecture, data, size, mean and std by"),
    (
        ("knn", "weights.pth", "--recipe", "tiny.yaml", "--out", "o"),
        "weights.pth lacks 25 of the 30 tensors of conv5: 0.weight, 1.weight, 1.bias and 22 more",
    ),
]


def test_bad_input_is_one_line_and_exit_code_2(folder: Path) -> None:
    """All of them in one process."""
    (folder / "empty").mkdir(exist_ok=True)
    for name in ("train/a/1.png", "train/a/2.png", "train/b/3.png", "test/a/4.png"):
        (folder / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12)).save(folder / "folder" / name)
    write_images(folder / "none", train=96, test=0)
    shutil.copy(folder / "run/checkpoints/step=000000006.ckpt", folder / "moved.ckpt")
    torch.save({"conv.weight": torch.zeros(1)}, folder / "weights.pth")

    def all_of_them() -> None:
        for arguments, _ in BAD:
            sys.stderr.write(f"code {main(('eval', *arguments))}\n")

    done = _eval(folder, "knn", "nowhere", before=all_of_them)
    assert done.wait() == 2 and done.out == "", done.said
    answers = re.split(
        "^code ", "".join(re.findall("^(?!warning: ).*\n", done.err, re.MULTILINE)), flags=re.MULTILINE
    )
    codes_and_next = [answer.partition("\n") for answer in answers]
    lines = [codes_and_next[0][0], *(rest.rstrip("\n") for _, _, rest in codes_and_next[1:])]
    assert [code for code, _, _ in codes_and_next[1:]] == ["2"] * len(BAD), done.said
    for (arguments, said), line in zip(BAD, lines, strict=False):
        assert said in line and "\n" not in line, (arguments, line)


def test_processes_that_others_started_cannot_be_counted(folder: Path) -> None:
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = fork(folder, "eval", "knn", "run", "--devices", "3", environment=torchrun)
    assert done.wait() == 2, done.said
    assert "--devices 3 cannot be set here: torchrun has started the processes" in done.err


def test_fit_ends_with_the_evaluations_of_its_recipe(folder: Path) -> None:
    """Killed between two of them, it repeats none when it continues."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_in(name: str) -> Callable[[], None]:
        def before() -> None:
            short_evaluation()
            setattr(evaluations, name, lambda bench: die())

        return before

    options = ("--recipe", "tiny.yaml", METHOD, "trainer.max_epochs=1", "eval.after=[logistic, knn]")
    first = fork(folder, "fit", *options, "--out", "after", before=killed_in("_knn"))
    assert first.wait() == -signal.SIGKILL and "logistic on fashion_mnist" in first.out, first.said
    done = fork(folder, "fit", *options, "--out", "after", "--resume", "auto", before=killed_in("_logistic"))
    assert done.wait() == 0, done.said
    assert "knn on fashion_mnist" in done.out and "logistic on fashion_mnist" not in done.out
    summary = json.loads((folder / "after/eval/summary.json").read_text())
    for name, key in (("logistic", "logistic_top1"), ("knn", "knn_k5_t0.1_top1")):
        (row,) = json.loads((folder / f"after/eval/{name}.json").read_text())["results"]
        assert summary[key] == row["top1"] and summary["interval_95"][key] == [
            row["top1_low"],
            row["top1_high"],
        ]
    assert summary["knn_top1"] == summary["knn_k5_t0.1_top1"]
    card = (folder / "after/exported/backbone.safetensors.md").read_text()
    assert "| logistic_top1 |" in card
    refused = fork(folder, "fit", *options[:-1], "eval.after=[metaug]", "--out", "no")
    assert refused.wait() == 2 and not (folder / "no").exists(), refused.said
    assert refused.last.endswith("protocol metaug evaluates the backbones of MetAug, not of simclr"), (
        refused.said
    )


def test_a_killed_protocol_continues_on_another_number_of_processes(folder: Path) -> None:
    """With augmented views: it ends with the figures of an evaluation that nobody disturbed."""

    def short(kill_at: int = -1) -> Callable[[], None]:
        def before() -> None:
            short_evaluation()
            few = {"epochs": 3, "milestones": (1, 2), "batch_size": 20}
            protocols.SCE_CIFAR = replace(protocols.SCE_CIFAR, **few)
            right = Classifiers.step

            def step(self: Classifiers, number: int) -> None:
                with (folder / f"steps{os.environ.get('RANK', '0')}").open("a") as file:
                    file.write(f"{number} ")
                if number == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                right(self, number)

            Classifiers.step = step  # type: ignore[method-assign]

        return before

    arguments = (
        "linear",
        "run",
        "--protocol",
        "sslzoo_methods.sce.protocols:SCE_CIFAR",
        "probe.layers=[backbone]",
    )
    torn = _eval(folder, *arguments, "--out", "torn", before=short(7))
    assert torn.wait() == -signal.SIGKILL, torn.said
    ranks = group(folder, "eval", *arguments, "--out", "torn", world=2, before=short())
    assert codes(ranks) == [0] * 2, [rank.said for rank in ranks]
    assert not (folder / "torn/state").exists()
    whole = _eval(folder, *arguments, "--out", "untorn", before=short())
    assert whole.wait() == 0, whole.said
    for name in ("honest", "sce_cifar"):
        assert (folder / f"torn/{name}.csv").read_bytes() == (folder / f"untorn/{name}.csv").read_bytes()
    steps = (folder / "steps1").read_text().split()
    assert steps == [str(step) for step in range(6, 12)], "from the last save, two steps an epoch of four"
    best, last = (row["title"] for row in reversed(_rows(folder / "untorn/sce_cifar.csv")))
    assert last == "last epoch" and best.startswith("best on test images, epoch ")
    assert "images of 12 px instead of 32, all lengths in proportion" in " ".join(
        whole.out.replace("│", " ").split()
    )
