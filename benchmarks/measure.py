"""Measure the CPU time of alternatives in turn, and the additional memory that a call needs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import process_time


def alternating(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender, one value per round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name, run in contenders.items():
            start = process_time()
            run()
            if k:
                seconds[name].append(process_time() - start)
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
