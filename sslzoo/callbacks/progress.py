"""What a person sees while a run goes on: a live display in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sslzoo.callbacks.meter import find_meter

log = logging.getLogger(__name__)

REFRESH = 0.5  # seconds between updates of the bars


class ProgressDisplay(Callback):
    """Epoch and step bars with loss, images/s, online probe accuracy and time left, on rank 0.

    Reads only what the meter reported, so it costs no synchronisation. Stands after the meter. The
    line of each epoch goes to the log, hence to ``train.log``, in every case.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._epochs = self._steps = TaskID(0)
        self._shown = self._started = 0.0
        self._started_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the display, in a terminal."""
        self._started, self._started_step = time.perf_counter(), pl_module.optimizer_steps
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        plan = pl_module.plan
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._live = Progress(*columns, console=self._console, refresh_per_second=2)
        self._epochs = self._live.add_task("epoch", total=plan.max_epochs, text="")
        self._steps = self._live.add_task("step", total=plan.steps_per_epoch, text="")
        self._live.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bars, at most every half second."""
        if self._live is None or time.perf_counter() - self._shown < REFRESH:
            return
        self._shown = time.perf_counter()
        step = pl_module.optimizer_steps
        epoch, within = divmod(step, pl_module.plan.steps_per_epoch)
        self._live.update(self._epochs, completed=epoch, text=self._time_left(pl_module))
        self._live.update(self._steps, completed=within, text=self._numbers(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """One line for the log."""
        if trainer.is_global_zero:
            plan = pl_module.plan
            parts = (
                f"epoch {trainer.current_epoch + 1}/{plan.max_epochs}",
                f"step {pl_module.optimizer_steps}",
                self._numbers(trainer),
                self._time_left(pl_module),
            )
            log.info("  ".join(part for part in parts if part))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Close the display."""
        if self._live is not None:
            plan = pl_module.plan
            self._live.update(self._epochs, completed=plan.max_epochs, text="")
            self._live.update(self._steps, completed=plan.steps_per_epoch, text=self._numbers(trainer))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the display, so that the error is readable."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _numbers(self, trainer: Trainer) -> str:
        meter = find_meter(trainer)
        latest = meter.latest if meter is not None else {}
        shown = (
            ("train/loss", "loss {:.4f}"),
            ("sys/images_per_s", "{:.0f} images/s"),
            ("val/linear_top1", "probe {:.1%}"),
            ("val/knn_top1", "k-NN {:.1%}"),
        )
        return "  ".join(form.format(latest[key]) for key, form in shown if key in latest)

    def _time_left(self, pl_module: Any) -> str:
        done = pl_module.optimizer_steps - self._started_step
        left = pl_module.plan.total_steps - pl_module.optimizer_steps
        if done <= 0 or left <= 0:
            return ""
        seconds = round((time.perf_counter() - self._started) / done * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
