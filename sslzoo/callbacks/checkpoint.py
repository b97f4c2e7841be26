"""Checkpoints from which a run continues bit by bit, in files that are never half written."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer

from sslzoo.callbacks.meter import find_meter
from sslzoo.callbacks.position import window_closed
from sslzoo.config import require

KEEP_LAST = 2  # should the newest be damaged by the disk, the one before it is still there
_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")


def checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in ``folder``, oldest first. Half-written ``.part`` files do not count."""
    found = [(int(m[1]), p) for p in Path(folder).glob("step=*.ckpt") if (m := _STEP_FILE.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, or None: what ``--resume auto`` takes."""
    return next(reversed(checkpoints(folder)), None)


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of ``path``. A damaged file raises ``ValueError`` that names the one to use instead."""
    path = Path(path)
    require(path.is_file(), f"there is no checkpoint {path}; see {path.parent} for those there are")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        number = int(m[1]) if (m := _STEP_FILE.fullmatch(path.resolve().name)) else None
        older = [p for p in checkpoints(path.parent) if number is None or p.name < f"step={number:09d}.ckpt"]
        older = [p for p in older if p != path.resolve()]
        advice = f"resume from the one before it: --resume {older[-1]}" if older else "no older one is left"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path} is truncated or damaged ({reason}); {advice}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(CheckpointIO):
    """Writes ``X.part`` beside ``X``, forces it to disk, and renames it: ``X`` is whole or absent.

    Lightning's own stages the file in ``$TMPDIR``; on another file system its move is a copy, and a
    kill leaves a damaged checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; errors of the file system are raised, never swallowed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As :func:`load_checkpoint`; only tensors and plain types are ever unpickled."""
        return load_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete ``path`` if it is there."""
        Path(path).unlink(missing_ok=True)


class ExactCheckpoint(Callback):
    """Saves ``step=….ckpt`` every ``every_steps`` optimiser steps, at epoch ends and at the end.

    A save happens at the *start* of the next micro-batch: then the last step's hooks, validation, epoch
    end and logging are over and no gradient is half accumulated. Stands right after ``Position``.
    Keeps the last two files, those of ``keep_epochs`` as ``epoch=….ckpt`` (epochs finished), and
    ``last.ckpt``, a link to the newest.
    """

    def __init__(self, folder: Path, *, every_steps: int, keep_epochs: tuple[int, ...] = ()) -> None:
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.keep_epochs = keep_epochs
        self.saved_step = 0  # in the checkpoint: else a resumed run would save in the middle of a window

    def state_dict(self) -> dict[str, Any]:
        """The step of the last save."""
        return {"saved_step": self.saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.saved_step = state_dict["saved_step"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Going back to an older checkpoint discards the newer ones, as it discards their metrics."""
        if trainer.is_global_zero:
            for path in checkpoints(self.folder):
                if path.name > self._name(pl_module.optimizer_steps):
                    path.unlink()
            for part in self.folder.glob("*.part"):
                part.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save what the previous micro-batch completed, when due."""
        step = pl_module.optimizer_steps
        due = step % self.every_steps == 0 or step % pl_module.plan.steps_per_epoch == 0
        if step != self.saved_step and due and window_closed(trainer, pl_module):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the finished run."""
        if pl_module.optimizer_steps != self.saved_step:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> Path:
        """Save now; every rank must call it, with no window open. Returns the file."""
        step = pl_module.optimizer_steps
        path = self.folder / self._name(step)
        meter = find_meter(trainer)
        if meter is not None:
            meter.check_finite(trainer)  # never replace a good checkpoint by one that has diverged
        self.saved_step = step
        trainer.save_checkpoint(path, weights_only=False)  # the whole state, not only the weights
        if trainer.is_global_zero:
            self._link(path, step, pl_module.plan.steps_per_epoch)
        if meter is not None:
            meter.restart_clock()
        return path

    def _link(self, path: Path, step: int, steps_per_epoch: int) -> None:
        epoch, rest = divmod(step, steps_per_epoch)
        if rest == 0 and epoch in self.keep_epochs:
            kept = self.folder / f"epoch={epoch:05d}.ckpt"
            part = kept.with_name(kept.name + ".part")
            part.unlink(missing_ok=True)
            try:
                os.link(path, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, part)
            part.replace(kept)
        link = self.folder / "last.ckpt.part"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # a file system without symbolic links; resuming goes by step, not by this name
            pass
        else:
            link.replace(self.folder / "last.ckpt")
        for old in checkpoints(self.folder)[:-KEEP_LAST]:
            old.unlink()
        _sync_folder(self.folder)

    @staticmethod
    def _name(step: int) -> str:
        return f"step={step:09d}.ckpt"

