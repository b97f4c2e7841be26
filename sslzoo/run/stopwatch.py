"""Time spent in each phase of a run. Importable without torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds per phase of this start, readable at any time."""

    spent: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside the context as phase ``name``."""
        self._phase, self._since = name, time.perf_counter()
        try:
            yield
        finally:
            self.spent = self.seconds()
            self._phase = ""

    def seconds(self) -> dict[str, float]:
        """Seconds per phase, including the current one."""
        now = dict(self.spent)
        if self._phase:
            now[self._phase] = now.get(self._phase, 0.0) + time.perf_counter() - self._since
        return {phase: round(value, 1) for phase, value in now.items()}
