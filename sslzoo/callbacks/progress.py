"""Progress display: bars in a terminal, lines in a log file."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.table import Column

from sslzoo.callbacks.meter import find_meter
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.terminal import ERR, OUT, REFRESH, Bars, redraws

log = logging.getLogger(__name__)

LINE_EVERY = 60.0  # seconds between lines inside an epoch


class ProgressDisplay(Callback):
    """Shows loss, images/s, the time spent waiting for data, linear probe, k-NN and remaining time, on rank 0.

    If stderr is a terminal, it shows bars: epochs, and below them the steps of the epoch or the batches of an
    evaluation. If stdout is not a terminal, it prints one line at the end of each epoch, and one per minute in
    long epochs. The line of each epoch also goes to the log (``train.log``) in any case. Results of an earlier
    evaluation are shown with its epoch. With ``lines="json"`` there are no bars, and each line on stdout is an object.

    Reads values that Meter has reported. Before the first of them it shows the loss of this rank's last micro-batch,
    for which it waits when it draws, at most twice a second.
    """

    def __init__(
        self, *, lines: Literal["text", "json"] = "text", out: Console = OUT, err: Console = ERR
    ) -> None:
        self._json, self._out, self._err = lines == "json", out, err
        self._bars: Bars | None = None
        self._epochs = self._steps = TaskID(0)
        self._lines = False  # whether this process prints lines
        self._shown = self._printed = self._started = 0.0
        self._started_step = 0
        self._evaluated_step = 0  # number of finished optimiser steps at the last evaluation
        self._batches = self._all_batches = 0  # finished and total batches of the current evaluation

    # -- training -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the bars if there is a terminal."""
        self._started, self._started_step = time.perf_counter(), pl_module.optimizer_steps
        self._printed = self._started
        self._lines = trainer.is_global_zero and (self._json or not redraws(self._out))
        if trainer.is_global_zero and redraws(self._err) and not self._json:
            plan = pl_module.plan
            # Wide enough for the counts of steps and epochs, and of most evaluations.
            width = 2 * len(str(max(plan.max_epochs, plan.steps_per_epoch))) + 1
            count = MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right", min_width=width))
            self._bars = Bars(count, console=self._err, out=self._out)
            self._epochs = self._bars.add_task("epoch", total=plan.max_epochs, text="")
            self._steps = self._bars.add_task("step", total=plan.steps_per_epoch, text="")
            self._show_steps(trainer, pl_module)
            self._bars.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bars, at most every half second; print a line if the last one was more than a minute ago."""
        now = time.perf_counter()
        if self._bars is not None and now - self._shown >= REFRESH:
            self._show_steps(trainer, pl_module)
        if self._lines and now - self._printed >= LINE_EVERY:
            closes_epoch = pl_module.optimizer_steps % pl_module.plan.steps_per_epoch == 0
            if not closes_epoch:  # otherwise the line of the epoch comes next
                self._print_line(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log, and print if necessary, the line of the epoch."""
        if trainer.is_global_zero:
            log.info(self._line(trainer, pl_module))
            if self._lines:
                self._print_line(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Close the bars."""
        self._show_steps(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bars, so that the error is readable below them."""
        self._close()

    def _close(self) -> None:
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()

    # -- evaluation ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let the lower bar count batches."""
        self._batches, self._all_batches = 0, int(sum(trainer.num_val_batches))
        self._show_steps(trainer, pl_module)  # the upper bar does not change during the evaluation
        self._show_evaluation()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the lower bar. After the last batch, other callbacks measure before this one is called again."""
        self._batches += 1
        if self._batches == self._all_batches or time.perf_counter() - self._shown >= REFRESH:
            self._show_evaluation()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the step of the evaluation, and let the lower bar count steps again."""
        self._evaluated_step = pl_module.optimizer_steps
        self._show_steps(trainer, pl_module)

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step of the last evaluation, whose results are in Meter's state; equal on all ranks."""
        return {"evaluated_step": self._evaluated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step."""
        self._evaluated_step = state_dict["evaluated_step"]

    # -- display ------------------------------------------------------------------------------

    def _show_steps(self, trainer: Trainer, pl_module: Any) -> None:
        if self._bars is None:
            return
        self._shown = time.perf_counter()
        plan, step = pl_module.plan, pl_module.optimizer_steps
        top = _joined(self._time_left(pl_module), self._figures(trainer, pl_module))
        self._bars.show(self._epochs, completed=step / plan.steps_per_epoch, text=top)
        self._bars.show(
            self._steps,
            description="step",
            total=plan.steps_per_epoch,
            completed=step - max(0, _epoch_of(step, plan) - 1) * plan.steps_per_epoch,
            text=self._speed(trainer, pl_module),
        )

    def _show_evaluation(self) -> None:
        if self._bars is None:
            return
        self._shown = time.perf_counter()
        self._bars.show(
            self._steps,
            description="batch",
            total=self._all_batches,
            completed=self._batches,
            text="evaluating …" if self._batches < self._all_batches else "measuring …",
        )

    def _print_line(self, trainer: Trainer, pl_module: Any) -> None:
        self._printed = time.perf_counter()
        line = json.dumps(self._values(trainer, pl_module)) if self._json else self._line(trainer, pl_module)
        self._out.print(line, markup=False, highlight=False, soft_wrap=True)  # rich flushes

    def _values(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """What a line says, as numbers; without what is not known yet."""
        plan, step, latest = pl_module.plan, pl_module.optimizer_steps, self._latest(trainer, pl_module)
        values = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "epoch": _epoch_of(step, plan),
            "epochs": plan.max_epochs,
            "step": step,
            "steps": plan.total_steps,
            "loss": latest.get("train/loss"),
            "images_per_s": latest.get("sys/images_per_s"),
            "data_wait": latest.get("sys/data_wait"),
            "linear_top1": latest.get("val/linear_top1"),
            "knn_top1": latest.get("val/knn_top1"),
            "rankme": latest.get("repr/rankme"),
            "evaluated_epoch": _epoch_of(self._evaluated_step, plan) if self._evaluated_step else None,
            "seconds_left": self._seconds_left(pl_module),
        }
        return {name: value for name, value in values.items() if value is not None}

    def _line(self, trainer: Trainer, pl_module: Any) -> str:
        plan, step = pl_module.plan, pl_module.optimizer_steps
        return _joined(
            f"epoch {_fraction(_epoch_of(step, plan), plan.max_epochs)}",
            f"step {_fraction(step, plan.total_steps)}",
            self._speed(trainer, pl_module),
            self._figures(trainer, pl_module),
            self._time_left(pl_module),
        )

    def _speed(self, trainer: Trainer, pl_module: Any) -> str:
        shown = (
            ("train/loss", "loss {:.4f}", 1),
            ("sys/images_per_s", "{:.0f} images/s", 1),
            ("sys/data_wait", "{:.0f} % data wait", 100),
        )
        latest = self._latest(trainer, pl_module)
        return _joined(*(form.format(unit * latest[key]) for key, form, unit in shown if key in latest))

    def _latest(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        """Meter's values, and before its first row the loss, and the speed since the start."""
        latest = _latest(trainer)
        first: dict[str, float] = {}
        meter = find_meter(trainer)
        if "train/loss" not in latest and meter is not None and meter.loss is not None:
            first["train/loss"] = float(meter.loss)
        done = pl_module.optimizer_steps - self._started_step
        if "sys/images_per_s" not in latest and done > 0:
            passed = max(time.perf_counter() - self._started, 1e-6)
            first["sys/images_per_s"] = done * pl_module.plan.global_batch_size / passed
        return first | latest

    def _figures(self, trainer: Trainer, pl_module: Any) -> str:
        """Linear probe and k-NN, or the rank of the features without labels, with their epoch unless they were measured
        at this step."""
        shown = (("val/linear_top1", "probe {:.1f} %"), ("val/knn_top1", "k-NN {:.1f} %"))
        latest = _latest(trainer)
        figures = ", ".join(form.format(100 * latest[key]) for key, form in shown if key in latest)
        if not figures and "repr/rankme" in latest:
            figures = f"rank {latest['repr/rankme']:.1f} of {latest['repr/width']:.0f}"
        unknown = self._evaluated_step == 0  # resumed from a checkpoint without this information
        if not figures or unknown or self._evaluated_step == pl_module.optimizer_steps:
            return figures
        return f"{figures} (epoch {_epoch_of(self._evaluated_step, pl_module.plan)})"

    def _time_left(self, pl_module: Any) -> str:
        seconds = self._seconds_left(pl_module)
        if seconds is None:
            return ""
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def _seconds_left(self, pl_module: Any) -> int | None:
        done = pl_module.optimizer_steps - self._started_step
        left = pl_module.plan.total_steps - pl_module.optimizer_steps
        if done <= 0 or left <= 0:
            return None
        return round((time.perf_counter() - self._started) / done * left)


def _latest(trainer: Trainer) -> dict[str, float]:
    meter = find_meter(trainer)
    return meter.latest if meter is not None else {}


def _epoch_of(step: int, plan: TrainingPlan) -> int:
    """The epoch, from 1, of the last of ``step`` finished optimiser steps; 0 before the first step."""
    return -(-step // plan.steps_per_epoch)


def _fraction(done: int, total: int) -> str:
    return f"{done:>{len(str(total))}}/{total}"


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
