"""How often something that a run can do without may be done, by the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.01  # of the time since the start, at most


class Share:
    """Keeps something that is done again and again below one per cent of the time since :meth:`start`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin: float | None = None
        self._spent = self._last = 0.0

    def start(self) -> None:
        """Count the time from now on."""
        self._begin = self._clock()

    def allows(self) -> bool:
        """Whether it stays below its share if it takes as long as the last time. The first time is always allowed."""
        assert self._begin is not None
        return self._spent + self._last <= SHARE * (self._clock() - self._begin)

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Count the time within as its own, also if it fails."""
        start = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - start
            self._spent += self._last
