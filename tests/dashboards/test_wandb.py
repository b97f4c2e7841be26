"""W&B and TensorBoard: what they have is what is in metrics.csv, whatever has happened to the run."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslzoo.dashboards import wandb_run
from sslzoo.dashboards.history import read_rows
from sslzoo.exits import ExitCode
from sslzoo.panels import AT_A_GLANCE, FRAMEWORK
from sslzoo.pictures import numbered
from sslzoo.processes.ending import Ending
from sslzoo.recipe.sections import WandbConfig
from sslzoo.records.directory import Run
from sslzoo.records.lock import RunLock
from tests.command import Command, fork, manifest, saved, short_evaluation, until, write_recipe
from tests.wandb_server import KeptRun, Server, serving

Columns = dict[str, list[tuple[int, float]]]  # steps and values of each column


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def _eager() -> None:
    """Rows are sent at every checkpoint, however short ago the last were."""
    from sslzoo.dashboards import wandb_run

    wandb_run.PAUSE = 0.0
    short_evaluation()


def _fit(folder: Path, server: Server, *arguments: str, mode: str, **options: Any) -> Command:
    return fork(
        folder, "fit", "--recipe", "tiny.yaml", "--out", "run", "logging.tensorboard=true",
        f"logging.wandb={{mode: {mode}, tags: [a], notes: for a test}}", "logging.every_steps=1",
        *arguments, environment=server.environment, before=_eager, **options,
    )  # fmt: skip


def _push(folder: Path, server: Server, *more: str, name: str = "push") -> Command:
    return fork(folder, "wandb", "push", "run", *more, environment=server.environment, name=name)


def _sync(folder: Path, server: Server) -> None:
    """What a user types to send the offline segments."""
    segments = sorted(str(path) for path in (folder / "run/wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", *segments]
    environment = os.environ | server.environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def _in_file(run: Path) -> Columns:
    """Steps and values of each column of metrics.csv, without means over epochs."""
    found: Columns = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch") and not name.endswith("_epoch"):
                    found.setdefault(name, []).append((int(row["step"]), float(cell)))
    return found


def _at_wandb(kept: KeptRun) -> Columns:
    found: Columns = {}
    for line in kept.history:
        for name, value in line.items():
            if "/" in name and not name.startswith(("sys/", "pictures/")):
                found.setdefault(name, []).append((line["step"], value))
    return found


def _on_board(run: Path) -> Columns:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith(("sys/", "eval/"))]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def _pictures_at_wandb(kept: KeptRun) -> list[tuple[int, str]]:
    """Step and key of every picture, each of which was sent once."""
    found = {
        (line["step"], name): line[name]["sha256"]
        for line in kept.history
        for name in line
        if name.startswith("pictures/")
    }
    assert len(set(found.values())) == len(found)
    return sorted(found)


def _pictures_in(run: Path) -> list[tuple[int, str]]:
    """Step and key of every picture; ``views.png`` is shown with the first row, which is of step 1."""
    return sorted([(1, "pictures/views"), *((step, f"pictures/{name}") for step, name, _ in numbered(run))])


def _single(columns: Columns) -> Columns:
    """With values in single precision, which is TensorBoard's."""
    return {
        name: [(step, float(np.float32(value))) for step, value in course] for name, course in columns.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with a finished offline run."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder)
    run = _fit(folder, server, "trainer.max_epochs=2", mode="offline")
    assert run.wait() == 0, run.said
    assert run.err == ""
    assert run.out.count(f"W&B: kept offline; send with: sslzoo wandb push {folder / 'run'}") == 1, run.said
    return folder


def test_an_offline_run_is_sent_by_either_command(finished: Path, server: Server, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    name = manifest(folder / "run")["run_id"]
    _sync(folder, server)
    kept = server.runs[name]
    assert _at_wandb(kept) == _in_file(folder / "run")
    names = ("embedding_map", "neighbours", "views")
    assert _pictures_at_wandb(kept) == _pictures_in(folder / "run")
    assert _pictures_in(folder / "run") == [
        (1, "pictures/views"),
        *((step, f"pictures/{name}") for step in (6, 12) for name in names if (step, name) != (6, "views")),
    ]
    assert [line["_step"] for line in kept.history] == list(range(len(read_rows(folder / "run"))))
    assert {"step": 12, "epoch": 1, "images": 192}.items() <= kept.history[-1].items()
    before = kept.history
    for attempt in range(2):  # nothing is sent twice
        push = _push(folder, server, name=f"push{attempt}")
        assert push.wait() == 0, push.said
        assert push.out == f"{server.url}/e/sslzoo/runs/{name}\n"
        assert push.err == "" and server.runs[name].history == before
    assert not list((folder / "run/wandb").glob("offline-run-*"))  # they would be sent again by wandb sync


def test_tensorboard_has_the_same_history(finished: Path) -> None:
    assert _on_board(finished / "run") == _single(_in_file(finished / "run"))
    events = EventAccumulator(str(finished / "run/tensorboard"))
    events.Reload()
    assert "eval/linear_top1" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("pictures/views")] == [0, 12]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_panels_of_the_framework_show_every_metric_of_a_run(finished: Path) -> None:
    recorded = {
        name
        for file in ("metrics.csv", "system.csv")
        for name in (finished / "run" / file).read_text().partition("\n")[0].split(",")[2:]
        if not name.startswith("method/") and not name.endswith("_epoch")
    }
    shown = {curve.key for section in FRAMEWORK for panel in section.panels for curve in panel.curves}
    # The others need a GPU, or a projector.
    assert shown == recorded | {
        "sys/gpu_mem",
        "repr/embedding_std",
        "repr/embedding_rankme",
        "repr/embedding_width",
    }


def test_what_is_said_of_a_run(finished: Path, server: Server, tmp_path: Path) -> None:
    """In another project: recipe, manifest, group, final figures, pictures; and every later evaluation."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    name = manifest(folder / "run")["run_id"]
    server.runs.pop(name, None)
    recipe = folder / "run/recipe.yaml"
    recipe.write_text(re.sub(r"artifact: false", "artifact: true", recipe.read_text()))
    push = _push(folder, server, "--project", "other", "--entity", "team")
    assert push.wait() == 0 and push.out == f"{server.url}/team/other/runs/{name}\n", push.said
    kept = server.runs[name]
    expected = {"groupName": "tiny", "jobType": "pretrain", "tags": ["a"], "notes": "for a test"}
    assert expected.items() <= kept.attributes.items()
    assert kept.config["optim"]["lr"] == 0.01
    facts = kept.config["run"]
    assert facts["data_fingerprint"].startswith("fashion_mnist/train/96/") and facts["world_size"] == 1
    assert facts["derived"] == {
        "peak_lr": 0.01, "total_steps": 12, "steps_per_epoch": 6, "training_images": 96,
        "parameters": facts["derived"]["parameters"],
    }  # fmt: skip
    assert kept.summary["eval/linear_top1"] == pytest.approx(kept.summary["val/linear_top1"], abs=0.5)
    assert all(figure.key in kept.summary for figure in AT_A_GLANCE)
    assert kept.summary["best/linear_top1"] >= kept.summary["eval/linear_top1"]
    assert kept.summary["report"]["_type"] == "html-file"
    assert server.artifacts == [("model", f"tiny-{name}")]
    assert "sys/images_per_s" in kept.history[0]
    shown = [line for line in kept.history if "pictures/neighbours" in line]
    assert [line["step"] for line in shown] == [6, 12]
    assert shown[0]["pictures/neighbours"]["_type"] == "image-file"
    assert shown[1]["pictures/neighbours"]["caption"].startswith("Nearest neighbours after epoch 2.")

    later = fork(
        folder, "eval", "knn", "run", "--k", "3", environment=server.environment, before=short_evaluation
    )
    assert later.wait() == 0, later.said
    assert _push(folder, server).wait() == 0
    assert "eval/knn_k3_top1" in server.runs[name].summary or any(
        key.startswith("eval/knn") and key != "eval/knn_top1" for key in server.runs[name].summary
    )


def test_another_history_at_the_server_is_not_continued(
    finished: Path, server: Server, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    name = manifest(folder / "run")["run_id"]
    server.runs[name] = KeptRun()
    server.runs[name].streams["history"] = ['{"_step": 0, "step": 50}', '{"_step": 7, "step": 1}']
    push = _push(folder, server)
    assert push.wait() == 0, push.said
    assert f"sent anew as {name}-v2" in push.err and len(push.err.splitlines()) == 1
    assert len(server.runs[name].history) == 2  # is left alone
    assert _at_wandb(server.runs[f"{name}-v2"]) == _in_file(folder / "run")


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A connection to a server that has two rows of the run ``r``."""
    connection = Mock(dir="offline-run-1/files")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(sys.modules, "wandb", Mock())
    monkeypatch.setattr(wandb_run, "_open", lambda *_: connection)
    monkeypatch.setattr(wandb_run, "_standing", lambda run, cfg, final: 2 if final >= 2 else None)
    return connection


def _three_rows(folder: Path, code: int | None, *, online: bool) -> Run:
    """A run that has ended with ``code``, of whose three rows two are in the checkpoint and at W&B."""
    run = Run(folder, "r")
    run.checkpoints.mkdir()
    (folder / "wandb").mkdir()
    state = {"id": "r", "online": online, "rows": 0 if online else 2}
    (folder / "wandb/sent.json").write_text(json.dumps(state))
    run.manifest.write_text(json.dumps({"run_id": "r", "recipe": {}, "world_size": 1, "exit_code": code}))
    run.recipe.write_text("{name: tiny, data: {global_batch_size: 4}, logging: {wandb: {}}}")
    run.metrics.write_text("step,epoch,train/loss\n1,0,3.0\n2,0,2.0\n3,0,1.0\n")
    content = {"state_dict": {}, "optimizer_steps": 2, "callbacks": {"Meter": {"rows": 2}}}
    torch.save(content, run.checkpoints / "step=2.ckpt")
    return run


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize(
    ("code", "shown", "steps"),
    [
        (ExitCode.PREEMPTED, ExitCode.PREEMPTED, []),
        (None, ExitCode.FAILURE, []),  # killed
        (ExitCode.NAN, ExitCode.NAN, [2]),
    ],
)
def test_a_later_evaluation_leaves_the_history_as_it_is(
    tmp_path: Path, connection: Mock, mode: Any, code: int | None, shown: int, steps: list[int]
) -> None:
    run = _three_rows(tmp_path, code, online=mode == "online")
    cfg = WandbConfig(mode=mode)
    lock = RunLock(tmp_path, seconds=dict, on_lost=print)
    lock.acquire()
    wandb_run.update(run, cfg)  # it lives, and sends its evaluations itself
    lock.release()
    assert connection.mock_calls == []
    wandb_run.update(run, cfg)
    assert [call.kwargs["step"] for call in connection.log.call_args_list] == steps
    connection.finish.assert_called_once_with(exit_code=shown)
    assert wandb_run.Sent.read(run).id == "r"


def test_a_file_that_is_no_picture_is_left_out(
    tmp_path: Path, connection: Mock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def image(path: str, caption: str | None) -> str:
        Image.open(path).load()
        return path

    monkeypatch.setattr(sys.modules["wandb"], "Image", image)
    run = _three_rows(tmp_path, ExitCode.NAN, online=True)
    (tmp_path / "pictures").mkdir()
    for name in ("bad-step=3", "bad"):
        (tmp_path / "pictures" / f"{name}.png").touch()
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures/good-step=3.png")
    wandb_run.update(run, WandbConfig(mode="online"))
    (line,) = (call.args[0] for call in connection.log.call_args_list)
    assert [key for key in line if key.startswith("pictures/")] == ["pictures/good"]
    assert [message.partition(", which")[0] for message in caplog.messages] == [
        f"W&B does not show {tmp_path}/pictures/{name}.png" for name in ("bad-step=3", "bad")
    ]
    connection.finish.assert_called_once_with(exit_code=ExitCode.NAN)


def test_a_damaged_histogram_is_left_out_of_a_push(
    tmp_path: Path, connection: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    _three_rows(tmp_path, ExitCode.NAN, online=True)
    good = json.dumps({"name": "method/u", "step": 3, "counts": [1, 2], "edges": [0.0, 1.0, 2.0]})
    (tmp_path / "histograms.jsonl").write_text(f"{good[:40]}{good}\n{good}\n")
    wandb_run.push(tmp_path, project=None, entity=None)
    (line,) = (call.args[0] for call in connection.log.call_args_list)
    assert {"method/u", "train/loss"} <= line.keys()
    assert caplog.messages == [f"line 1 of {tmp_path}/histograms.jsonl is damaged and left out"]
    connection.finish.assert_called_once_with(exit_code=ExitCode.NAN)


def _summary(connection: Mock) -> dict[str, Any]:
    """The summary after all updates so far."""
    summary: dict[str, Any] = {}
    for call in connection.summary.update.call_args_list:
        summary |= call.args[0]
    return summary


def test_a_run_says_where_it_is_going_to_be_sent_and_how_to_avoid_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    run, cfg = Run(tmp_path, "r"), WandbConfig(project="mine", entity="lab")
    said = wandb_run.WandB(run, cfg, "online").destination
    assert "pictures" in said and "lab/mine at https://wandb.example (logging.wandb=null" in said
    assert wandb_run.WandB(run, cfg, "offline").destination == ""


def test_the_best_figures_and_the_throughput_are_sent_with_every_evaluation(
    tmp_path: Path, connection: Mock
) -> None:
    """With the checkpoint that includes it, however short ago rows were sent."""
    run = _three_rows(tmp_path, None, online=True)
    (tmp_path / "system.csv").write_text("step,epoch,sys/images_per_s\n1,0,50.0\n2,0,70.0\n3,0,60.0\n")
    wandb = wandb_run.WandB(run, WandbConfig(mode="online"), "online")
    wandb.begin(2)
    assert _summary(connection) == {"median/images_per_s": 60.0}
    accuracies = {3: 0.5, 4: 0.75, 5: 0.25}
    for rows, (step, accuracy) in enumerate(accuracies.items(), start=4):
        run.metrics.write_text(
            "step,epoch,train/loss,val/knn_top1,repr/rankme\n1,0,3.0,,\n2,0,2.0,,\n3,0,1.0,,\n"
            + "".join(f"{s},0,,{accuracies[s]},9.0\n" for s in range(3, step + 1))
        )
        wandb.add(step, {"val/knn_top1": accuracy})
        updates = connection.summary.update.call_count
        for _ in range(2):  # the second time without an evaluation
            wandb.saved(rows)
        assert connection.summary.update.call_count == updates + 1
        assert connection.log.call_args.args[0]["val/knn_top1"] == accuracy
        assert _summary(connection)["best/knn_top1"] == max(0.5, *(accuracies[s] for s in range(3, step + 1)))
    assert "eval/knn_top1" not in _summary(connection)  # those of evaluations after training only


@pytest.mark.parametrize("mode", ["push", "offline"])
def test_a_killed_run_that_is_sent_later_has_its_best_figures(
    tmp_path: Path, connection: Mock, mode: str
) -> None:
    run = _three_rows(tmp_path, None, online=False)
    run.metrics.write_text("step,epoch,train/loss,val/knn_top1\n1,0,3.0,\n2,0,,0.5\n3,0,1.0,\n")
    if mode == "push":
        wandb_run.push(tmp_path, project=None, entity=None)
    else:  # the next start ends before the next evaluation
        wandb = wandb_run.WandB(run, WandbConfig(mode="offline"), "offline")
        wandb.begin(2)
        wandb.end(Ending(code=ExitCode.PREEMPTED, message="stopped"))
    assert _summary(connection)["best/knn_top1"] == 0.5


def test_refusals_of_push(finished: Path, tmp_path: Path) -> None:
    nobody = {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    push = fork(finished, "wandb", "push", "run", environment=nobody)
    assert push.wait() == ExitCode.USAGE
    assert push.last.startswith(
        "sslzoo wandb push: there is no login for http://127.0.0.1:9: run wandb login"
    )
    push = fork(tmp_path, "wandb", "push", "nothing", environment=nobody)
    assert push.wait() == ExitCode.USAGE and "manifest.json is gone" in push.last


def _until_saved(fit: Command, run: Path, step: int) -> None:
    assert until(lambda: fit.ended or max(saved(run), default=0) >= step) and not fit.ended, fit.said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_three_kills(tmp_path: Path, server: Server, mode: str) -> None:
    """Between two checkpoints, of the process alone and with wandb's own; offline, segments are sent between."""
    write_recipe(tmp_path)
    run = tmp_path / "run"
    for number, (step, all_of_it) in enumerate([(3, False), (8, True), (13, False)]):
        part = mode == "online" and all_of_it  # wandb uploads every 15 seconds
        faults = {"pause": 2.0 if part else 0.1}
        fit = _fit(tmp_path, server, "--resume", "auto", mode=mode, faults=faults, name=f"fit{number}")
        _until_saved(fit, run, step)
        name = manifest(run)["run_id"]
        if part:  # a run that is killed has what the evaluation after step 6 found
            assert until(lambda name=name: "best/knn_top1" in server.runs[name].summary), fit.said
            assert "median/images_per_s" in server.runs[name].summary and server.runs[name].history
        assert until(lambda: read_rows(run)[-1].step > max(saved(run)))
        (os.killpg if all_of_it else os.kill)(fit.pid, signal.SIGKILL)
        assert fit.wait() == -signal.SIGKILL, fit.said
        if mode == "online":
            assert len(server.runs[name].history) <= len(read_rows(run))
    fit = _fit(tmp_path, server, "--resume", "auto", mode=mode, faults={"pause": 0.1}, name="signalled")
    _until_saved(fit, run, 15)
    fit.signal(signal.SIGTERM)
    assert fit.wait() == ExitCode.PREEMPTED, fit.said
    if mode == "offline":
        _sync(tmp_path, server)
    last = _fit(tmp_path, server, "--resume", "auto", mode=mode, name="last")
    assert last.wait() == 0 and last.err == "", last.said
    if mode == "offline":
        _sync(tmp_path, server)
    name = manifest(run)["run_id"]
    kept = server.runs[name]
    assert kept.exit_code == 0
    assert _at_wandb(kept) == _in_file(run)
    assert _pictures_at_wandb(kept) == _pictures_in(run) and len(_pictures_in(run)) == 9
    assert _on_board(run) == _single(_in_file(run))
    assert f"{name}-v2" not in server.runs
    if mode == "online":
        assert last.out.count(f"/runs/{name}") == 1 and kept.alerts == ["Pre-empted"]


@pytest.mark.slow
def test_without_a_server_nothing_is_lost(tmp_path: Path, server: Server) -> None:
    write_recipe(tmp_path)
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    run = fork(
        tmp_path, "fit", "--recipe", "tiny.yaml", "--out", "run", "logging.wandb={}", "trainer.max_epochs=1",
        "optim.warmup_epochs=0", environment=away, before=_impatient,
    )  # fmt: skip
    assert run.wait() == 0, run.said
    assert "go to project sslzoo at http://127.0.0.1:9 (logging.wandb=null" in run.out
    (line,) = run.err.splitlines()
    assert line.startswith("warning: W&B: ") and line.endswith(
        "send with: sslzoo wandb push " + str(tmp_path / "run")
    )
    assert _push(tmp_path, server).wait() == 0
    assert _at_wandb(server.runs[manifest(tmp_path / "run")["run_id"]]) == _in_file(tmp_path / "run")


def _impatient() -> None:
    from sslzoo.dashboards import wandb_run

    wandb_run.PATIENCE = 1.0
    short_evaluation()


def _hurried() -> None:
    from sslzoo.dashboards import wandb_run

    wandb_run.UPLOAD = 1.0
    _eager()


@pytest.mark.slow
def test_an_outage_while_it_trains_ends_no_run(tmp_path: Path, server: Server) -> None:
    write_recipe(tmp_path)
    with serving() as lost:
        run = fork(
            tmp_path, "fit", "--recipe", "tiny.yaml", "--out", "run", "logging.wandb={}", "trainer.max_epochs=2",
            environment=lost.environment, before=_hurried, faults={"pause": 0.05},
        )  # fmt: skip
        assert until(lambda: run.ended or lost.runs), run.said
    assert run.wait() == 0, run.said
    assert _push(tmp_path, server).wait() == 0
    assert _at_wandb(server.runs[manifest(tmp_path / "run")["run_id"]]) == _in_file(tmp_path / "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_shown_and_raises_an_alert(tmp_path: Path, server: Server) -> None:
    write_recipe(tmp_path)
    run = _fit(tmp_path, server, mode="online", faults={"nan_at": 4})
    assert run.wait() == ExitCode.NAN, run.said
    kept = server.runs[manifest(tmp_path / "run")["run_id"]]
    assert kept.alerts == ["The loss is not finite"] and kept.exit_code == ExitCode.NAN
    assert [line["step"] for line in kept.history] == [1, 2, 3, 4, 5]
    assert math.isnan(kept.history[-1]["train/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_a_collapse_raises_an_alert(tmp_path: Path, server: Server, stop: bool) -> None:
    write_recipe(tmp_path)
    projector = "temperature: 0.2, projector: {widths: [32, 32]}"
    run = _fit(
        tmp_path, server, f"method={{name: 'tests.data.verdict.record:NoNegatives', {projector}}}", "probe={}",
        "trainer.max_epochs=4", f"eval.stop_on_collapse={json.dumps(stop)}", mode="online",
    )  # fmt: skip
    code = ExitCode.COLLAPSED if stop else ExitCode.DONE
    assert run.wait() == code, run.said
    kept = server.runs[manifest(tmp_path / "run")["run_id"]]
    assert kept.alerts == ["Collapsed"] and kept.exit_code == code
    assert _at_wandb(kept) == _in_file(tmp_path / "run")
    assert stop or kept.summary["verdict/state"] == "collapsed"
