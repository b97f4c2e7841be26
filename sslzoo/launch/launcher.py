"""Start the ranks on this machine and wait for them, as torchrun does, but without a second command.

The parent does not import torch. It forwards signals, ends the other ranks when one has died, and reports the error of
a rank that could not report it itself.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslzoo.checks import require
from sslzoo.exits import LEAVE_SIGNALS, ExitCode
from sslzoo.launch.words import last_words
from sslzoo.processes.ending import Ending, read_message
from sslzoo.processes.placement import ALONE, LAUNCHER_FOLDER
from sslzoo.recipe.load import LoadedRecipe
from sslzoo.records.directory import PHASES, Run
from sslzoo.records.lock import read_lock

PATIENCE = 20.0  # seconds that the other ranks get to exit by themselves after one has failed
POLL = 0.05  # seconds
_INTERRUPT_AFTER = 3.0  # seconds until SIGINT is forwarded, if the ranks did not receive it themselves


def launch(arguments: Sequence[str], loaded: LoadedRecipe, *, processes: int, nodes: int) -> int:
    """Run ``sslzoo`` with ``arguments``, which begin with the verb, as each of the ``processes`` ranks of this machine,
    one of ``nodes``; returns the exit code.

    Raises ``ValueError`` for a run on several machines without an address for their rendezvous.
    """
    require(
        nodes == 1 or all(name in os.environ for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")),
        f"trainer.num_nodes={nodes}, but this process does not know the other machines: start one task per device "
        f"with srun, or on every machine: torchrun --nnodes {nodes} --nproc-per-node {processes} --rdzv-backend c10d "
        "--rdzv-endpoint HOST:29500 -m sslzoo fit ...",
    )
    folder = Path(tempfile.mkdtemp(prefix="sslzoo-"))
    (folder / "pid").write_text(str(os.getpid()))
    try:
        ranks = _Ranks(arguments, processes, nodes, folder)
        ranks.wait()
        return _conclude(ranks, folder, loaded, arguments[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The rank processes on one machine."""

    def __init__(self, arguments: Sequence[str], processes: int, nodes: int, folder: Path) -> None:
        node = int(os.environ.get("NODE_RANK", "0")) if nodes > 1 else 0
        self.first_rank = node * processes
        shared = {
            "WORLD_SIZE": str(processes * nodes),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": str(node),
            LAUNCHER_FOLDER: str(folder),
        }
        if nodes == 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if "OMP_NUM_THREADS" not in os.environ:
            shared["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // processes, 1))
        self._interrupted: float | None = None
        self.died: list[int] = []  # local ranks killed by a signal that was not forwarded, in order
        self._sent: set[int] = set()  # forwarded signals
        self.left_over: list[subprocess.Popen[bytes]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        # Set up before starting the first child, so that no signal is missed.
        previous = {
            number: signal.signal(number, self._forward) for number in LEAVE_SIGNALS if _is_handled(number)
        }
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._previous = previous
        for local in range(processes):
            rank = {"RANK": str(self.first_rank + local), "LOCAL_RANK": str(local)}
            self._children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "sslzoo", *arguments],
                    env=os.environ | shared | rank,
                    stdin=None if local == 0 else subprocess.DEVNULL,
                )
            )

    @property
    def codes(self) -> list[int]:
        """Exit codes, except of ranks killed at the end; negative for ranks killed by a signal. A rank that died of a
        forwarded signal, before it could handle it, counts as pre-empted."""
        codes = [child.wait() for child in self._children if child not in self.left_over]
        return [ExitCode.PREEMPTED if -code in self._sent else code for code in codes]

    def code_of(self, local: int) -> int:
        """Exit code of one rank."""
        return self._children[local].wait()

    def wait(self) -> None:
        """Wait until all ranks have exited. Once one has failed, the others get ``PATIENCE`` seconds to exit."""
        failed: float | None = None
        try:
            # A list, not a generator, so that every child is polled even if the first is still running.
            while None in [child.poll() for child in self._children]:
                now = time.monotonic()
                self._note_deaths()
                if failed is None and any(self._failed(child.returncode) for child in self._children):
                    failed = now
                if failed is not None and now - failed > PATIENCE:
                    break
                if self._interrupted is not None and now - self._interrupted > _INTERRUPT_AFTER:
                    self._interrupted = None
                    self._forward(signal.SIGINT, None)
                time.sleep(POLL)
            self._note_deaths()
        finally:
            self.left_over = [child for child in self._children if child.poll() is None]
            for child in self.left_over:
                child.kill()
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _failed(self, code: int | None) -> bool:
        """Whether the other ranks cannot continue after this exit code. On 75 all ranks leave together."""
        return code == ExitCode.FAILURE or (code is not None and code < 0 and -code not in self._sent)

    def _note_deaths(self) -> None:
        for local, child in enumerate(self._children):
            code = child.returncode
            if code is not None and code < 0 and self._failed(code) and local not in self.died:
                self.died.append(local)

    def _forward(self, number: int, frame: Any) -> None:
        self._sent.add(number)
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _interrupt(self, number: int, frame: Any) -> None:
        """Note the time: Ctrl-C in a terminal reaches the ranks too, but ``kill -INT`` does not."""
        self._interrupted = time.monotonic()


def end_with_parent() -> None:
    """Make the kernel send SIGTERM to this process if the launcher dies. Linux only."""
    if LAUNCHER_FOLDER in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _is_handled(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _conclude(ranks: _Ranks, folder: Path, loaded: LoadedRecipe, verb: str) -> int:
    """Print the last message of a failed run and return the exit code. A rank that was killed is reported as the
    cause, unless another rank had failed before."""
    codes = ranks.codes
    ending = read_message(folder, "ending")
    words = read_message(folder, "words")  # the last message, which a failed rank leaves to this process
    # A rank that was killed after another had failed is not the cause.
    if ranks.died and (ending is None or Ending.from_json(ending).kind in _CONSEQUENCES):
        rank, number = ranks.first_rank + ranks.died[0], signal.Signals(-ranks.code_of(ranks.died[0]))
        why = "; the machine may have run out of memory" if number is signal.SIGKILL else ""
        message = f"rank {rank} was killed by {number.name}{why}"
        dead = Ending(code=ExitCode.FAILURE, kind=number.name, rank=rank, message=message)
        path = read_message(folder, "run")
        run = Run(Path(path), "") if path is not None else None
        words = last_words(dead, ALONE, run, loaded, verb=verb)
        if run is not None:
            _record(run, dead)
    if words is not None:
        sys.stdout.flush()
        sys.stderr.write(words + "\n")
    if ExitCode.FAILURE in codes or any(code < 0 for code in codes):
        return ExitCode.FAILURE
    return next((code for code in codes if code), 0)


# Errors that the other ranks raise when a rank dies.
_CONSEQUENCES = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "RankLost", "")


def _record(run: Run, ending: Ending) -> None:
    """Replace the end that rank 0 recorded, if any, in the manifest."""
    try:
        start = run.read_manifest()["sessions"][-1]
        spent = (read_lock(run.path) or {}).get("seconds", {})
        run.conclude(
            ending, {phase: start.get(f"{phase}_seconds", spent.get(phase, 0.0)) for phase in PHASES}
        )
        with run.log.open("a") as log:
            log.write(f"{ending.message}; this caused the errors of the other ranks above\n")
    except (ValueError, OSError, KeyError, IndexError) as error:
        sys.stderr.write(f"sslzoo fit: the manifest of {run.path} could not be updated: {error}\n")
