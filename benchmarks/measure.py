"""Measurement tools: the CPU time of alternatives in turn, the additional memory that a call needs, and results."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import process_time

import torch
from torch import Tensor

# Of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the table of ``make bench``: ``work`` relative to ``baseline``, and its bound, if it has one."""

    work: str
    baseline: str
    value: float
    unit: str = "x"  # x: the ratio of work to baseline, in time or in speed; otherwise such as MiB
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within its bound."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def bound(self) -> str:
        """The bound in words; empty if there is none."""
        words = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{word} {value:g}" for word, value in words if value is not None)


def products_of_similarities(embeddings: Tensor, block: int) -> None:
    """The three matrix products that a contrastive loss of ``embeddings`` (N, D) and its gradient need, ``block`` rows
    at a time."""
    out = torch.zeros_like(embeddings)
    for rows in embeddings.split(block):
        scores = rows @ embeddings.T
        torch.mm(scores, embeddings)
        out.addmm_(scores.T, rows)


def table(results: Sequence[Result]) -> str:
    """The results as text, one line each."""
    rows = [("work", "compared with", "result", "bound", "")]
    for r in results:
        value = f"{r.value:.0f}" if r.value >= 100 else f"{r.value:.3g}"
        rows.append((r.work, r.baseline, f"{value} {r.unit}", r.bound, "" if r.met else "MISSED"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def report(results: Sequence[Result], file: Path | None = None) -> int:
    """Print the table, and save it as JSON in ``file``; returns the exit code, 1 if a bound is missed."""
    print(table(results))
    if file is not None:
        lines = [asdict(r) | {"value": float(f"{r.value:.4g}"), "met": r.met} for r in results]
        file.write_text(json.dumps(lines, indent=1) + "\n")
    return 0 if all(r.met for r in results) else 1


def keep_freed_memory() -> None:
    """From here on the process keeps the memory that it frees: otherwise large tensors would cost page faults whose
    number depends on what ran before."""
    libc = ctypes.CDLL(None)
    for option, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0)):
        assert libc.mallopt(option, value) == 1


def alternating(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = process_time
) -> dict[str, list[float]]:
    """Seconds of each contender by ``clock``, by default those of the CPU, one value per round, after a warm-up round
    and :func:`keep_freed_memory`."""
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if k:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, over: str) -> float:
    """Median over the rounds of the time of ``name`` relative to that of ``over``."""
    return median(a / b for a, b in zip(seconds[name], seconds[over], strict=True))


def extra_mebibytes(run: Callable[[], object], warm_up: Callable[[], object]) -> float:
    """Peak resident memory (MiB) that ``run`` adds to that of ``warm_up``, in a forked process.

    ``warm_up`` should do the same on a small scale, so that one-time allocations of libraries are not counted.
    Measure memory before time: the fork inherits freed memory of this process, which ``run`` could reuse.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(_raised(run, warm_up)))
    process.start()
    sender.close()
    value: float = receiver.recv()  # EOFError if the process has died
    process.join()
    return value


def _raised(run: Callable[[], object], warm_up: Callable[[], object]) -> float:
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current resident memory
    before = _high_water()
    run()
    return _high_water() - before


def _high_water() -> float:
    """Peak resident MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
