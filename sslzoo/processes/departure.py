"""Signal handling: how all ranks stop together when one is asked to. Importable without torch.

SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP, sent to any rank or to all, ask a run to stop. During training, the ranks agree on
an optimiser step, save a checkpoint there and exit; in other phases there is nothing to save and they exit at once. No
step waits for this agreement: a thread on each rank polls the shared store four times a second, and only after a signal
does the main thread wait for the decision of the threads.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from sslzoo.exits import LEAVE_SIGNALS, ExitCode, Preempted
from sslzoo.processes.ending import Ending
from sslzoo.processes.placement import ALONE, Placement, place

log = logging.getLogger(__name__)

POLL = 0.25  # seconds between polls of the store
# Seconds after another rank has left, or failed, before the watching thread ends a process whose main thread hangs in
# a collective.
GRACE_LEFT, GRACE_FAILED = 1.0, 4.0
LOST = 5.0  # seconds without an answer after which a rank counts as dead
GRACE_REACTING = 30.0  # the same for a main thread that is already exiting: stopping workers, closing files
_AT_ONCE = -1  # answer of a rank that has nothing to save
_LOST = -2  # decision if a rank does not answer


class RankLost(RuntimeError):
    """A rank stopped responding, usually because the kernel or a user killed it."""


def leave_while_importing() -> None:
    """Handle the signals until :meth:`Departure.install`; importing can take minutes on a cold file system."""
    for number in LEAVE_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_importing)


def _leave_importing(number: int, frame: FrameType | None) -> None:
    if place().is_leader:
        sys.stderr.write(f"sslzoo: {signal.Signals(number).name} while starting; nothing was written\n")
        sys.stderr.flush()
    os._exit(ExitCode.PREEMPTED)


def end_workers() -> None:
    """Kill the data workers: they ignore SIGTERM, with which they would be ended at exit."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and threading.current_thread() is threading.main_thread():
        # The data loader's handler would report the killed workers as an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join()


class Departure:
    """Signal handlers of one process, and the agreement of all ranks to stop.

    ========  =============================  ====================================================================
    ranks     phase                          effect of a signal
    ========  =============================  ====================================================================
    one       training                       :meth:`boundary` returns True at the next step: save there and stop
    one       starting, evaluating, ...      :class:`Preempted` is raised in the main thread
    several   starting                       the same; :meth:`close` informs the other ranks
    several   training on all ranks          each thread answers with the first step that its rank has not begun;
                                             :meth:`boundary` returns True at the largest of these
    several   another phase on any rank      :class:`Preempted` on all
    several   a rank does not answer         :class:`RankLost` on all
    ========  =============================  ====================================================================

    ``describe(error)`` returns the ``Ending`` of a run that ends with ``error``. ``abandon(ending)`` is called from
    the watching thread if the main thread hangs in a collective with a rank that has left or failed: it writes logs
    and manifest, and then the process exits.
    """

    def __init__(
        self,
        placement: Placement = ALONE,
        *,
        describe: Callable[[BaseException], Ending] | None = None,
        abandon: Callable[[Ending], None] | None = None,
    ) -> None:
        self.placement = placement
        self._describe = describe
        self.phase = "starting"
        self._abandon = abandon
        self._received = 0  # number of the signal received, or 0
        self._reacting = False  # whether the main thread is already exiting
        self._mutex = threading.Lock()  # guards the next three attributes between main and watching thread
        self._immediate = True  # whether a signal ends the current phase at once
        self._passed = -1  # the last step that this rank has begun
        self._answered = False
        self._stop: int | None = None  # the step to stop at, once all ranks have answered
        self._decided = threading.Event()
        self._lost = ""  # message that names the lost rank
        self._answered_at = 0.0
        self._store: Any = None
        self.leader_gone = False  # rank 0 is gone, and with it the store
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._previous: dict[signal.Signals, Any] = {}

    # -- signals ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Install the signal handlers, except for signals that are ignored on purpose, as SIGHUP is under nohup."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in LEAVE_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Restore the previous handlers. In a process that is about to exit, the signals are ignored instead."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is _leave_importing else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        # With several ranks the others are asked first, because the signal may come from a launcher that ends the
        # remaining ranks after one has died.
        if self._immediate and not self._reacting and (self._alone or self._stop is not None):
            self._leave_at_once()

    @property
    def _alone(self) -> bool:
        return self._store is None or self.phase == "starting"

    def _leave_at_once(self) -> None:
        self._reacting = True
        if self._stop == _LOST:
            raise RankLost(self._lost)
        raise Preempted(f"{self.signal_name} while {self.phase}")

    # -- called by the main thread --------------------------------------------------------------------

    def enter(self, phase: str, *, saves: bool = False) -> None:
        """Enter ``phase`` (such as ``"evaluating"``). With ``saves``, a signal takes effect at the next
        :meth:`boundary`, where a checkpoint is saved. Raises :class:`Preempted` if a signal came and nothing needs
        saving."""
        self.phase = phase
        with self._mutex:
            self._immediate = not saves
        if (
            self._immediate
            and self._received
            and not self._reacting
            and (self._alone or self._stop is not None)
        ):
            self._leave_at_once()

    def boundary(self, step: int) -> bool:
        """Whether all ranks save and stop before optimiser step ``step``. Call it in the main thread, between two
        accumulation windows."""
        if self.placement.world_size > 1:
            with self._mutex:
                if not self._answered:
                    self._passed = step
                    return False
            self._decided.wait()
            assert self._stop is not None
            if self._stop in (_AT_ONCE, _LOST):
                self._leave_at_once()
            self._reacting = step >= self._stop
        else:
            self._reacting = bool(self._received)
        return self._reacting

    @property
    def signal_name(self) -> str:
        """Name of the signal received, or ``''``."""
        return signal.Signals(self._received).name if self._received else ""

    # -- agreement of the ranks -----------------------------------------------------------------------

    def join(self, store: Any) -> None:
        """Start watching ``store``, which all ranks share; None, with one process, does nothing."""
        if store is not None:
            self._store = store
            self._thread = threading.Thread(target=self._watch, name="departure", daemon=True)
            self._thread.start()

    def report(self, ending: Ending) -> Ending:
        """Report to the other ranks that this one ends early. Returns the first such ending of all ranks, which may be
        this one."""
        if self._store is None:
            return ending
        try:
            first = self._store.compare_set("end", "", ending.to_json())
            return Ending.from_json(first)
        except RuntimeError:
            self.leader_gone = True
            return ending

    def raised(self, error: BaseException) -> None:
        """Report ``error`` to the other ranks at once, before a teardown that may take seconds."""
        self._reacting = True
        if self._describe is not None:
            self.report(self._describe(error))

    def close(self, ending: Ending) -> Ending:
        """End this rank's part and return the first early ending of all ranks, or ``ending`` if there was none. Rank 0
        waits, at most a minute, until the others have read it. Signals are ignored from now on."""
        self._reacting = True
        first = ending
        if self._store is not None:
            if ending.code != ExitCode.DONE:
                first = self.report(ending)
            self._answer(at_once=True)
            self._done.set()
            assert self._thread is not None
            self._thread.join(timeout=5)
            self._part(patience=60.0 if ending.code == ExitCode.DONE else GRACE_FAILED + 1)
        return first

    def _part(self, patience: float) -> None:
        place = self.placement
        try:
            self._store.set(f"done/{place.rank}", "1")
            if place.is_leader:
                keys = [f"done/{rank}" for rank in range(place.world_size)]
                end = time.monotonic() + patience
                while not self._store.check(keys) and time.monotonic() < end:
                    time.sleep(0.05)
        except RuntimeError:
            pass  # rank 0 has already exited

    def _watch(self) -> None:
        published = False
        since: float | None = None
        end: Ending | None = None
        while not self._done.wait(POLL):
            try:
                if self._received and not published:
                    self._store.set("leave", str(self._received))
                    published = True
                if not self._answered and (published or self._store.check(["leave"])):
                    self._answer()
                if self._answered and self._stop is None:
                    self._decide()
                if end is None and self._store.check(["end"]):
                    end = Ending.from_json(self._store.get("end"))
            except RuntimeError:
                self.leader_gone = True
                end = end or Ending(
                    code=ExitCode.FAILURE, kind="RankLost", message="rank 0 stopped responding", rank=0
                )
            if self._stop in (_AT_ONCE, _LOST) and end is None:
                lost = self._stop == _LOST
                end = Ending(
                    code=ExitCode.FAILURE if lost else ExitCode.PREEMPTED,
                    kind=RankLost.__name__ if lost else "",
                    message=self._lost if lost else f"{self.signal_name} while {self.phase}",
                    rank=self.placement.rank,
                )
            if end is not None:
                patience = GRACE_FAILED if end.is_failure else GRACE_LEFT
                since = since or time.monotonic()
                if self._reacting:
                    patience = GRACE_REACTING
                if time.monotonic() - since > patience and not self._done.is_set():
                    self._give_up(end)

    def _give_up(self, end: Ending) -> None:
        with suppress(RuntimeError):
            self._store.set(f"done/{self.placement.rank}", "1")
        try:
            if self._abandon is not None:
                self._abandon(end)
        finally:
            os._exit(end.code)

    def _answer(self, *, at_once: bool = False) -> None:
        """Publish the first step at which this rank can still stop: the first one that it has not begun."""
        with self._mutex:
            if self._answered:
                return
            self._answered = True
            self._answered_at = time.monotonic()
            immediate = self._immediate or at_once
            answer = _AT_ONCE if immediate else self._passed + 1
        try:
            if not self._received:
                # This rank received no signal itself: take the one of another rank, if there is one.
                self._received = int(self._store.get("leave")) if self._store.check(["leave"]) else 0
            self._store.set(f"leave/{self.placement.rank}", str(answer))
        except RuntimeError:
            pass

    def _decide(self) -> None:
        keys = [f"leave/{rank}" for rank in range(self.placement.world_size)]
        if self._store.check(keys):
            answers = [int(self._store.get(key)) for key in keys]
            self._stop = _AT_ONCE if _AT_ONCE in answers else max(answers)
        elif time.monotonic() - self._answered_at > LOST:
            silent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
            self._lost = f"rank {', '.join(silent)} stopped responding"
            self._stop = _LOST
        else:
            return
        self._decided.set()
        if self._immediate and self._received and not self._reacting:
            # The handler raises in the main thread.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.Signals(self._received))
