"""The last lines on the terminal: what happened and what to do next. Importable without torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from sslzoo.run.directory import Run
from sslzoo.run.ending import Ending
from sslzoo.run.placement import Placement


def last_words(ending: Ending, placement: Placement, run: Run | None, recipe: Path, trouble: str = "") -> str:
    """What happened and what to do next: the last lines on the terminal of a run that did not end as planned.

    ``run`` is None where nothing was begun; ``trouble`` is a second thing that went wrong.
    """
    lines = [] if ending.expected else [ending.traceback.rstrip()]
    lines.append(f"sslzoo fit: {ending.described(placement.world_size)}")
    lines += [trouble] if trouble else []
    return "\n".join([*lines, *(_what_next(ending, placement, run, recipe) if run is not None else [])])


def _what_next(ending: Ending, placement: Placement, run: Run, recipe: Path) -> Iterator[str]:
    saved = sorted(run.checkpoints.glob("step=*.ckpt"))
    state = f"the newest checkpoint is {saved[-1].name}" if saved else "no checkpoint was written yet"
    change = {
        "Diverged": "lower optim.lr or raise optim.warmup_epochs",
        "OutOfMemoryError": "make this change",
    }
    if ending.kind in change:  # of the recipe, which a run that continues keeps
        start = f" with --init-from {saved[-1]}" if saved else ""
        yield f"{state}; {change[ending.kind]} and start another run{start}"
        return
    if ending.is_failure and not ending.expected:
        yield f"the traceback is in {run.rank_log(ending.rank)}"
    yield f"{state}; continue with: {command_to_continue(run, recipe, placement)}"


def command_to_continue(run: Run, recipe: Path, placement: Placement) -> str:
    """The command that continues ``run``."""
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    words = ["sslzoo", "fit", "--recipe", str(recipe), "--out", str(run.path), "--resume", "auto", *overrides]
    started = {"torchrun": "torchrun ... -m ", "srun": "srun "}.get(placement.starter, "")
    return started + shlex.join(words)
