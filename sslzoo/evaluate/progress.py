"""Progress of an evaluation: a bar in a terminal, otherwise a line at the start and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import TaskID, TextColumn
from torch.utils.data import DataLoader

from sslzoo.terminal import ERR, OUT, REFRESH, Bars, duration, redraws

Report = Callable[[float], None]  # called with the finished fraction of a stage


def unseen(fraction: float) -> None:
    """A :data:`Report` that does nothing."""


def reported(loader: DataLoader[Any], report: Report) -> Iterator[Any]:
    """Yield the batches of ``loader``, and report each batch when the next one is requested."""
    for done, batch in enumerate(loader, 1):
        yield batch
        report(done / len(loader))


class EvaluationProgress:
    """Shows stages of equal weight if ``shown``, under a ``title``; silent by default.

    Use it as a context manager. It does not synchronise with the device: on a GPU, the bar shows submitted work.
    """

    def __init__(
        self,
        *,
        shown: bool = False,
        title: str = "final evaluation",
        out: Console = OUT,
        err: Console = ERR,
    ) -> None:
        self._out, self._err, self._title = out, err, title
        self._lines = shown and not redraws(out)
        self._bars: Bars | None = None
        if shown and redraws(err):
            self._bars = Bars(TextColumn("{task.percentage:>3.0f} %"), console=err, out=out)
        self._row = TaskID(0)
        self._stage, self._name = -1, ""
        self._started = self._shown = 0.0

    def __enter__(self) -> Self:
        """Open the bar."""
        self._started = time.perf_counter()
        if self._lines:
            self._out.print(f"{self._title} …")
        if self._bars is not None:
            self._row = self._bars.add_task(self._title, total=None, text="")
            self._bars.start()
        return self

    def expect(self, stages: int) -> None:
        """Set the total number of stages; may be called again to correct it."""
        if self._bars is not None:
            self._bars.update(self._row, total=stages)

    def stage(self, name: str) -> Report:
        """Start the stage ``name``; returns the function to report its progress."""
        self._stage, self._name = self._stage + 1, name
        self._show(0.0)
        return self._report

    def _report(self, fraction: float) -> None:
        if time.perf_counter() - self._shown >= REFRESH:
            self._show(fraction)

    def _show(self, fraction: float) -> None:
        if self._bars is not None:
            self._shown = time.perf_counter()
            self._bars.show(self._row, completed=self._stage + fraction, text=self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar, after filling it unless there was an error."""
        took = f"done in {duration(time.perf_counter() - self._started)}"
        if self._bars is not None:
            if kind is None:
                self._bars.show(self._row, completed=self._stage + 1, total=self._stage + 1, text=took)
            self._bars.stop()
        if self._lines and kind is None:
            self._out.print(f"{self._title} {took}")
