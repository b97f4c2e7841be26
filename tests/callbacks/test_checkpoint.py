"""Checkpoint files: whole or absent, chosen by step, and clear about damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sslzoo.callbacks.checkpoint import AtomicCheckpointIO, checkpoints, latest, load_checkpoint
from tests.chaos import Job, run


def _write(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step={step:09d}.ckpt" for step in steps]
    for path in paths:
        AtomicCheckpointIO().save_checkpoint({"weight": torch.arange(1000.0)}, path)
    return paths


def test_latest_goes_by_step_and_skips_half_written_files(tmp_path):
    assert latest(tmp_path) is None
    older, newer = _write(tmp_path, 9, 10)
    os.utime(older, (2e9, 2e9))
    (tmp_path / "step=000000011.ckpt.part").write_bytes(b"half")
    (tmp_path / "last.ckpt").symlink_to(older.name)
    assert latest(tmp_path) == newer
    assert checkpoints(tmp_path) == [older, newer]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (path,) = _write(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"unpicklable": lambda: 0}, path)
    assert path.read_bytes() == before


def test_a_truncated_file_names_the_one_before_it(tmp_path):
    older, newer = _write(tmp_path, 5, 10)
    os.truncate(newer, 700)
    with pytest.raises(ValueError, match=rf"damaged .*--resume {older}"):
        load_checkpoint(newer)
    os.truncate(older, 0)
    with pytest.raises(ValueError, match="no older one is left"):
        load_checkpoint(older)


def test_a_checkpoint_that_names_code_is_refused(tmp_path):
    path = tmp_path / "step=000000001.ckpt"
    torch.save({"run": Path("x")}, path)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


def test_a_run_keeps_the_last_two_and_the_epochs_asked_for(tmp_path):
    run(Job(), tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "epoch=00002.ckpt",
        "last.ckpt",
        "step=000000015.ckpt",
        "step=000000018.ckpt",
    ]
    assert (folder / "last.ckpt").readlink() == Path("step=000000018.ckpt")
    assert load_checkpoint(folder / "epoch=00002.ckpt")["optimizer_steps"] == 12
    assert load_checkpoint(folder / "last.ckpt")["optimizer_steps"] == 18
