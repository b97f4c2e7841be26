"""Starting again: a finished run is left alone, a killed one goes on, other images and damaged files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sslzoo.checkpoints import load_checkpoint
from sslzoo.exits import ExitCode
from sslzoo.nn.backbones import Conv5
from sslzoo.recipe.load import load_recipe
from sslzoo.run.build import build_experiment, load_weights
from sslzoo.testing.kills import digest
from tests.command import (
    STEPS,
    Command,
    codes,
    fork,
    group,
    manifest,
    saved,
    until,
    write_images,
    write_recipe,
)

BASELINES = ("eval.baselines=true", "eval.every_epochs=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies, with a finished run ``whole`` whose final evaluation has baselines."""
    folder = tmp_path_factory.mktemp("resuming")
    write_recipe(folder)
    assert _fit(folder, "whole", *BASELINES).wait() == 0
    return folder


def _fit(folder: Path, name: str, *more: str, resume: str = "", **options: Any) -> Command:
    resuming = ("--resume", resume) if resume else ()
    return fork(folder, "fit", "--recipe", "tiny.yaml", "--out", name, *resuming, *more, **options)


def _files(run: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(run)): (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()
    }


def _summary(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "eval" / "summary.json").read_text())
    return {key: value for key, value in summary.items() if not key.endswith("seconds")}


@pytest.mark.parametrize("resume", ["auto", "whole"])
def test_a_finished_run_says_so_and_everything_stays(resume: str, folder: Path) -> None:
    before = _files(folder / "whole")
    again = _fit(folder, "whole", *BASELINES, resume=resume)
    assert again.wait() == 0
    assert "is finished: 3 epochs, 18 steps" in again.out and not again.err, again.said
    assert _files(folder / "whole") == before


def test_two_ranks_leave_a_finished_run_alone_too(folder: Path) -> None:
    two = ("fit", "--recipe", "tiny.yaml", "--out", "pair", "--resume", "auto", "trainer.devices=2")
    assert codes(group(folder, *two)) == [0, 0]
    before = _files(folder / "pair")
    assert (folder / "pair" / "exported" / "backbone.safetensors").is_file()
    again = group(folder, *two)
    assert codes(again) == [0, 0]
    assert "is finished" in again[0].out and not again[1].out
    assert _files(folder / "pair") == before


def test_a_run_killed_in_its_final_evaluation_ends_with_the_same_summary(folder: Path) -> None:
    """Twice in a row; the times of all starts add up."""
    name = "killed"
    for start in range(2):
        run = _fit(folder, name, *BASELINES, resume="auto", faults={"evaluation_pause": 0.3})
        if start == 0:
            assert until(lambda run=run: run.ended or 3 * STEPS in saved(folder / name)), run.said
        assert until(lambda n=start: len(manifest(folder / name)["sessions"]) > n), run.said
        time.sleep(0.6)
        assert not run.ended and not (folder / name / "eval" / "summary.json").exists(), run.said
        run.signal(signal.SIGKILL)
        run.wait()
    # The lock of a dead process is no hindrance, and tells what it spent.
    (folder / name / "run.lock").write_text(
        json.dumps(json.loads((folder / name / "run.lock").read_text()) | {"seconds": {"evaluation": 100.0}})
    )
    last = _fit(folder, name, *BASELINES, resume="auto")
    assert last.wait() == 0, last.said
    assert _summary(folder / name) == _summary(folder / "whole")
    assert (folder / name / "metrics.csv").read_bytes() == (folder / "whole" / "metrics.csv").read_bytes()
    kept = json.loads((folder / name / "eval" / "summary.json").read_text())
    assert kept["evaluation_seconds"] >= 100.0
    starts = manifest(folder / name)["sessions"]
    assert [s["exit_code"] for s in starts] == [None, None, 0]
    assert starts[1]["evaluation_seconds"] == 100.0


def test_a_run_from_weights_says_so_and_goes_on_without_their_file(folder: Path) -> None:
    """The encoder starts from a file. The run keeps what it started from, for its final table."""
    state = {name: value + 1 for name, value in Conv5().state_dict().items()}
    torch.save(state, folder / "w.pt")
    expected = hashlib.sha256((folder / "w.pt").read_bytes()).hexdigest()
    options = (*BASELINES, "backbone.weights=w.pt")
    assert _fit(folder, "begun", *options, "trainer.max_epochs=1").wait() == 0
    start = torch.load(folder / "begun" / "start.pt", weights_only=True)
    assert all(torch.equal(start[name], value) for name, value in state.items())
    assert manifest(folder / "begun")["start"]["sha256"] == expected
    (folder / "w.pt").unlink()
    more = _fit(folder, "begun", *options, "trainer.max_epochs=2", resume="auto")
    assert more.wait() == 0, more.said
    assert "start (pretrained)" in more.out and "random init" not in more.out, more.out
    figures = _summary(folder / "begun")
    assert "start_knn_top1" in figures and "random_init_knn_top1" not in figures
    assert manifest(folder / "begun")["start"]["sha256"] == expected
    # A run without a checkpoint does need it.
    none = _fit(folder, "other", *options, resume="auto")
    assert none.wait() == 2 and not (folder / "other").exists(), none.said
    assert "backbone.weights: there is no file w.pt" in none.err, none.said
    both = _fit(folder, "other", *options, "--init-from", "whole")
    assert both.wait() == 2 and "backbone.weights=null" in both.err, both.said


@pytest.mark.parametrize(
    "path",
    ["whole", "whole/checkpoints", "whole/checkpoints/last.ckpt", "whole/exported/backbone.safetensors"],
)
def test_weights_come_from_a_run_as_a_resumed_run_does(path: str, folder: Path) -> None:
    method = build_experiment(load_recipe(str(folder / "tiny.yaml")).recipe).method
    load_weights(method, folder / path)
    stored = load_checkpoint(folder / "whole" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(
        torch.equal(value, stored[name])
        for name, value in method.backbone.state_dict(prefix="backbone.").items()
    )


def test_more_epochs_train_on_and_fewer_than_done_are_refused(folder: Path) -> None:
    """With a rate that does not depend on the length, the longer run is the one planned so from the start."""
    constant = ("optim.schedule=constant", "optim.warmup_epochs=0", "eval.every_epochs=1")
    assert _fit(folder, "grown", *constant, "trainer.max_epochs=2").wait() == 0
    more = _fit(folder, "grown", *constant, "trainer.max_epochs=3", resume="auto")
    assert more.wait() == 0, more.said
    assert "continuing with a changed trainer.max_epochs: was 2, is 3" in more.err
    assert _fit(folder, "planned", *constant, "trainer.max_epochs=3").wait() == 0
    grown, planned = (
        load_checkpoint(folder / n / "checkpoints" / "step=000000018.ckpt") for n in ("grown", "planned")
    )
    assert digest(grown["state_dict"]) == digest(planned["state_dict"])
    assert digest(grown["optimizer_states"]) == digest(planned["optimizer_states"])

    before = _files(folder / "grown")
    fewer = _fit(folder, "grown", *constant, "trainer.max_epochs=2", resume="auto")
    assert fewer.wait() == ExitCode.USAGE
    assert (
        "has already trained to step 18, in epoch 3; trainer.max_epochs=2 is less: set at least 3"
        in fewer.err
    )
    assert _files(folder / "grown") == before


# -- damaged, foreign and hostile checkpoints ---------------------------------------------------------


def _stopped(folder: Path, name: str) -> Path:
    """A run that left with two checkpoints; the newest."""
    run = _fit(folder, name, faults={"pause": 0.1})
    assert until(lambda: run.ended or len(saved(folder / name)) > 1), run.said
    run.signal(signal.SIGTERM)
    assert run.wait() == ExitCode.PREEMPTED
    return folder / name / "checkpoints" / f"step={saved(folder / name)[-1]:09d}.ckpt"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize("resume", ["auto", "directory"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(how: str, resume: str, folder: Path) -> None:
    name = f"damaged-{how}-{resume}"
    newest = _stopped(folder, name)
    older = saved(folder / name)[-2]
    if how == "flipped":
        _flip(newest)
    else:
        os.truncate(newest, newest.stat().st_size // 3)
    again = _fit(folder, name, resume="auto" if resume == "auto" else name)
    assert again.wait() == 0, again.said
    assert again.err.startswith(f"warning: checkpoint {newest} is truncated or damaged; using "), again.said
    assert f"continuing from {newest.with_name(f'step={older:09d}.ckpt')}" in again.out
    assert newest.with_name(newest.name + ".damaged").exists()
    assert f"{newest} is truncated or damaged" in (folder / name / "train.log").read_text()
    assert saved(folder / name)[-1] == 3 * STEPS


def test_what_is_no_checkpoint_of_ours_gets_one_line(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.ckpt"
    picture.write_bytes(b"\xff\xd8\xff\xe0 no checkpoint at all")
    other = tmp_path / "other.ckpt"
    torch.save({"model": torch.zeros(3), "epoch": 7}, other)

    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/owned",)

    hostile = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": Hostile()}, hostile)
    for path, word in (
        (picture, "picture"),
        (other, "written by another program"),
        (hostile, "posix.system"),
    ):
        refused = _fit(folder, f"from-{path.stem}", resume=str(path))
        assert refused.wait() == ExitCode.USAGE
        assert len(refused.err.splitlines()) == 1 and word in refused.err, refused.said
        assert "weights_only" not in refused.err and "allow" not in refused.err
        assert not (folder / f"from-{path.stem}").exists()


# -- other images -------------------------------------------------------------------------------------


def test_other_images_are_refused_and_the_same_ones_elsewhere_are_not(folder: Path) -> None:
    _stopped(folder, "images-run")
    kept = manifest(folder / "images-run")
    moved = write_images(folder / "moved")
    others = write_images(folder / "others", train=112)
    before = _files(folder / "images-run")
    refused = _fit(folder, "images-run", f"data.root={others}", resume="auto")
    assert refused.wait() == ExitCode.USAGE
    assert len(refused.err.splitlines()) == 1
    assert f"then {kept['data_fingerprint']}, now fashion_mnist/train/112/" in refused.err, refused.said
    assert _files(folder / "images-run") == before
    # Nor by a checkpoint that is taken to another directory.
    newest = folder / "images-run" / "checkpoints" / f"step={saved(folder / 'images-run')[-1]:09d}.ckpt"
    refused = _fit(folder, "elsewhere", f"data.root={others}", resume=str(newest))
    assert refused.wait() == ExitCode.USAGE and "was trained on different images" in refused.err, refused.said

    again = _fit(folder, "images-run", f"data.root={moved}", resume="auto")
    assert again.wait() == 0, again.said
    first, second = manifest(folder / "images-run")["sessions"]
    assert first["data_fingerprint"] == second["data_fingerprint"] == kept["data_fingerprint"]
    assert (first["recipe"]["data.root"], second["recipe"]["data.root"]) == (
        str(folder / "images"),
        str(moved),
    )
    # Said before there was a train.log.
    assert "continuing with a changed data.root" in (folder / "images-run" / "train.log").read_text()


def test_an_edited_copy_of_a_recipe_is_the_one_that_runs(folder: Path, tmp_path: Path) -> None:
    """The command that ``cp`` prints runs the copy, edits included, and the summary's first line says so."""
    copied = fork(tmp_path, "cp", "simclr_fashion_mnist", ".", name="cp")
    assert copied.wait() == 0
    mine = tmp_path / "simclr_fashion_mnist.yaml"
    mine.write_text(mine.read_text().replace("seed: 42", "seed: 43"))
    command = copied.out.partition("now sslzoo ")[2].split()
    small = ("data.dataset=fashion_mnist", f"data.root={folder / 'images'}", "data.global_batch_size=16")
    shrunk = (
        "trainer.max_epochs=1",
        "eval.baselines=false",
        "eval.size=12",
        "eval.knn_k=5",
        "optim.warmup_epochs=0",
    )
    run = fork(tmp_path, *command, "--out", "run", *small, *shrunk)
    assert run.wait() == 0, run.said
    assert run.out.splitlines()[0] == "recipe simclr_fashion_mnist.yaml"
    assert manifest(tmp_path / "run")["seed"] == 43


# -- which run, and from where ----------------------------------------------------------------------


def test_a_finished_run_without_checkpoints_is_not_trained_again(folder: Path) -> None:
    assert _fit(folder, "swept").wait() == 0
    shutil.rmtree(folder / "swept" / "checkpoints")
    before = _files(folder / "swept")
    again = _fit(folder, "swept", resume="auto")
    assert again.wait() == ExitCode.USAGE, again.said
    assert "is a finished run whose checkpoints are gone" in again.err
    assert _files(folder / "swept") == before


def test_a_checkpoint_of_one_run_does_not_end_another(folder: Path) -> None:
    newest = _stopped(folder, "first")
    assert _fit(folder, "second").wait() == 0
    before = _files(folder / "second")
    refused = _fit(folder, "second", resume=str(newest))
    assert refused.wait() == ExitCode.USAGE and "contains a different run than --resume" in refused.err, (
        refused.said
    )
    assert _files(folder / "second") == before
    refused = _fit(folder, "third", "optim.lr=0.5", resume=str(newest))
    assert refused.wait() == ExitCode.USAGE and "optim.lr was 0.01, is 0.5" in refused.err, refused.said
    moved = _fit(folder, "third", resume=str(newest))
    assert moved.wait() == 0, moved.said
    assert saved(folder / "third")[-1] == 3 * STEPS


def test_going_back_to_an_older_checkpoint_calls_no_newer_one_damaged(folder: Path) -> None:
    newest = _stopped(folder, "back")
    older = newest.with_name(f"step={saved(folder / 'back')[-2]:09d}.ckpt")
    again = _fit(folder, "back", resume=str(older))
    assert again.wait() == 0, again.said
    assert not list((folder / "back").rglob("*.damaged*"))


def test_a_broken_neighbour_does_not_stop_auto(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", environment={"SSLZOO_RUN_ID": name})
        assert run.wait() == 0
    (tmp_path / "runs/tiny/b/manifest.json").write_text("")
    last = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--resume", "auto")
    assert last.wait() == 0 and f"{tmp_path / 'runs/tiny/a'} is finished" in last.out, last.said
    assert "skipping a run" in last.err and "runs/tiny/b/manifest.json is empty or damaged" in last.err


def test_the_command_that_is_printed_continues_the_run(folder: Path) -> None:
    """As it stands, also after --init-from, and with overrides on both sides of the options."""
    run = fork(
        folder,
        *("fit", "trainer.max_epochs=3", "--recipe", "tiny.yaml", "--out", "printed"),
        *("--init-from", "whole", "optim.lr=0.02"),
        faults={"pause": 0.1},
    )
    assert until(lambda: run.ended or saved(folder / "printed")), run.said
    run.signal(signal.SIGTERM)
    assert run.wait() == ExitCode.PREEMPTED, run.said
    assert "not loading visits, which belongs to the images of that run" in run.err, run.said
    command = shlex.split(run.err.splitlines()[-1].partition("continue with: sslzoo ")[2])
    assert command[-2:] == ["trainer.max_epochs=3", "optim.lr=0.02"], command
    again = fork(folder, *command)
    assert again.wait() == 0, again.said
    assert saved(folder / "printed")[-1] == 3 * STEPS
    # What --init-from left out: the visits of each image are those of this run.
    newest = folder / "printed" / "checkpoints" / f"step={3 * STEPS:09d}.ckpt"
    assert load_checkpoint(newest)["state_dict"]["visits.count"].unique().tolist() == [3.0]
