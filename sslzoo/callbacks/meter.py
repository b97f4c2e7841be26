"""Metrics without ``self.log``: sums on the device, one host-device synchronisation per interval, CSV files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sslzoo import pictures
from sslzoo.callbacks import histograms
from sslzoo.callbacks.metrics_file import MetricsFile
from sslzoo.distributed import all_reduce_mean, gather_detached, rank, world_size
from sslzoo.exits import Diverged
from sslzoo.nn.measurements import reported

log = logging.getLogger(__name__)

BINS = 64  # of histograms


class Follower:
    """Shows the metrics of a run elsewhere, on rank 0. Rows of ``metrics.csv`` are final once a checkpoint includes
    them; those after it are removed when the run is killed and continues."""

    def begin(self, rows: int) -> None:
        """The training starts; ``metrics.csv`` has ``rows`` rows, all of them final."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` were measured after ``step`` optimiser steps, and written to their file."""

    def saved(self, rows: int) -> None:
        """A checkpoint was written; the first ``rows`` rows are final."""

    def alert(self, title: str, text: str) -> None:
        """Something has happened that somebody should know at once."""


class Meter(Callback):
    """Writes what methods record to ``metrics.csv``, averaged over micro-batches and ranks.

    For a measurement (``record``) it reports the mean since the last row (of ratios and standard deviations, what
    follows from the mean), and the mean over the epoch's rows as ``<name>_epoch``; for a setting (``setting``, such as
    a learning rate) the last value. All ranks must record the same names. Rows are written every ``every_steps``
    optimiser steps and at the end of epochs; ``step`` is the number of finished optimiser steps. Throughput goes to
    ``system.csv``, so that ``metrics.csv`` contains no times and a resumed run writes identical bytes. Histograms go to
    ``histograms.jsonl``, one per line. Each of ``followers`` is told what was written; one that fails is told nothing
    more. Measurements of steps that the fp16 scaler skipped are dropped.

    If ``train/loss`` is not finite, :class:`Diverged` is raised on all ranks at the row that would report it.
    """

    def __init__(self, folder: Path, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self.followers: list[Follower] = []
        self.latest: dict[str, float] = {}  # last reported value by key, for the progress display
        self.loss: Tensor | None = None  # of this rank's last micro-batch
        self._folder = Path(folder)
        self._file = MetricsFile(self._folder / "metrics.csv")
        self._system = MetricsFile(self._folder / "system.csv")
        # Names and values of each micro-batch in the current step, and the number of steps finished before it.
        self._step: list[tuple[tuple[str, ...], Tensor]] = []
        self._counted = 0
        # This rank's sums since the last row, for each set of names that are recorded together, one after another.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], float] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._settings: dict[str, float] = {}
        self._epoch: dict[str, tuple[float, float]] = {}  # sum and count over the rows of this epoch
        self._row_step = 0
        self._accumulate = 1  # micro-batches per step
        self._restored: dict[str, Any] | None = None
        self._clock_step = 0
        self._mark: float | None = None  # time of the last batch boundary
        self._waited = self._elapsed = 0.0  # since the last row
        self._waited_before = 0.0  # the data module's figure at the last micro-batch

    # -- collecting ----------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Add the time that the loader took for this micro-batch to that of waiting for data."""
        waited = trainer.datamodule.waited
        if self._tick():
            self._waited += waited - self._waited_before
        self._waited_before = waited

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the values of this micro-batch; at the end of a step, add them up and write a row if one is due."""
        self._collect(pl_module.recorded)
        self._settings |= pl_module.settings
        self._tick()
        step = pl_module.optimizer_steps
        if step != self._counted:
            if not pl_module.step_skipped:
                self._add_step()
            self._step, self._counted = [], step
        if step != self._row_step and step % self.every_steps == 0:
            self._write_row(trainer, pl_module)

    def _collect(self, recorded: dict[str, Tensor]) -> None:
        if recorded:
            self.loss = recorded.get("train/loss")
            self._shapes |= {key: value.shape for key, value in recorded.items()}
            values = torch.cat([value.reshape(-1) for value in recorded.values()])
            self._step.append((tuple(recorded), values))
            recorded.clear()

    def _add_step(self) -> None:
        for keys, values in self._step:
            if keys in self._sums:
                self._sums[keys].add_(values)
            else:
                self._sums[keys] = values.to(_wide(values.device), copy=True)
            self._counts[keys] = self._counts.get(keys, 0) + 1

    # -- reporting -----------------------------------------------------------------------------

    def _reduced(self) -> dict[str, tuple[float, float]]:
        """Value since the last row, over all ranks, and count of every measurement.

        Needs one all-reduce and one copy to the host.
        """
        merged: dict[str, tuple[Tensor, float]] = {}
        if self._sums:
            names = [(key, count) for keys, count in self._counts.items() for key in keys]
            sums = all_reduce_mean(torch.cat(list(self._sums.values()))).cpu()
            parts = sums.split([self._shapes[key].numel() for key, _ in names])
            for (key, count), part in zip(names, parts, strict=True):
                total, others = merged.get(key, (torch.zeros(()), 0))
                merged[key] = total + part.view(self._shapes[key]), others + count
        return {key: (reported(total / count), count) for key, (total, count) in merged.items()}

    def _write_row(self, trainer: Trainer, pl_module: Any, *, epoch_end: bool = False) -> None:
        reduced = self._reduced()
        self._sums, self._counts = {}, {}
        self._row_step = pl_module.optimizer_steps
        values = {key: value for key, (value, _) in reduced.items()}
        for key, (value, count) in reduced.items():
            total, others = self._epoch.get(key, (0.0, 0))
            self._epoch[key] = total + value * count, others + count
        if values:
            values |= self._settings
        if epoch_end:
            values |= {f"{key}_epoch": total / count for key, (total, count) in self._epoch.items()}
            self._epoch = {}
        self.write(trainer, values)
        self._log_system(trainer, pl_module)
        _stop_if_diverged(reduced, self._row_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a row with the rest of the interval and the means over the epoch."""
        self._write_row(trainer, pl_module, epoch_end=True)
        self.restart_clock()

    def write(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write ``values``, equal on all ranks, as one row for the current number of finished optimiser steps."""
        values = {key: float(value) for key, value in values.items()}
        if values:
            self.latest |= values
            self._file.append(_step(trainer), trainer.current_epoch, values)
            self._tell("add", _step(trainer), values)

    def write_histogram(self, name: str, values: Tensor, *, step: int) -> None:
        """Write a histogram of ``values``, of any shape, equal on all ranks. Those that are not finite are left out."""
        if not self._file.writes:
            return
        values = values.detach().float().cpu().flatten()
        values = values[values.isfinite()]
        if not len(values):
            return
        counts, edges = torch.histogram(values, BINS)
        histogram = histograms.Histogram(
            name=name, step=step, counts=counts.int().tolist(), edges=edges.tolist()
        )
        histograms.append(self._folder, histogram)

    def _log_system(self, trainer: Trainer, pl_module: Any) -> None:
        steps = pl_module.optimizer_steps - self._clock_step
        if self._elapsed > 0 and steps > 0:
            values = {
                "sys/images_per_s": steps * pl_module.plan.global_batch_size / self._elapsed,
                "sys/data_wait": self._waited / self._elapsed,
            }
            if pl_module.device.type == "cuda":
                values["sys/gpu_mem"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            self.latest |= values
            self._system.append(pl_module.optimizer_steps, trainer.current_epoch, values)
            self._tell("add", _step(trainer), values)
        self._clock_step = pl_module.optimizer_steps
        self._waited = self._elapsed = 0.0

    def saved(self) -> None:
        """Tell the followers that a checkpoint includes everything that was written so far."""
        self._tell("saved", self._file.rows)

    def alert(self, title: str, text: str) -> None:
        """Tell the followers something that somebody should know at once."""
        self._tell("alert", title, text)

    def _tell(self, event: Literal["begin", "add", "saved", "alert"], *arguments: Any) -> None:
        for follower in list(self.followers):
            try:
                getattr(follower, event)(*arguments)
            except Exception as error:  # a dashboard must never end a run
                self.followers.remove(follower)
                log.warning("%s failed and gets no further values: %s", type(follower).__name__, error)

    def check_finite(self, trainer: Trainer) -> None:
        """Raise :class:`Diverged` on all ranks if ``train/loss`` has diverged since the last row."""
        _stop_if_diverged(self._reduced(), _step(trainer))

    # -- the clock -----------------------------------------------------------------------------

    def _tick(self) -> float:
        now = time.perf_counter()
        passed = now - self._mark if self._mark is not None else 0.0
        self._elapsed += passed
        self._mark = now
        return passed

    def restart_clock(self) -> None:
        """Exclude the time since the last micro-batch (a save or an evaluation) from the throughput."""
        self._mark = None

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Exclude the evaluation from the training time."""
        self.restart_clock()

    # -- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks, and the columns and row count of the file. Collective if there are sums; all ranks
        save."""
        self._file.sync()
        sums: list[list[float]] = [[] for _ in range(world_size())]
        if self._sums:  # either on all ranks or on none
            gathered = gather_detached(torch.cat(list(self._sums.values())))
            sums = gathered.cpu().view(world_size(), -1).tolist()
        return {
            "accumulate": self._accumulate,
            "keys": [list(keys) for keys in self._sums],
            "shapes": {key: list(self._shapes[key]) for keys in self._sums for key in keys},
            "counts": list(self._counts.values()),
            "sums": sums,
            "settings": dict(self._settings),
            "epoch": dict(self._epoch),
            "row_step": self._row_step,
            "latest": {key: value for key, value in self.latest.items() if not key.startswith("sys/")},
            "columns": list(self._file.columns),
            "rows": self._file.rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the device is known, in :meth:`on_train_start`."""
        self._restored = state_dict
        self.latest = dict(state_dict["latest"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the files, truncated to the checkpoint's rows or empty, and delete histograms and pictures of later
        steps; then the followers may read them."""
        self._file.writes = self._system.writes = trainer.is_global_zero
        if trainer.is_global_zero:  # only here, so that a directory deleted later is not created again
            self._file.path.parent.mkdir(parents=True, exist_ok=True)
        state, self._restored = self._restored, None
        self._accumulate = pl_module.plan.accumulate
        self._clock_step = self._counted = pl_module.optimizer_steps
        self._system.resume()
        if state is None:
            self._file.rewind(0, ["step", "epoch"])
        else:
            self._file.rewind(state["rows"], state["columns"])
            self._restore(state, pl_module)
        if trainer.is_global_zero:
            histograms.delete_after(self._folder, pl_module.optimizer_steps)
            pictures.delete_after(self._folder, pl_module.optimizer_steps)
        self._tell("begin", self._file.rows)

    def _restore(self, state: Mapping[str, Any], pl_module: Any) -> None:
        """Take up sums and settings of the checkpoint."""
        # A step counts as one value per micro-batch, of which it may have had another number.
        factor = self._accumulate / state.get("accumulate", self._accumulate)
        self._settings = dict(state["settings"])
        self._epoch = {
            key: (total * factor, count * factor) for key, (total, count) in state["epoch"].items()
        }
        self._row_step = state["row_step"]
        by_rank = torch.tensor(state["sums"], dtype=torch.float64)
        sums = by_rank[rank()] if len(by_rank) == world_size() else by_rank.mean(0)
        sums = (sums * factor).to(pl_module.device, _wide(pl_module.device))
        self._shapes = {key: torch.Size(shape) for key, shape in state["shapes"].items()}
        lengths = [sum(self._shapes[key].numel() for key in keys) for keys in state["keys"]]
        for keys, count, part in zip(state["keys"], state["counts"], sums.split(lengths), strict=True):
            self._sums[tuple(keys)] = part.clone()
            self._counts[tuple(keys)] = count * factor

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Close the files."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the files, because Lightning calls no teardown hook after an exception."""
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._system.close()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _stop_if_diverged(reduced: Mapping[str, tuple[float, float]], step: int) -> None:
    loss, _ = reduced.get("train/loss", (0.0, 1))
    if not math.isfinite(loss):
        raise Diverged(f"train/loss is {loss} by step {step}")


def _step(trainer: Any) -> int:
    return trainer.lightning_module.optimizer_steps


def find_meter(trainer: Any) -> Meter | None:
    """The trainer's meter, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, Meter)), None)


def log_metrics(trainer: Any, values: Mapping[str, float]) -> None:
    """Report ``values`` (``{"val/linear_top1": 0.8}``), equal on all ranks, while ``trainer.fit`` runs.

    All ranks must call it. They become one row of ``metrics.csv`` and reach dashboards and the
    progress display.
    """
    meter = find_meter(trainer)
    if meter is None:
        raise ValueError("metrics need a Meter: add sslzoo.callbacks.meter.Meter to the trainer's callbacks")
    meter.write(trainer, values)


def log_histogram(trainer: Any, name: str, values: Tensor, *, step: int) -> None:
    """Log a histogram of ``values``, of any shape and equal on all ranks, after ``step`` optimiser steps."""
    meter = find_meter(trainer)
    if meter is not None:
        meter.write_histogram(name, values, step=step)
