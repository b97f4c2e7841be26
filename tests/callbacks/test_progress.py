"""What is on the screen and in the log file at each moment of a run."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import MofNCompleteColumn

from sslzoo.callbacks import progress
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.terminal import Bars
from sslzoo.testing import kills
from tests.chaos import tiny_job

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor
PLAN = TrainingPlan(dataset_size=40, global_batch_size=4, max_epochs=3)  # 10 steps an epoch
NUMBERS = {"train/loss": 2.0, "sys/images_per_s": 512.3}
FIGURES = {"val/linear_top1": 0.731, "val/knn_top1": 0.702}


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def _console(*, terminal: bool, width: int = 100, file: Any = None) -> Console:
    return Console(file=file or io.StringIO(), force_terminal=terminal, width=width)


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _screen(display: ProgressDisplay, width: int = 100) -> list[str]:
    """The rows of the bars, as they would be drawn now."""
    assert display._bars is not None
    console = _console(terminal=False, width=width)
    console.print(display._bars.get_renderable())
    return [re.sub(r"[━╸╺ ]{2,}", "  ", line).strip() for line in _written(console).splitlines()]


class Run:
    """Calls the hooks as Lightning does, of a run that trains nothing."""

    def __init__(self, folder: Path, *, terminal: bool, leader: bool = True) -> None:
        self.out, self.err = _console(terminal=terminal), _console(terminal=terminal)
        self.display = ProgressDisplay(out=self.out, err=self.err)
        self.meter = Meter(folder, every_steps=1)
        self.method = SimpleNamespace(plan=PLAN, optimizer_steps=0)
        self.trainer: Any = SimpleNamespace(
            is_global_zero=leader, callbacks=[self.meter, self.display], num_val_batches=[3, 2]
        )

    def start(self, step: int = 0) -> Run:
        self.method.optimizer_steps = step
        self.display.on_train_start(self.trainer, self.method)
        return self

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.method.optimizer_steps += 1
            self.meter.latest |= NUMBERS
            self.display.on_train_batch_end(self.trainer, self.method, None, None, 0)

    def evaluate(self) -> None:
        self.display.on_validation_start(self.trainer, self.method)
        for loader, batches in enumerate(self.trainer.num_val_batches):
            for i in range(batches):
                self.display.on_validation_batch_end(self.trainer, self.method, None, None, i, loader)
        self.meter.latest |= FIGURES
        self.display.on_validation_end(self.trainer, self.method)

    def end_epoch(self) -> None:
        self.display.on_train_epoch_end(self.trainer, self.method)

    @property
    def lines(self) -> list[str]:
        return _written(self.out).splitlines()


# -- a real run -------------------------------------------------------------------------------


class Watch(Callback):
    """Looks at the screen after each hook; stands last."""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display
        self.seen: list[tuple[str, list[str]]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(("step", _screen(self.display)))

    def on_validation_start(self, *_: Any) -> None:
        self.seen.append(("evaluation", _screen(self.display)))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.seen.append(("batch", _screen(self.display)))

    def on_validation_end(self, *_: Any) -> None:
        self.seen.append(("evaluated", _screen(self.display)))


def test_a_run_in_a_terminal_shows_steps_then_its_evaluation_then_steps(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="sslzoo")
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    out, err = _console(terminal=True), _console(terminal=True)
    display = ProgressDisplay(out=out, err=err)
    watch = Watch(display)
    # Six steps an epoch; 100 training and 20 test images in batches of 32.
    monkeypatch.setattr("sslzoo.run.build.ProgressDisplay", lambda **_: display)
    monkeypatch.setattr(kills, "_Disturbance", lambda *_: watch)
    kills.fit(tiny_job(epochs=2), tmp_path, None)

    first, second = watch.seen[: len(watch.seen) // 2], watch.seen[len(watch.seen) // 2 :]
    batches = sum(hook == "batch" for hook, _ in first)
    assert batches > 4  # of more than one loader
    assert [hook for hook, _ in first] == ["step"] * 6 + ["evaluation"] + ["batch"] * batches + ["evaluated"]
    rows = [lower for _, (_, lower) in first]
    for i, row in enumerate(rows[:6], 1):
        assert row.startswith(f"step  {i}/6")
    for i, row in enumerate(rows[6 : 6 + batches]):
        assert row == f"batch  {i}/{batches} evaluating …"
    assert rows[6 + batches] == f"batch  {batches}/{batches} measuring …"
    assert re.fullmatch(r"step  6/6 loss \d+\.\d{4}  \d+ images/s  \d+ % data wait", rows[-1])
    assert all(
        re.match(r"step  \d/6 loss \d+\.\d{4}  \d+ images/s", row) for row in rows[:6]
    )  # from the first on

    probe = r"probe \d+\.\d %, k-NN \d+\.\d %"
    top = [upper for _, (upper, _) in first]
    assert top[5] == re.match(r"epoch  1/2 \d:\d\d:\d\d left", top[5])[0]  # type: ignore[index]
    assert re.fullmatch(rf"epoch  1/2 \d:\d\d:\d\d left  {probe}", top[-1])
    assert re.fullmatch(rf"epoch  1/2 \d:\d\d:\d\d left  {probe} \(epoch 1\)", second[0][1][0])
    assert second[0][1][1].startswith("step  1/6")
    assert re.fullmatch(rf"epoch  2/2 {probe}", second[-1][1][0])

    assert _written(out) == ""
    assert _written(err).count(SHOWN) == _written(err).count(HIDDEN) == 1
    epochs = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch")]
    assert [re.sub(r"\d+\.\d+", "#", line)[:19] for line in epochs] == [
        "epoch 1/2  step  6/",
        "epoch 2/2  step 12/",
    ]


@pytest.mark.parametrize("killed_at", [8, 10])
def test_a_resumed_run_knows_the_epoch_of_its_figures(killed_at, tmp_path, monkeypatch):
    """Killed in the second epoch of six steps, with checkpoints every three."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    kills.run(tiny_job(epochs=2), tmp_path, [kills.Fault("batch", killed_at)])
    lines = [x for x in (tmp_path / "rank0.txt").read_text().splitlines() if x.startswith("epoch 2/2")]
    resumed = max(i for i in range(1, len(lines)) if _step(lines[i]) <= _step(lines[i - 1]))
    assert _step(lines[resumed]) in (7, 10)
    for line in lines[resumed:]:
        assert ("k-NN" in line) and (line.endswith("left") or _step(line) == 12)
        assert ("% (epoch 1)" in line) == (_step(line) < 12)


def _step(line: str) -> int:
    return int(re.search(r"step +(\d+)/12", line)[1])  # type: ignore[index]


# -- lines ------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_an_epoch_and_one_a_minute_inside(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run = Run(tmp_path, terminal=False).start()
    clock.now += 59
    run.steps(1)
    assert run.lines == []
    clock.now += 1
    run.steps(2)  # at the first of them
    assert run.lines == ["epoch 1/3  step  2/30  loss 2.0000  512 images/s  0:14:00 left"]
    clock.now += 90
    run.steps(7)  # the sixth step of the seven closes no epoch, the last does
    assert len(run.lines) == 2
    run.evaluate()
    run.end_epoch()
    assert run.lines[2:] == [
        "epoch 1/3  step 10/30  loss 2.0000  512 images/s  probe 73.1 %, k-NN 70.2 %  0:05:00 left"
    ]
    clock.now += 50
    run.steps(9)  # the epoch's line is not a minute old
    assert len(run.lines) == 3
    clock.now += 50
    run.steps(1)  # the epoch's line comes at once
    run.end_epoch()
    assert [line[:21] for line in run.lines[3:]] == ["epoch 2/3  step 20/30"]
    assert "k-NN 70.2 % (epoch 1)  0:" in run.lines[3]
    run.steps(10)
    run.evaluate()
    run.end_epoch()
    assert run.lines[4] == "epoch 3/3  step 30/30  loss 2.0000  512 images/s  probe 73.1 %, k-NN 70.2 %"
    assert _written(run.err) == ""


def test_lines_are_whole_and_on_disk_at_once(tmp_path):
    with (tmp_path / "job.out").open("w") as file:
        run = Run(tmp_path, terminal=False)
        run.display = ProgressDisplay(out=_console(terminal=False, width=40, file=file), err=run.err)
        run.start().steps(10)
        run.evaluate()
        run.end_epoch()
        lines = (tmp_path / "job.out").read_text().splitlines()
    assert len(lines) == 1 and lines[0].endswith("left")


def test_loss_and_speed_are_there_before_the_first_row_of_metrics(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run = Run(tmp_path, terminal=False).start()
    clock.now += 64
    run.meter.loss, run.method.optimizer_steps = torch.tensor(3.5), 1
    run.display.on_train_batch_end(run.trainer, run.method, None, None, 0)
    assert run.lines[0].startswith("epoch 1/3  step  1/30  loss 3.5000  0 images/s")
    clock.now += 64
    run.meter.latest["sys/data_wait"] = 0.126
    run.steps(1)
    assert "loss 2.0000  512 images/s  13 % data wait" in run.lines[1]


def test_without_labels_the_rank_is_shown(tmp_path):
    run = Run(tmp_path, terminal=False).start()
    run.steps(10)
    run.evaluate()
    for key in FIGURES:
        del run.meter.latest[key]
    run.meter.latest |= {"repr/rankme": 12.34, "repr/width": 256.0}
    run.end_epoch()
    assert "  rank 12.3 of 256" in run.lines[0]


def test_lines_of_json_are_objects_with_what_is_known(tmp_path):
    run = Run(tmp_path, terminal=True)
    run.out = _console(terminal=True, width=40)
    run.display = ProgressDisplay(lines="json", out=run.out, err=run.err)
    run.start().steps(10)
    run.end_epoch()
    run.steps(10)
    run.evaluate()
    run.end_epoch()
    first, second = map(json.loads, run.lines)
    assert {"time", "seconds_left"} <= first.keys()
    known = {"epoch": 1, "epochs": 3, "step": 10, "steps": 30, "loss": 2.0, "images_per_s": 512.3}
    assert {key: first[key] for key in known} == known
    assert "linear_top1" not in first and "data_wait" not in first
    assert (second["linear_top1"], second["knn_top1"], second["evaluated_epoch"]) == (0.731, 0.702, 2)
    assert _written(run.err) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_only_rank_0_shows_anything(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    run = Run(tmp_path, terminal=terminal, leader=False).start()
    run.steps(10)
    run.evaluate()
    run.end_epoch()
    run.display.on_train_end(run.trainer, run.method)
    assert _written(run.out) == _written(run.err) == ""
    assert run.display.state_dict() == {"evaluated_step": 10}  # as rank 0's


def test_bars_on_stderr_and_lines_on_a_redirected_stdout(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    run = Run(tmp_path, terminal=True)
    run.out = _console(terminal=False)
    run.display = ProgressDisplay(out=run.out, err=run.err)
    run.start().steps(1)
    assert len(run.lines) == 1
    assert _screen(run.display)[0].startswith("epoch  0/3")
    run.display.on_train_end(run.trainer, run.method)


# -- bars -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [{"evaluated_step": 10}, None])
def test_a_resumed_run_starts_where_it_is(tmp_path, state):
    run = Run(tmp_path, terminal=True)
    if state is not None:  # older checkpoints hold none
        run.display.load_state_dict(state)
    run.meter.latest |= FIGURES
    run.start(step=24)
    age = " (epoch 1)" if state else ""
    assert _screen(run.display) == [f"epoch  2/3 probe 73.1 %, k-NN 70.2 %{age}", "step  4/10"]
    run.display.on_exception(run.trainer, run.method, SystemExit(75))


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_no_row_is_ever_wider_than_the_terminal(tmp_path, width, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    run = Run(tmp_path, terminal=True)
    run.err.width = width
    run.start().steps(9)
    run.evaluate()
    run.steps(1)
    assert len(_screen(run.display, width)) == 2
    if width >= 80:
        assert _screen(run.display, width)[0].endswith("(epoch 1)")
        assert _screen(run.display, width)[1].endswith("images/s")
    run.display.on_train_end(run.trainer, run.method)


def test_the_figures_of_a_long_run_fit_into_80_columns():
    long = TrainingPlan(dataset_size=5004 * 256, global_batch_size=256, max_epochs=800)
    figures = "10:12:30 left  probe 73.1 %, k-NN 70.2 % (epoch 111)"
    console = _console(terminal=True, width=80)
    bars = Bars(MofNCompleteColumn(), console=console)
    for name, total in (("epoch", long.max_epochs), ("step", long.steps_per_epoch)):
        bars.show(bars.add_task(name, total=total, text=""), completed=total / 2, text=figures)
    plain = _console(terminal=False, width=80)
    plain.print(bars.get_renderable())
    rows = [row.rstrip() for row in _written(plain).splitlines()]
    assert [row.endswith(figures) for row in rows] == [True, True]
    assert all("━" in row and len(row) <= 80 - len("^C") for row in rows)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(76), KeyboardInterrupt()])
def test_an_error_leaves_the_bars_as_they_were_and_the_cursor_visible(tmp_path, error, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    run = Run(tmp_path, terminal=True).start()
    run.steps(3)
    run.display.on_exception(run.trainer, run.method, error)
    written = _written(run.err)
    assert HIDDEN in written
    last = written.rpartition("epoch")[2]
    assert "3/10" in last and "loss 2.0000" in last
    assert last.rpartition("\n")[2] == SHOWN  # what follows starts a line of its own
    run.display.on_exception(run.trainer, run.method, error)
    assert _written(run.err) == written
