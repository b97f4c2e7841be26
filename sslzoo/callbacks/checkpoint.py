"""Checkpoints from which a run continues bit-identically."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from sslzoo.callbacks.meter import find_meter
from sslzoo.callbacks.seeding import window_closed
from sslzoo.checkpoints import checkpoints, sync_folder
from sslzoo.recipe.plan import TrainingPlan

KEEP_LAST = 2  # so that there is another one if the newest is damaged


class ExactCheckpoint(Callback):
    """Saves ``step=….ckpt`` every ``every_steps`` optimiser steps, at the end of epochs and of the run.

    Files are saved at the *start* of the next micro-batch, when all hooks of the last step, validation, end of
    epoch and logging are finished and no accumulation of gradients is in progress.
    Keeps the last two files, those of ``keep_epochs`` as ``epoch=….ckpt`` (number of finished epochs), and
    ``last.ckpt``, a link to the newest.

    If an evaluation follows an epoch (every ``evaluate_every_epochs``, and after the last), the end of the epoch
    is only saved after the evaluation, which may take long. Therefore another file is saved before the last step
    of the epoch, so that a run killed or signalled during the evaluation loses only that step.

    Each file contains the ``recipe`` (as YAML), and the ``manifest`` once that is set, so that it can be identified
    outside of its folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recipe: str,
        every_steps: int,
        evaluate_every_epochs: int,
        keep_epochs: tuple[int, ...] = (),
    ) -> None:
        self.folder = Path(folder)
        self.recipe = recipe
        self.manifest: dict[str, Any] | None = None  # set on rank 0 once the manifest is written
        self.every_steps = every_steps
        self.evaluate_every_epochs = evaluate_every_epochs
        self.keep_epochs = keep_epochs
        self.saved_step = 0  # also in checkpoints, so that a resumed run does not save the same step again

    def state_dict(self) -> dict[str, Any]:
        """The step of the last save."""
        return {"saved_step": self.saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step."""
        self.saved_step = state_dict["saved_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add recipe and manifest, and how the images of a step were divided."""
        checkpoint["recipe"] = self.recipe
        checkpoint["manifest"] = self.manifest
        checkpoint["division"] = asdict(pl_module.plan.division)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Correct Lightning's counts of micro-batches if their number per step is another one now."""
        before = checkpoint.get("division", {}).get("micro_batches", pl_module.plan.accumulate)
        now = pl_module.plan.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            steps = progress[part]["completed"] // before  # files are written between two steps
            progress[part] = {name: n + (now - before) * steps for name, n in progress[part].items()}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Delete checkpoints newer than the one resumed from, as their metrics are deleted too."""
        if trainer.is_global_zero:
            for path in checkpoints(self.folder):
                if path.name > self._name(pl_module.optimizer_steps):
                    path.unlink()
            for part in self.folder.glob("*.part"):
                part.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save the step completed by the previous micro-batch if a save is due."""
        step = pl_module.optimizer_steps
        due = step % self.every_steps == 0 or step % pl_module.plan.steps_per_epoch == 0
        due = due or self._evaluation_follows(step, pl_module.plan)
        if step != self.saved_step and due and window_closed(trainer, pl_module):
            self.save(trainer, pl_module)

    def _evaluation_follows(self, step: int, plan: TrainingPlan) -> bool:
        """Whether ``step``, from 0, is the last step of an epoch that is followed by an evaluation."""
        finished, rest = divmod(step + 1, plan.steps_per_epoch)
        return not rest and (finished % self.evaluate_every_epochs == 0 or finished == plan.max_epochs)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the finished run."""
        if pl_module.optimizer_steps != self.saved_step:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> Path:
        """Save now and return the path. All ranks must call it, with no accumulation of gradients in progress."""
        step = pl_module.optimizer_steps
        path = self.folder / self._name(step)
        meter = find_meter(trainer)
        if meter is not None:
            meter.check_finite(trainer)  # do not replace a good checkpoint after divergence
        self.saved_step = step
        trainer.save_checkpoint(path, weights_only=False)  # the full state
        if trainer.is_global_zero:
            self._link(path, step, pl_module.plan.steps_per_epoch)
        if meter is not None:
            meter.saved()
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
                self._copy(path, part)
            part.replace(kept)
        link = self.folder / "last.ckpt.part"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # a file system without symbolic links; resuming does not need the link
            pass
        else:
            link.replace(self.folder / "last.ckpt")
        for old in checkpoints(self.folder)[:-KEEP_LAST]:
            old.unlink()
        sync_folder(self.folder)

    @staticmethod
    def _copy(path: Path, part: Path) -> None:
        try:
            shutil.copyfile(path, part)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @staticmethod
    def _name(step: int) -> str:
        return f"step={step:09d}.ckpt"
