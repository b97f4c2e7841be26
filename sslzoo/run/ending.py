"""How a run ended: the exit code, what happened in one sentence, and on which rank. Importable without torch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sslzoo.exits import ExitCode
from sslzoo.files import write_text
from sslzoo.run.placement import LAUNCHER_FOLDER


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
    """Leave ``text`` under ``name`` for sslzoo's own launcher; False where another program started this process, or
    where the launcher is gone."""
    folder = Path(os.environ.get(LAUNCHER_FOLDER, ""))
    if LAUNCHER_FOLDER not in os.environ or told(folder, "pid") != str(os.getppid()):
        if LAUNCHER_FOLDER in os.environ:  # it was killed and cannot tidy up itself
            shutil.rmtree(folder, ignore_errors=True)
        return False
    write_text(folder / name, text)
    return True


def told(folder: Path, name: str) -> str | None:
    """What a rank left under ``name`` in the launcher's ``folder``."""
    path = folder / name
    return path.read_text() if path.exists() else None
