"""Lock of a run directory, so that only one process uses it at a time. Importable without torch.

``run.lock`` names the owner: host, process and job. A killed run leaves it behind; the next run takes it over once the
owner is known to be dead.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sslzoo.exits import RunError
from sslzoo.files import pid_namespace, write_json

LOCK = "run.lock"  # file name
HEARTBEAT = 10.0  # seconds between heartbeats
STALE = 120.0  # seconds without a heartbeat after which an owner on another machine counts as dead


class RunLock:
    """Ownership of one run directory, with a thread that writes a heartbeat every ten seconds.

    ``seconds`` returns the seconds per phase; each heartbeat stores them, so that they survive a kill. ``on_lost``
    is called from the thread, with the new owner, if another process took over the directory, which can only
    happen after two minutes without a heartbeat.
    """

    def __init__(
        self, folder: Path, *, seconds: Callable[[], dict[str, float]], on_lost: Callable[[str], None]
    ) -> None:
        self.path = Path(folder) / LOCK
        self._seconds, self._on_lost = seconds, on_lost
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": platform.node(),
            "pid": os.getpid(),
            "pid_started": process_start(os.getpid()),
            "pid_namespace": pid_namespace(),
            "job": _job(),
            "restart": _restarts(),
        }
        self.left_behind: dict[str, float] = {}  # seconds per phase of a killed run, from its last heartbeat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Lock the directory. Raises ``RunError`` with the owner's name if it is in use."""
        part = self.path.with_name(f"{LOCK}.{self._owner['id']}.part")
        try:
            part.write_text(json.dumps(self._content()))
            dead = read_lock(self.path.parent)
            refuse_if_owned(self.path.parent)
            if dead is not None:
                self._clear(dead)
                self.left_behind = dead.get("seconds", {})
            try:
                os.link(part, self.path)  # fails if another process was faster
            except FileExistsError:
                raise RunError(_in_use(self.path.parent, read_lock(self.path.parent) or {})) from None
            except OSError:  # a file system without hard links
                part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        self._thread.start()

    def _clear(self, dead: dict[str, Any]) -> None:
        """Remove the lock of a ``dead`` owner. If several processes try at once, only one removes it; another may
        move the new lock of the first by mistake, and puts it back."""
        aside = self.path.with_name(f"{LOCK}.{self._owner['id']}.old.part")
        try:
            self.path.rename(aside)
            moved = _content(aside) or {}
            if moved.get("id") != dead.get("id"):
                os.link(aside, self.path)
                raise RunError(_in_use(self.path.parent, moved))
        except FileNotFoundError:
            pass  # another process removed it and has not written its own yet
        finally:
            aside.unlink(missing_ok=True)

    def release(self) -> None:
        """Stop the heartbeats and remove the lock."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if (read_lock(self.path.parent) or {}).get("id") == self._owner["id"]:
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Write a heartbeat now."""
        now = read_lock(self.path.parent)
        if now and now.get("id") != self._owner["id"]:
            self._ended.set()
            self._on_lost(_named(now))
        elif now is not None:  # also if it is unreadable, as may happen briefly on a network file system
            write_json(self.path, self._content())

    def _content(self) -> dict[str, Any]:
        return self._owner | {"seconds": self._seconds()}

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(
                OSError
            ):  # a full disk or a deleted directory ends the run when it writes its results
                self.beat()


def read_lock(folder: Path) -> dict[str, Any] | None:
    """The content of the lock in ``folder``: None without a lock, empty if it cannot be read."""
    return _content(Path(folder) / LOCK)


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def refuse_if_owned(folder: Path) -> None:
    """Raise ``RunError`` if a run that may be alive owns ``folder``.

    An owner is dead if its process no longer exists on this machine, if it belongs to an earlier start of the same
    SLURM job, or if its last heartbeat is more than two minutes old.
    """
    owner = read_lock(folder)
    if owner is None or _is_dead(Path(folder) / LOCK, owner):
        return
    raise RunError(_in_use(folder, owner))


def is_alive(folder: Path) -> bool:
    """Whether a process that may be alive owns ``folder``. Nothing is written: on another machine, the owner is judged
    by this machine's clock."""
    owner = read_lock(folder)
    if owner is None:
        return False
    if _is_here(owner):
        return process_start(int(owner.get("pid", 0))) == owner.get("pid_started")
    with suppress(OSError):
        return time.time() - (Path(folder) / LOCK).stat().st_mtime <= STALE
    return False


def _in_use(folder: Path, owner: dict[str, Any]) -> str:
    return f"{folder} is in use by {_named(owner)}; wait for it or stop it, or give --out another directory"


def _is_dead(path: Path, owner: dict[str, Any]) -> bool:
    if _is_here(owner):
        return (
            process_start(int(owner.get("pid", 0))) != owner.get("pid_started")
            or owner.get("pid") == os.getpid()
        )
    # A restarted job has no older processes; another step of the same start may be alive on another machine.
    same_job = bool(_job()) and owner.get("job") == _job()
    return (same_job and owner.get("restart", [0, 0]) < _restarts()) or _age(path) > STALE


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is visible: those of other machines and containers are not."""
    return (owner.get("host"), owner.get("pid_namespace")) == (platform.node(), pid_namespace())


def _job() -> str:
    """Id of this process's job: SLURM's, or torchrun's ``--rdzv-id``; empty without."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("SLURM_JOB_ID") or ("" if torchrun == "none" else f"torchrun {torchrun}")


def _restarts() -> list[int]:
    """How often SLURM has requeued this job, and torchrun has restarted its processes since."""
    return [int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]


def _age(path: Path) -> float:
    """Seconds since ``path`` was written, by the clock of its file system, since hosts' clocks may differ."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}.part")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return STALE + 1
    finally:
        probe.unlink(missing_ok=True)


def process_start(pid: int) -> str:
    """Start time of process ``pid`` on this machine, which distinguishes it from a later process with the same id;
    ``''`` if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:  # without /proc, only check that the process exists
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unknown owner (run.lock is unreadable)"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"
