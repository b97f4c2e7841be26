"""Rows, means, and the way back to a checkpoint's rows."""

from __future__ import annotations

import csv
import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sslzoo.callbacks.histograms import Histograms
from sslzoo.callbacks.meter import Follower, Meter, log_metrics
from sslzoo.callbacks.metrics_file import MetricsFile
from sslzoo.data.loading import ViewDataset
from sslzoo.data.module import SSLDataModule
from sslzoo.exits import ExitCode
from sslzoo.pictures import Drawing, numbered, path_of, save
from sslzoo.recipe.sections import LoggingConfig
from sslzoo.testing.contract import small_recipe
from sslzoo.testing.course import train
from sslzoo.testing.pretend import CUDA, PretendedGPU
from sslzoo_methods.simclr.method import SimCLR


@pytest.fixture
def meter_in():
    """``meter_in(folder, every_steps)``: a meter whose files are closed at the end."""
    meters: list[Meter] = []

    def make(folder: Path, every_steps: int) -> Meter:
        meters.append(Meter(folder, every_steps=every_steps))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


def _module() -> Any:
    plan = SimpleNamespace(global_batch_size=8, accumulate=1)
    return SimpleNamespace(
        recorded={},
        settings={},
        optimizer_steps=0,
        step_skipped=False,
        plan=plan,
        device=torch.device("cpu"),
    )


def _trainer(module: Any, meter: Meter) -> Any:
    return SimpleNamespace(
        lightning_module=module,
        current_epoch=0,
        is_global_zero=True,
        callbacks=[meter],
        datamodule=SimpleNamespace(waited=0.0),
    )


def _feed(meter: Meter, trainer: Any, *losses: float, closes: bool = True) -> None:
    module = trainer.lightning_module
    for loss in losses:
        meter.on_train_batch_start(trainer, module, None, 0)
        module.recorded |= {"train/loss": torch.tensor(loss)}
        if closes:
            module.settings["opt/lr"] = 0.1 * (module.optimizer_steps + 1)
            module.optimizer_steps += 1
        meter.on_train_batch_end(trainer, module, None, None, 0)


def _rows(path: Any) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_measurements_are_averaged_and_settings_are_the_last(tmp_path, meter_in):
    meter, module = meter_in(tmp_path, 2), _module()
    trainer = _trainer(module, meter)
    meter.on_train_start(trainer, module)
    _feed(meter, trainer, 1.0, closes=False)
    _feed(meter, trainer, 2.0, 6.0, 5.0)
    assert module.recorded == {}
    log_metrics(trainer, {"val/linear_top1": 0.5})
    meter.on_train_epoch_end(trainer, module)
    first, probe, end = _rows(tmp_path / "metrics.csv")
    assert (first["step"], first["train/loss"], first["opt/lr"]) == ("2", "3.0", "0.2")
    assert (probe["step"], probe["val/linear_top1"], probe["train/loss"]) == ("3", "0.5", "")
    assert (end["train/loss"], end["train/loss_epoch"]) == ("5.0", "3.5")
    assert "sys/images_per_s" in _rows(tmp_path / "system.csv")[0]
    assert not any(key.startswith("sys/") for key in first)


def test_a_resumed_meter_writes_the_same_bytes(tmp_path, meter_in):
    whole = meter_in(tmp_path / "whole", 2)
    a = _trainer(_module(), whole)
    whole.on_train_start(a, a.lightning_module)
    _feed(whole, a, 0.1, 0.2, 0.3)
    state = whole.state_dict()
    # What comes after the save, new columns included, is lost in the kill and written again.
    (tmp_path / "killed").mkdir()
    log_metrics(a, {"val/knn_top1": 0.25})
    (tmp_path / "killed" / "metrics.csv").write_text((tmp_path / "whole" / "metrics.csv").read_text() + "9,")
    _feed(whole, a, 0.7)
    whole.on_train_epoch_end(a, a.lightning_module)

    resumed = meter_in(tmp_path / "killed", 2)
    b = _trainer(_module(), resumed)
    b.lightning_module.optimizer_steps = 3
    resumed.load_state_dict(state)
    resumed.on_train_start(b, b.lightning_module)
    assert len(_rows(tmp_path / "killed" / "metrics.csv")) == 1
    log_metrics(b, {"val/knn_top1": 0.25})
    _feed(resumed, b, 0.7)
    resumed.on_train_epoch_end(b, b.lightning_module)
    assert (tmp_path / "killed" / "metrics.csv").read_bytes() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_bytes()


def test_a_save_asks_the_other_ranks_only_for_pending_sums(tmp_path, meter_in):
    meter, module = meter_in(tmp_path, 2), _module()
    trainer = _trainer(module, meter)
    meter.on_train_start(trainer, module)
    with PretendedGPU(world=3) as gpu:
        idle = meter.state_dict()
        assert idle["sums"] == [[], [], []]
        assert gpu.notes.collectives == {}
        module.recorded["train/loss"] = torch.tensor(0.5).to(CUDA)
        module.optimizer_steps = 1
        meter.on_train_batch_end(trainer, module, None, None, 0)
        pending = meter.state_dict()
        assert pending["sums"] == [[0.5], [0.5], [0.5]]
        assert gpu.notes.collectives == {"all_gather": 1}
        assert gpu.broken() == []
    assert pending.keys() == idle.keys()


def test_a_loss_that_is_not_finite_ends_the_run_and_no_checkpoint_is_made(tmp_path, meter_in):
    meter, module = meter_in(tmp_path, 2), _module()
    trainer = _trainer(module, meter)
    meter.on_train_start(trainer, module)
    _feed(meter, trainer, float("nan"))
    with pytest.raises(SystemExit) as before_save:
        meter.check_finite(trainer)
    with pytest.raises(SystemExit) as at_row:
        _feed(meter, trainer, 1.0)
    assert before_save.value.code == at_row.value.code == ExitCode.NAN


def test_what_a_skipped_step_measured_is_left_out(tmp_path, meter_in):
    meter, module = meter_in(tmp_path, 2), _module()
    trainer = _trainer(module, meter)
    meter.on_train_start(trainer, module)
    _feed(meter, trainer, 1.0)
    module.step_skipped = True
    _feed(meter, trainer, 4.0, closes=False)
    _feed(meter, trainer, float("nan"))
    module.step_skipped = False
    _feed(meter, trainer, 3.0, 5.0)
    meter.on_train_epoch_end(trainer, module)
    first, second, end = _rows(tmp_path / "metrics.csv")
    assert (first["step"], first["train/loss"]) == ("2", "1.0")
    assert (second["step"], second["train/loss"], end["train/loss_epoch"]) == ("4", "4.0", "3.0")


def test_a_failing_follower_is_told_nothing_more(tmp_path, meter_in, caplog):
    class Broken(Follower):
        calls = 0

        def add(self, step: int, values: Any) -> None:
            self.calls += 1
            raise ConnectionError("unreachable")

    broken, meter, module = Broken(), meter_in(tmp_path, 1), _module()
    meter.followers = [broken]
    trainer = _trainer(module, meter)
    meter.on_train_start(trainer, module)
    _feed(meter, trainer, 1.0, 2.0)
    assert broken.calls == 1 and len(_rows(tmp_path / "metrics.csv")) == 2
    assert sum("unreachable" in record.message for record in caplog.records) == 1


def test_followers_learn_which_rows_are_final(tmp_path, meter_in):
    told: list[tuple[str, int]] = []
    shown: list[list[int]] = []  # steps of the pictures that are there at a start

    class Listener(Follower):
        def begin(self, rows: int) -> None:
            told.append(("begin", rows))
            shown.append([step for step, *_ in numbered(tmp_path)])

        def saved(self, rows: int) -> None:
            told.append(("saved", rows))

    meter, module = meter_in(tmp_path, 1), _module()
    trainer = _trainer(module, meter)
    meter.followers = [Listener()]
    meter.on_train_start(trainer, module)
    _feed(meter, trainer, 1.0, 2.0)
    meter.saved()
    meter.write_histogram("method/a", torch.tensor([1.0, 2.0, torch.inf]), step=2)
    state = meter.state_dict()
    _feed(meter, trainer, 3.0)
    meter.write_histogram("method/a", torch.tensor([3.0]), step=3)
    for step in (2, 3):
        save(Drawing(Image.new("RGB", (1, 1)), ""), path_of(tmp_path, "views", step))
    # The same start again in this directory, and in a new one, whose file lacks the rows before.
    for folder, rows in ((tmp_path, 2), (tmp_path / "new", 0)):
        resumed = meter_in(folder, 1)
        resumed.followers = [Listener()]
        module.optimizer_steps = 2
        resumed.load_state_dict(state)
        resumed.on_train_start(trainer, module)
        assert told[-1] == ("begin", rows)
        resumed.saved()
        assert told[-1] == ("saved", rows)
        assert resumed.state_dict()["rows"] == rows
    assert told[:2] == [("begin", 0), ("saved", 2)]
    assert shown == [[], [2], [2]]
    (kept,) = Histograms(tmp_path).read()
    assert kept.step == 2 and sum(kept.counts) == 2


def _slow(function: Any) -> Any:
    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return function(*args)

    return slow


@pytest.mark.parametrize(
    ("place", "name", "waits"),
    [
        (ViewDataset, "__getitems__", True),
        # Where the host also waits for a GPU that is busy: an operation can only be queued when there is room.
        (SSLDataModule, "on_after_batch_transfer", False),
        (SimCLR, "loss", False),
    ],
    ids=["loader", "transfer", "step"],
)
def test_data_wait_is_the_time_of_the_loader_alone(
    place: Any, name: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, _slow(getattr(place, name)))
    recipe = small_recipe("simclr", recipe="simclr_fashion_mnist")
    recipe = replace(recipe, logging=LoggingConfig(every_steps=4, checkpoint_every_steps=100))
    train(recipe, tmp_path, steps=4)
    (row,) = _rows(tmp_path / "system.csv")
    seconds = 4 * recipe.data.global_batch_size / float(row["sys/images_per_s"])
    waited = seconds * float(row["sys/data_wait"])
    # A tenth of a second each for two batches: the clock starts with the first and, after a save, with the last.
    assert seconds > 0.2
    assert waited > 0.2 if waits else waited < 0.1


def test_new_columns_widen_the_file_and_rewind_narrows_it(tmp_path):
    file = MetricsFile(tmp_path / "m.csv")
    file.rewind(0, ["step", "epoch"])
    file.append(1, 0, {"a": 1.5})
    before = (tmp_path / "m.csv").read_bytes()
    file.append(2, 0, {"b": 1e-9})
    assert (tmp_path / "m.csv").read_text() == "step,epoch,a,b\n1,0,1.5,\n2,0,,1e-09\n"
    file.rewind(1, ["step", "epoch", "a"])
    assert (tmp_path / "m.csv").read_bytes() == before
    file.close()


def test_a_failed_rewrite_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "m.csv")
    file.rewind(0, ["step", "epoch"])
    file.append(1, 0, {"a": 1.0})
    file.sync()
    before = file.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.append(2, 0, {"a": 1.0, "b": 2.0})
    assert file.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file.path]


def test_metrics_need_a_meter():
    with pytest.raises(ValueError, match="need a Meter"):
        log_metrics(SimpleNamespace(callbacks=[]), {"val/linear_top1": 0.5})
