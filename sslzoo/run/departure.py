"""How a run is asked to leave, and how its ranks leave together. Importable without torch.

SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP, to any rank or to all, ask for it. While training, the ranks agree on an
optimiser step, save there and leave; anywhere else there is nothing to save and they leave at once. No step waits
for this agreement: a thread of each rank looks at the shared store four times a second, and only after a signal
does the main thread wait for what the threads decide.
"""

from __future__ import annotations

import logging
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
from sslzoo.run.ending import Ending
from sslzoo.run.placement import ALONE, Placement, place

log = logging.getLogger(__name__)

POLL = 0.25  # seconds between two looks at the store
# Seconds for a main thread that is stuck in a collective with a rank which has left, or which has failed; then it is
# ended from outside.
GRACE_LEFT, GRACE_FAILED = 1.0, 4.0
LOST = 5.0  # seconds without an answer after which a rank is taken for dead
GRACE_REACTING = 30.0  # for one on its way out, which may have workers to stop and files to close
_AT_ONCE = -1  # a rank's answer when it has nothing to save
_LOST = -2  # the decision when a rank does not answer


class RankLost(RuntimeError):
    """A rank ended without a word: the kernel or a user killed it."""


def leave_while_importing() -> None:
    """Heed the signals until :meth:`Departure.install` does: importing takes seconds, on a cold file system minutes."""
    for number in LEAVE_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_importing)


def _leave_importing(number: int, frame: FrameType | None) -> None:
    if place().is_leader:
        sys.stderr.write(f"sslzoo fit: {signal.Signals(number).name} while starting; nothing was begun\n")
        sys.stderr.flush()
    os._exit(ExitCode.PREEMPTED)


class Departure:
    """Signals and the agreement of the ranks, for one run.

    ========  =============================  ====================================================================
    ranks     phase                          what a signal does
    ========  =============================  ====================================================================
    one       training                       :meth:`boundary` is true at the next step: save there and leave
    one       starting, evaluating, ...      :class:`Preempted` is raised where the main thread stands
    several   starting                       the same; the others hear of it by :meth:`close`
    several   training on all ranks          each thread answers the first step that its rank has not gone into;
                                             :meth:`boundary` is true at the largest of these
    several   another on any rank            :class:`Preempted` on all
    several   a rank does not answer         :class:`RankLost` on all
    ========  =============================  ====================================================================

    ``describe(error)`` tells how a run ends that ``error`` ends. ``abandon(ending)`` is called from the watching
    thread of a rank whose main thread is stuck in a collective with a rank that has left or failed: it writes what
    has to be written, and the process ends.
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
        self._received = 0  # the signal that came to this process
        self._reacting = False  # the main thread is on its way out
        self._mutex = threading.Lock()  # guards the three below against a signal between two looks
        self._immediate = True
        self._passed = -1  # the last step that this rank went into
        self._answered = False
        self._stop: int | None = None  # the step to leave at, once all have answered
        self._decided = threading.Event()
        self._lost = ""  # which rank, in a sentence
        self._answered_at = 0.0
        self._store: Any = None
        self.leader_gone = False  # and the store with it
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._previous: dict[signal.Signals, Any] = {}

    # -- signals ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Take over the signals. One that is ignored on purpose stays so, as SIGHUP under nohup."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in LEAVE_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give the signals back. A process that has only to end from here ignores them."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is _leave_importing else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        # Of several ranks, the others are asked first: the signal may come from a launcher that ends the rest of a
        # run which has lost a rank.
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

    # -- what the main thread says and asks ---------------------------------------------------------

    def enter(self, phase: str, *, saves: bool = False) -> None:
        """From now on the run is in ``phase`` (``"evaluating"``); ``saves`` where leaving means saving first,
        at the next :meth:`boundary`. Raises :class:`Preempted` if a signal came and there is nothing to save."""
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
        """Whether all ranks save and leave before optimiser step ``step``. Main thread, no window open."""
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
        """Of the signal that asked, or ``''``."""
        return signal.Signals(self._received).name if self._received else ""

    # -- the ranks ----------------------------------------------------------------------------------

    def join(self, store: Any) -> None:
        """Watch ``store``, which all ranks share, from now on; nothing with one process."""
        if store is not None:
            self._store = store
            self._thread = threading.Thread(target=self._watch, name="departure", daemon=True)
            self._thread.start()

    def report(self, ending: Ending) -> Ending:
        """Tell the others that this rank ends otherwise than planned. Returns the ending that came first of all
        ranks, which may be this one."""
        if self._store is None:
            return ending
        try:
            first = self._store.compare_set("end", "", ending.to_json())
            return Ending.from_json(first)
        except RuntimeError:
            self.leader_gone = True
            return ending

    def raised(self, error: BaseException) -> None:
        """Tell the others at once what ends this rank; tearing down may take seconds."""
        self._reacting = True
        if self._describe is not None:
            self.report(self._describe(error))

    def close(self, ending: Ending) -> Ending:
        """This rank is through; how the first that did not end as planned has ended, if there was one. Rank 0
        stays, for some seconds at most, until the others have heard of it. Signals are ignored from now on."""
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
            pass  # rank 0 is gone already

    def _watch(self) -> None:
        told = False
        since: float | None = None
        end: Ending | None = None
        while not self._done.wait(POLL):
            try:
                if self._received and not told:
                    self._store.set("leave", str(self._received))
                    told = True
                if not self._answered and (told or self._store.check(["leave"])):
                    self._answer()
                if self._answered and self._stop is None:
                    self._decide()
                if end is None and self._store.check(["end"]):
                    end = Ending.from_json(self._store.get("end"))
            except RuntimeError:
                self.leader_gone = True
                end = end or Ending(
                    code=ExitCode.FAILURE, kind="RankLost", message="rank 0 ended without a word", rank=0
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
        """Say until where this rank cannot stop: the first step that it has not gone into."""
        with self._mutex:
            if self._answered:
                return
            self._answered = True
            self._answered_at = time.monotonic()
            immediate = self._immediate or at_once
            answer = _AT_ONCE if immediate else self._passed + 1
        try:
            if not self._received:
                # Of a rank that ends by itself there was no signal.
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
            self._lost = f"rank {', '.join(silent)} ended without a word"
            self._stop = _LOST
        else:
            return
        self._decided.set()
        if self._immediate and self._received and not self._reacting:
            # The handler raises in the main thread.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.Signals(self._received))
