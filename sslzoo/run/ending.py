"""How a run ended: the exit code, what happened in one sentence, and on which rank. Importable without torch."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslzoo.exits import ExitCode
from sslzoo.run.placement import LAUNCHER_FOLDER, Placement

if TYPE_CHECKING:
    from sslzoo.run.directory import Run


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The end of a run, or of one rank of it."""

    code: int
    message: str  # one sentence
    kind: str = ""  # class of the exception
    traceback: str = ""
    expected: bool = True  # False: the traceback tells more than the message
    rank: int = 0
    host: str = field(default_factory=platform.node)
    time: float = field(default_factory=time.time)

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong at run time."""
        return self.code == ExitCode.FAILURE

    def to_json(self) -> str:
        """One line; :meth:`from_json` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Ending:
        """What :meth:`to_json` wrote."""
        return Ending(**json.loads(text))

    def for_manifest(self) -> dict[str, Any]:
        """What the manifest keeps of an end that was not the planned one."""
        return {
            "rank": self.rank,
            "host": self.host,
            "kind": self.kind,
            "message": self.message,
            "log": f"logs/rank-{self.rank}.log",
        }

    def described(self, world_size: int) -> str:
        """The message, with the rank where there are several."""
        of = f"rank {self.rank} on {self.host} failed first: " if world_size > 1 and self.is_failure else ""
        return of + self.message


# -- what a rank tells the launcher that started it ------------------------------------------------


def tell_launcher(name: str, text: str) -> bool:
    """Leave ``text`` under ``name`` for sslzoo's own launcher; False where another program started this process."""
    folder = os.environ.get(LAUNCHER_FOLDER)
    if folder is None or not Path(folder).is_dir():
        return False
    part = Path(folder) / f"{name}.part"
    part.write_text(text)
    part.replace(Path(folder) / name)
    return True


def told(folder: Path, name: str) -> str | None:
    """What a rank left under ``name`` in the launcher's ``folder``."""
    path = folder / name
    return path.read_text() if path.exists() else None


# -- the last words ------------------------------------------------------------------------------------


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
