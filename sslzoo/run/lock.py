"""One run at a time in a run directory. Importable without torch.

``run.lock`` names the owner: host, process and job. A run that was killed leaves it behind; the next one takes it
over when the owner is certainly gone.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sslzoo.exits import RunError
from sslzoo.files import write_json

LOCK = "run.lock"  # the file's name
HEARTBEAT = 10.0  # seconds between signs of life
STALE = 120.0  # seconds without one after which an owner that cannot be asked counts as dead


class RunLock:
    """Ownership of one run directory, with a thread that gives a sign of life every ten seconds.

    ``seconds`` is called at each of them; what it returns stays readable after a kill. ``on_lost`` is called
    from that thread when another process has taken the directory over, which can only happen to a run that
    was silent for two minutes.
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
            "pid_started": _started(os.getpid()),
            "pid_namespace": _pid_namespace(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
        }
        self.left_behind: dict[str, float] = {}  # seconds of a run that was killed, by its last sign of life
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the directory. ``RunError`` names the owner where another run has it."""
        part = self.path.with_name(f"{LOCK}.{self._owner['id']}.part")
        try:
            part.write_text(json.dumps(self._content()))
            dead = read_lock(self.path.parent)
            refuse_if_owned(self.path.parent)
            if dead is not None:
                self._clear(dead)
                self.left_behind = dead.get("seconds", {})
            try:
                os.link(part, self.path)  # fails where somebody was faster
            except FileExistsError:
                raise RunError(_in_use(self.path.parent, read_lock(self.path.parent) or {})) from None
            except OSError:  # a file system without hard links
                part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        self._thread.start()

    def _clear(self, dead: dict[str, Any]) -> None:
        """Move the lock of a ``dead`` owner out of the way. Of several that try at once, one moves it; another may
        catch the lock that the first has made since, and puts it back."""
        aside = self.path.with_name(f"{LOCK}.{self._owner['id']}.old.part")
        try:
            self.path.rename(aside)
            caught = _content(aside) or {}
            if caught.get("id") != dead.get("id"):
                os.link(aside, self.path)
                raise RunError(_in_use(self.path.parent, caught))
        except FileNotFoundError:
            pass  # somebody was faster, and has not made his own yet
        finally:
            aside.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the directory back."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if (read_lock(self.path.parent) or {}).get("id") == self._owner["id"]:
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Give a sign of life now."""
        now = read_lock(self.path.parent)
        if now and now.get("id") != self._owner["id"]:
            self._ended.set()
            self._on_lost(_named(now))
        elif now is not None:  # where it cannot be read, as for a moment on a network, it is written anew
            write_json(self.path, self._content())

    def _content(self) -> dict[str, Any]:
        return self._owner | {"seconds": self._seconds()}

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(
                OSError
            ):  # a full disk or a deleted directory ends the run where it writes its results
                self.beat()


def read_lock(folder: Path) -> dict[str, Any] | None:
    """The content of the directory's lock; None without one, empty where it cannot be read."""
    return _content(Path(folder) / LOCK)


def _content(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def refuse_if_owned(folder: Path) -> None:
    """``RunError`` where a run that may be alive owns ``folder``.

    Dead is an owner whose process is gone from this machine, one of this very job (a job that starts again
    has no other process left), and one without a sign of life for two minutes.
    """
    owner = read_lock(folder)
    if owner is None or _is_dead(Path(folder) / LOCK, owner):
        return
    raise RunError(_in_use(folder, owner))


def _in_use(folder: Path, owner: dict[str, Any]) -> str:
    return f"{folder} is in use by {_named(owner)}; wait for it or stop it, or give --out another directory"


def _is_dead(path: Path, owner: dict[str, Any]) -> bool:
    here = (platform.node(), _pid_namespace())  # of another container, no process can be seen
    if (owner.get("host"), owner.get("pid_namespace")) == here:
        return (
            _started(int(owner.get("pid", 0))) != owner.get("pid_started") or owner.get("pid") == os.getpid()
        )
    job = os.environ.get("SLURM_JOB_ID", "")
    return bool(job and owner.get("job") == job) or _age(path) > STALE


def _age(path: Path) -> float:
    """Seconds since ``path`` was written, by the clock of its file system: hosts' clocks differ."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}.part")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return STALE + 1
    finally:
        probe.unlink(missing_ok=True)


def _started(pid: int) -> str:
    """When process ``pid`` of this machine started, which tells it from a later one of the same number; ``''``
    without such a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:  # no /proc: the number must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "an owner that run.lock does not name"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"
