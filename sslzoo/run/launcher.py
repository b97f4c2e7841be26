"""Start the ranks of this machine and wait for them: what torchrun does, without a second command.

The parent imports no torch. It forwards signals, ends the other ranks when one has died, and has the last word when
a rank could not speak for itself.
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
from sslzoo.recipe.load import LoadedRecipe
from sslzoo.run.directory import PHASES, Run
from sslzoo.run.ending import Ending, told
from sslzoo.run.lock import read_lock
from sslzoo.run.placement import ALONE, LAUNCHER_FOLDER, devices_per_node
from sslzoo.run.words import last_words

PATIENCE = 20.0  # seconds that the other ranks have to end by themselves after the first has
POLL = 0.05
_INTERRUPT_AFTER = 3.0  # seconds until an interrupt that only this process received is passed on


def launch(arguments: Sequence[str], loaded: LoadedRecipe) -> int:
    """Run ``sslzoo`` with ``arguments`` as every rank of this machine; the run's exit code.

    Raises ``ValueError`` for a run on several machines that nobody has told how to meet.
    """
    processes, nodes = devices_per_node(loaded.recipe), loaded.recipe.nodes
    require(
        nodes == 1 or all(name in os.environ for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")),
        f"trainer.num_nodes={nodes}, but nobody says how the machines meet: start one task per device with srun, or "
        f"on every machine: torchrun --nnodes {nodes} --nproc-per-node {processes} --rdzv-backend c10d "
        "--rdzv-endpoint HOST:29500 -m sslzoo fit ...",
    )
    folder = Path(tempfile.mkdtemp(prefix="sslzoo-"))
    (folder / "pid").write_text(str(os.getpid()))
    try:
        ranks = _Ranks(arguments, processes, nodes, folder)
        ranks.wait()
        return _conclude(ranks, folder, loaded)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The processes of one machine."""

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
        self.died: list[int] = []  # ranks that a signal killed which this process did not send, in that order
        self._sent: set[int] = set()  # signals that were passed on
        self.left_over: list[subprocess.Popen[bytes]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        # Before the first child: a signal in between must reach it.
        previous = {
            number: signal.signal(number, self._forward) for number in LEAVE_SIGNALS if _heeded(number)
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
        """Exit codes, without those of ranks that were ended at last; negative for those that a signal killed. One
        that died of a signal which was passed on, before it could heed it, was pre-empted."""
        codes = [child.wait() for child in self._children if child not in self.left_over]
        return [ExitCode.PREEMPTED if -code in self._sent else code for code in codes]

    def code_of(self, local: int) -> int:
        """Exit code of one rank."""
        return self._children[local].wait()

    def wait(self) -> None:
        """Until all have ended. When one has failed, the others have some seconds to end by themselves."""
        failed: float | None = None
        try:
            # All are polled, not only those before the first that lives.
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
        """Whether this is the end of a rank from which the others cannot recover. All leave together on 75."""
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
        """The terminal has sent it to the ranks too; ``kill -INT`` has not."""
        self._interrupted = time.monotonic()


def end_with_parent() -> None:
    """Have the kernel ask this process to leave when the launcher dies. Linux only."""
    if LAUNCHER_FOLDER in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _heeded(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _conclude(ranks: _Ranks, folder: Path, loaded: LoadedRecipe) -> int:
    """The run's exit code. A rank that died without a word is named last, after what the others have said."""
    codes = ranks.codes
    ending = told(folder, "ending")
    words = told(folder, "words")  # of rank 0, which leaves the telling of a failure to this process
    # Who was killed after another had failed is no cause.
    if ranks.died and (ending is None or Ending.from_json(ending).kind in _CONSEQUENCES):
        rank, number = ranks.first_rank + ranks.died[0], signal.Signals(-ranks.code_of(ranks.died[0]))
        why = "; the machine may have run out of memory" if number is signal.SIGKILL else ""
        message = f"rank {rank} was killed by {number.name}{why}"
        dead = Ending(code=ExitCode.FAILURE, kind=number.name, rank=rank, message=message)
        where = told(folder, "run")
        run = Run(Path(where), "") if where is not None else None
        words = last_words(dead, ALONE, run, loaded)
        if run is not None:
            _record(run, dead)
    if words is not None:
        sys.stdout.flush()
        sys.stderr.write(words + "\n")
    if ExitCode.FAILURE in codes or any(code < 0 for code in codes):
        return ExitCode.FAILURE
    return next((code for code in codes if code), 0)


# What the loss of a rank looks like on the others.
_CONSEQUENCES = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "RankLost", "")


def _record(run: Run, ending: Ending) -> None:
    """Correct what rank 0 took for the end, if it could write at all."""
    try:
        start = run.read_manifest()["sessions"][-1]
        spent = (read_lock(run.path) or {}).get("seconds", {})
        run.conclude(
            ending, {phase: start.get(f"{phase}_seconds", spent.get(phase, 0.0)) for phase in PHASES}
        )
        with run.log.open("a") as log:
            log.write(f"{ending.message}; what the other ranks say above follows from that\n")
    except (ValueError, OSError, KeyError, IndexError) as error:
        sys.stderr.write(f"sslzoo fit: the manifest of {run.path} could not be completed: {error}\n")
