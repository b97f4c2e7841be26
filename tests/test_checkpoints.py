"""Checkpoint files: whole or absent, chosen by step, recognised when damaged, and clear about what is wrong."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    MissingCheckpoint,
    UnsafeCheckpoint,
    checkpoints,
    latest,
    load_checkpoint,
    newest_sound,
    set_aside,
    verify_checkpoint,
)
from sslzoo.testing.kills import Fault, digest, run, start, wait
from tests.chaos import tiny_job

CONTENT: dict[str, Any] = {
    "state_dict": {
        "weight": torch.arange(200.0),
        "zeros": torch.zeros(64, dtype=torch.int64),
        "half": torch.ones(5, 3, dtype=torch.float16),
    },
    "optimizer_steps": 7,
    "callbacks": {"Meter": {"rows": 3, "columns": ["step", "epoch"], "epoch": {"a": (0.5, 2)}}},
}


def _write(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step={step:09d}.ckpt" for step in steps]
    for path in paths:
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return paths


def _refused(path: Path, kind: type[CheckpointError], said: str) -> None:
    """Refused by class, in one line, by everything that reads a checkpoint."""
    for read in (verify_checkpoint, load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(kind, match=said) as refusal:
            read(path)
        assert type(refusal.value) is kind
        assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def test_latest_goes_by_step_and_skips_half_written_files(tmp_path):
    assert latest(tmp_path) is None
    older, newer = _write(tmp_path, 9, 10)
    os.utime(older, (2e9, 2e9))
    (tmp_path / "step=000000011.ckpt.part").write_bytes(b"half")
    (tmp_path / "last.ckpt").symlink_to(older.name)
    assert latest(tmp_path) == newer
    assert checkpoints(tmp_path) == [older, newer]


# -- damage -------------------------------------------------------------------------------------


def test_a_damaged_file_names_the_one_before_it(tmp_path):
    older, newer = _write(tmp_path, 5, 10)
    (tmp_path / "last.ckpt").symlink_to(newer.name)
    os.truncate(newer, 700)
    for path in (newer, tmp_path / "last.ckpt"):
        _refused(path, DamagedCheckpoint, rf"damaged .*--resume {older}$")
    os.truncate(older, 0)
    _refused(older, DamagedCheckpoint, "there is no older one")


def test_any_truncation_is_recognised(tmp_path):
    (path,) = _write(tmp_path, 1)
    whole = path.read_bytes()
    for length in (*range(64), *range(64, len(whole), 97), *range(len(whole) - 64, len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(path)
    for length in range(0, len(whole) - 64, 97):  # of the right length, with blocks that were never written
        path.write_bytes(whole[:length] + bytes(len(whole) - length))
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(path)


def _spans(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first and last byte of each record's content."""
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            at = record.header_offset
            name, extra = (int.from_bytes(raw[at + k : at + k + 2], "little") for k in (26, 28))
            first = at + 30 + name + extra
            yield record.filename, first, first + record.file_size - 1


def _flip(path: Path, whole: bytes, position: int, bit: int) -> None:
    changed = bytearray(whole)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)


def test_a_flipped_bit_in_any_record_is_recognised(tmp_path):
    (path,) = _write(tmp_path, 1)
    whole, spans = path.read_bytes(), list(_spans(path))
    assert {"data.pkl", "0", "1", "2"} <= {name.rpartition("/")[2] for name, _, _ in spans}
    for _, first, last in spans:
        for position in (first, last):
            _flip(path, whole, position, 3)
            with pytest.raises(DamagedCheckpoint, match="Bad CRC-32"):
                verify_checkpoint(path)


def test_a_record_marked_as_a_folder_is_recognised(tmp_path):
    """Torch would return memory that it never filled; the CRC-32 says nothing about it."""
    (path,) = _write(tmp_path, 1)
    whole, at = path.read_bytes(), -1
    for _ in range(whole.count(b"PK\x01\x02")):
        at = whole.index(b"PK\x01\x02", at + 1)
        _flip(path, whole, at + 38, 4)
        with pytest.raises(DamagedCheckpoint, match="marked as a folder"):
            verify_checkpoint(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_flipped_bit_is_recognised_or_changes_nothing(seed, tmp_path):
    (path,) = _write(tmp_path, 1)
    whole, expected, draw = path.read_bytes(), digest(CONTENT), random.Random(seed)
    recognised = 0
    for _ in range(200):
        _flip(path, whole, draw.randrange(len(whole)), draw.randrange(8))
        try:
            content = load_checkpoint(path)
        except DamagedCheckpoint:
            recognised += 1
        else:
            assert digest(content) == expected
    assert recognised > 100  # the others hit padding, times and second copies of the names


def test_a_bad_sector_is_damage_and_a_missing_permission_is_not(tmp_path, monkeypatch):
    (path,) = _write(tmp_path, 1)

    def unreadable(number: int) -> Callable[..., Any]:
        def read(*_: Any, **__: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return read

    monkeypatch.setattr(zipfile.ZipExtFile, "read", unreadable(errno.EIO))
    _refused(path, DamagedCheckpoint, "Input/output error")
    monkeypatch.setattr(Path, "open", unreadable(errno.EACCES))
    _refused(path, CheckpointError, "cannot be read: Permission denied; fix that and try again")


# -- other files --------------------------------------------------------------------------------


def test_a_missing_file_names_the_newest_there_is(tmp_path):
    _refused(tmp_path / "x.ckpt", MissingCheckpoint, "there is no checkpoint .*; give a step")
    _write(tmp_path, 3, 4)
    (tmp_path / "last.ckpt").symlink_to("step=000000009.ckpt")
    _refused(tmp_path / "last.ckpt", MissingCheckpoint, "the newest in that folder is step=000000004.ckpt")
    _refused(tmp_path / "no" / "where.ckpt", MissingCheckpoint, "there is no checkpoint")


def _legacy(path: Path) -> None:
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.arange(5))


def _torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"net/{name}", b"\x80\x02}.")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(300)), "not a torch file"),
        (lambda path: path.write_text("step,epoch\n1,0\n"), "not a torch file"),
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), "a pickle, or a torch file"),
        (_legacy, "a pickle, or a torch file in an old format"),
        (_numpy, "a zip archive of another kind"),
        (_torchscript, "a zip archive of another kind"),
        (lambda path: torch.save({"model": {}, "epoch": 3}, path), "no state_dict and no optimizer_steps"),
        (lambda path: torch.save({"state_dict": {}, "epoch": 3}, path), "it has no optimizer_steps"),
        (lambda path: torch.save({"state_dict": 1, "optimizer_steps": 3}, path), "it has no state_dict"),
        (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
    ],
    ids=[
        "jpeg",
        "text",
        "folder",
        "fifo",
        "pickle",
        "legacy",
        "numpy",
        "torchscript",
        "weights",
        "lightning",
        "types",
        "tensor",
    ],
)
def test_a_foreign_file_is_no_checkpoint(make, said, tmp_path):
    path = tmp_path / "step=000000001.ckpt"
    make(path)
    _refused(path, ForeignCheckpoint, f"is not an sslzoo checkpoint .*{said}.*; give a step")


class _Hostile:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("call", "name"), [(os.system, "posix.system"), (eval, "builtins.eval"), (Path, "pathlib.Path")]
)
def test_a_checkpoint_that_names_code_is_refused_and_never_run(protocol, call, name, tmp_path):
    path, trace = tmp_path / "step=000000001.ckpt", tmp_path / "trace"
    argument = f"open({str(trace)!r}, 'w')" if call is eval else f"touch {trace}"
    content = CONTENT | {"hyper_parameters": _Hostile(call, argument)}
    torch.save(content, path, pickle_protocol=protocol)
    found = "__builtin__.eval" if call is eval and protocol == 0 else name
    _refused(path, UnsafeCheckpoint, rf"is refused: it asks for .*({name}|{found})")
    with pytest.raises(UnsafeCheckpoint) as refusal:
        load_checkpoint(path)
    for advice in ("weights_only", "safe_globals", "arbitrary", "allow"):
        assert advice not in str(refusal.value)
    assert refusal.value.__cause__ is None and refusal.value.__suppress_context__
    assert not trace.exists()


def test_a_pickle_that_cannot_be_rebuilt_is_refused(tmp_path):
    path = tmp_path / "step=000000001.ckpt"
    torch.save(CONTENT | {"x": _Hostile(torch.device, "no such device")}, path)
    _refused(path, UnsafeCheckpoint, "its pickle was not written by torch.save")


def test_names_in_a_hostile_pickle_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "step=000000001.ckpt"
    names = b"".join(b"cposix\n\x1b[31mname%d\n0" % k for k in range(9))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + names + b"}.")
        archive.writestr("archive/version", b"3\n")
    _refused(path, UnsafeCheckpoint, r"posix\.\?\[31mname0, .*more, and an sslzoo checkpoint")


# -- the newest sound one -----------------------------------------------------------------------


def test_newest_sound_skips_damage_and_names_it(tmp_path, caplog):
    assert newest_sound(tmp_path) is None
    first, second, third = _write(tmp_path, 1, 2, 3)
    assert newest_sound(tmp_path) == third and not caplog.records
    os.truncate(third, 0)
    _flip(second, second.read_bytes(), next(_spans(second))[1], 0)
    with caplog.at_level(logging.WARNING):
        assert newest_sound(tmp_path) == first
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    for record, worse in zip(caplog.records, (third, second), strict=True):
        assert str(worse) in record.message and str(first) in record.message
    assert third.exists()

    os.truncate(first, 9)
    with pytest.raises(DamagedCheckpoint, match=r"every step checkpoint in .*start a new run") as refusal:
        newest_sound(tmp_path)
    assert "\n" not in str(refusal.value)
    (tmp_path / "epoch=00002.ckpt").touch()
    with pytest.raises(DamagedCheckpoint, match=f"try --resume {tmp_path / 'epoch=00002.ckpt'}"):
        newest_sound(tmp_path)


def test_newest_sound_refuses_what_is_not_ours(tmp_path):
    _write(tmp_path, 1)
    (tmp_path / "step=000000002.ckpt").write_text("notes")
    with pytest.raises(ForeignCheckpoint, match="not a torch file"):
        newest_sound(tmp_path)
    torch.save(_Hostile(os.system, "true"), tmp_path / "step=000000003.ckpt")
    with pytest.raises(UnsafeCheckpoint, match=r"posix\.system"):
        newest_sound(tmp_path)


def test_set_aside_overwrites_nothing(tmp_path):
    for count in range(3):
        (path,) = _write(tmp_path, 4)
        path.write_text(str(count))
        set_aside(path)
        assert not path.exists()
    names = [f"step=000000004.ckpt.damaged{suffix}" for suffix in ("", ".1", ".2")]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]
    assert checkpoints(tmp_path) == []


# -- writing ------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _untouched(path: Path, before: bytes) -> None:
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, full_disk):
    (path,) = _write(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(OSError, match=rf"checkpoint not written: File too large.*{path}"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": torch.zeros(10**6)}, path)
    _untouched(path, before)


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.open", "pathlib.Path.replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_write_leaves_the_old_file_alone(where, number, tmp_path, monkeypatch):
    (path,) = _write(tmp_path, 1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, _raise(OSError(number, os.strerror(number))))
        with pytest.raises(OSError, match=str(path)) as failure:
            AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert failure.value.errno == number
    _untouched(path, before)


@pytest.mark.parametrize("leaving", [SystemExit(75), KeyboardInterrupt()], ids=["exit", "interrupt"])
@pytest.mark.parametrize("inside", ["pickling", "writing"])
def test_leaving_while_writing_leaves_no_part(leaving, inside, tmp_path, monkeypatch):
    """Torch's writer hides an exception that is raised while it writes behind one of its own."""
    (path,) = _write(tmp_path, 1)
    before, content = path.read_bytes(), CONTENT | {"big": torch.zeros(10**6)}
    if inside == "pickling":
        content["last"] = type("Leaving", (), {"__reduce__": _raise(leaving)})()
    else:
        save = torch.save
        stuck: Any = SimpleNamespace(write=_raise(leaving), flush=lambda: None)
        monkeypatch.setattr(torch, "save", lambda value, file: save(value, stuck))
    with pytest.raises(type(leaving)):
        AtomicCheckpointIO().save_checkpoint(content, path)
    _untouched(path, before)


def test_what_cannot_be_pickled_leaves_the_old_file_alone(tmp_path):
    (path,) = _write(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"unpicklable": lambda: 0}, path)
    _untouched(path, before)


def test_a_deleted_run_directory_is_not_made_again(tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoints" / "step=000000001.ckpt"
    with pytest.raises(FileNotFoundError, match=rf"run directory is gone.*{path}"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert path.exists()

    def deleted(descriptor: int) -> None:
        path.unlink()
        part.unlink()
        path.parent.rmdir()
        path.parent.parent.rmdir()

    part = path.with_name(path.name + ".part")
    monkeypatch.setattr(os, "fsync", deleted)
    with pytest.raises(FileNotFoundError, match="run directory is gone"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)


# -- when ---------------------------------------------------------------------------------------


def _saves(
    *,
    steps_per_epoch: int = 6,
    every_steps: int = 1000,
    evaluate: int = 1,
    accumulate: int = 1,
    resume: int = 0,
) -> list[int]:
    """The steps at which three epochs are saved."""
    saved: list[int] = []

    class Noted(ExactCheckpoint):
        def save(self, trainer: Any, pl_module: Any) -> Path:
            assert trainer.datamodule.position == accumulate * pl_module.optimizer_steps
            self.saved_step = pl_module.optimizer_steps
            saved.append(self.saved_step)
            return self.folder

    callback = Noted(Path(), recipe="", every_steps=every_steps, evaluate_every_epochs=evaluate)
    plan = SimpleNamespace(steps_per_epoch=steps_per_epoch, max_epochs=3, accumulate=accumulate)
    data = SimpleNamespace(position=0)
    trainer: Any = SimpleNamespace(datamodule=data)
    module = SimpleNamespace(plan=plan, optimizer_steps=0)
    callback.saved_step = resume
    for position in range(accumulate * resume, accumulate * 3 * steps_per_epoch):
        data.position, module.optimizer_steps = position, position // accumulate
        callback.on_train_batch_start(trainer, module, None, 0)
    data.position, module.optimizer_steps = accumulate * 3 * steps_per_epoch, 3 * steps_per_epoch
    callback.on_train_end(trainer, module)
    return saved


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5, 6, 11, 12, 17, 18]),
        ({"accumulate": 3}, [5, 6, 11, 12, 17, 18]),
        ({"evaluate": 2}, [6, 11, 12, 17, 18]),
        ({"evaluate": 100}, [6, 12, 17, 18]),  # after the last epoch in any case
        ({"every_steps": 5}, [5, 6, 10, 11, 12, 15, 17, 18]),
        ({"resume": 5}, [6, 11, 12, 17, 18]),  # that one is there
        ({"steps_per_epoch": 1}, [1, 2, 3]),
        ({"steps_per_epoch": 2}, [1, 2, 3, 4, 5, 6]),
        ({"every_steps": 1}, list(range(1, 19))),
    ],
    ids=str,
)
def test_an_evaluation_has_a_checkpoint_shortly_before_it(options, expected):
    assert _saves(**options) == expected


def test_a_kill_while_evaluating_costs_one_step(tmp_path):
    wait(start(tiny_job(), tmp_path, Fault("validation", 6)))
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")][-1] == "step=000000005.ckpt"


def test_a_run_keeps_the_last_two_and_the_epochs_asked_for(tmp_path):
    run(tiny_job(), tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "epoch=00002.ckpt",
        "last.ckpt",
        "step=000000017.ckpt",
        "step=000000018.ckpt",
    ]
    assert (folder / "last.ckpt").readlink() == Path("step=000000018.ckpt")
    assert load_checkpoint(folder / "epoch=00002.ckpt")["optimizer_steps"] == 12
    assert load_checkpoint(folder / "last.ckpt")["optimizer_steps"] == 18
