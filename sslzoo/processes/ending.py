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
from sslzoo.processes.placement import LAUNCHER_FOLDER


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run, or one of its ranks, ended."""

    code: int
    message: str  # one sentence
    kind: str = ""  # class name of the exception
    traceback: str = ""
    expected: bool = True  # whether the message suffices; if False, the traceback is shown too
    rank: int = 0
    host: str = field(default_factory=platform.node)
    time: float = field(default_factory=time.time)

    @property
    def is_failure(self) -> bool:
        """Whether the run ended with an error at run time."""
        return self.code == ExitCode.FAILURE

    def to_json(self) -> str:
        """A line of JSON for :meth:`from_json`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Ending:
        """Read the output of :meth:`to_json`."""
        return Ending(**json.loads(text))

    def for_manifest(self) -> dict[str, Any]:
        """The ``error`` entry of the manifest for a run that did not finish."""
        return {
            "rank": self.rank,
            "host": self.host,
            "kind": self.kind,
            "message": self.message,
            "log": f"logs/rank-{self.rank}.log",
        }

    def described(self, world_size: int) -> str:
        """The message, prefixed with the failed rank if there are several ranks."""
        who = f"rank {self.rank} on {self.host} failed first: " if world_size > 1 and self.is_failure else ""
        return who + self.message


# -- messages from a rank to the launcher that started it -------------------------------------------


def tell_launcher(name: str, text: str) -> bool:
    """Send ``text`` as message ``name`` to sslzoo's own launcher. Returns False if another program started this
    process, or if the launcher is gone."""
    folder = Path(os.environ.get(LAUNCHER_FOLDER, ""))
    if LAUNCHER_FOLDER not in os.environ or read_message(folder, "pid") != str(os.getppid()):
        if LAUNCHER_FOLDER in os.environ:  # the launcher was killed and could not clean up
            shutil.rmtree(folder, ignore_errors=True)
        return False
    part = folder / f"{name}.{os.getpid()}.part"  # several ranks may report the same end
    part.write_text(text)
    part.replace(folder / name)
    return True


def read_message(folder: Path, name: str) -> str | None:
    """The message ``name`` from a rank in the launcher's ``folder``, or None."""
    path = folder / name
    return path.read_text() if path.exists() else None
