"""Logging of a run: everything goes to files, warnings and errors also to the terminal of rank 0.

Records logged before the run directory is known are kept and written to its files later.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
from contextlib import suppress
from typing import IO

from rich.text import Text

from sslzoo.processes.ending import Ending, tell_launcher
from sslzoo.processes.placement import Placement
from sslzoo.recipe import registry
from sslzoo.records.directory import Run
from sslzoo.terminal import ERR

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}
# Python formats warnings as `path:line: Category: text`, followed by the source line.
_PYTHON_WARNING = re.compile(r"\A.*?:\d+: \w+: (?P<text>.*?)(?:\n  .*)?\s*\Z", re.DOTALL)


def packages() -> set[str]:
    """Names of the packages whose loggers are captured: sslzoo, and those that register a method or an analysis."""
    points = (*registry.methods().values(), *registry.analyses().values())
    return {"sslzoo", *(point.module.partition(".")[0] for point in points)}


class Messages:
    """The logging of one process of a run, from the start of the command to its end.

    Ranks other than 0 do not use the terminal: from :meth:`open` on, everything that they or their libraries
    print goes to their own log file.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._packages = packages()
        self._loggers = [*self._packages, "lightning.pytorch", "py.warnings"]
        self._early = _Early()
        self._handlers: list[logging.Handler] = [self._early]
        if placement.is_leader:
            self._handlers.append(_Terminal(level=logging.WARNING))
        self._quiet: list[tuple[logging.Logger, logging.Handler]] = []
        self._own_log: IO[str] | None = None
        self._terminal: int | None = None  # file descriptor of the original stderr

    def start(self) -> None:
        """Capture log records of the framework, methods and Lightning, and Python's warnings."""
        logging.captureWarnings(True)
        logging.raiseExceptions = False  # no traceback on the terminal if a log file cannot be written
        for name in self._packages:
            logging.getLogger(name).setLevel(logging.INFO)
        for name in self._loggers:
            for handler in self._handlers:
                logging.getLogger(name).addHandler(handler)

    def silence_lightning(self) -> None:
        """Remove Lightning's handlers for stderr, which would print each record twice. Call after importing it."""
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                if type(handler) is logging.StreamHandler:
                    logger.removeHandler(handler)
                    self._quiet.append((logger, handler))

    def open(self, run: Run) -> None:
        """Start logging to the files of ``run``, beginning with earlier records. Raises ``OSError`` on rank 0 if they
        cannot be written; other ranks, whose machine may not have the directory, continue without."""
        path = run.rank_log(self.placement.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._own_log = path.open("a", buffering=1)
        except OSError:
            if self.placement.is_leader:
                raise
            return
        paths = [path, run.log] if self.placement.is_leader else [path]
        files: list[logging.Handler] = [logging.FileHandler(path) for path in paths]
        for handler in files:
            handler.setFormatter(_FORMAT)
            for record in self._early.records:
                handler.handle(record)
        for name in self._loggers:
            logger = logging.getLogger(name)
            logger.removeHandler(self._early)
            for handler in files:
                logger.addHandler(handler)
        self._handlers += files
        faulthandler.enable(self._own_log)
        if not self.placement.is_leader:
            sys.stdout.flush()
            sys.stderr.flush()
            self._terminal = os.dup(2)
            os.dup2(self._own_log.fileno(), 1)
            os.dup2(self._own_log.fileno(), 2)

    def record(self, text: str) -> None:
        """Write ``text``, such as a traceback, to this rank's own log."""
        if self._own_log is not None:
            with suppress(OSError):  # a full disk must not hide the original error
                self._own_log.write(text.rstrip() + "\n")

    def print_error(self, text: str) -> None:
        """Write ``text`` to the terminal, also on a rank whose stderr is redirected to its log."""
        if self._terminal is not None:
            with suppress(OSError):
                os.write(self._terminal, f"{text.rstrip()}\n".encode())
        else:
            ERR.print(Text(text.rstrip()), soft_wrap=True)

    def print_last(self, text: str, ending: Ending, *, leader_gone: bool) -> None:
        """Write ``text``, the last words about ``ending``, or leave them to the launcher.

        Rank 0 reports the failure of any rank; the failed rank itself also does on another machine, or if rank 0 is
        gone.
        """
        place = self.placement
        if ending.is_failure and tell_launcher("ending", ending.to_json()):
            if place.is_leader or ending.rank == place.rank:
                tell_launcher("words", text)
        elif place.is_leader or (ending.rank == place.rank and (place.node_rank > 0 or leader_gone)):
            self.print_error(text)

    def close(self) -> None:
        """Remove the handlers and close the files."""
        logging.captureWarnings(False)
        for name in self._loggers:
            for handler in self._handlers:
                logging.getLogger(name).removeHandler(handler)
        for handler in self._handlers:
            with suppress(OSError):
                handler.close()
        for logger, handler in self._quiet:
            logger.addHandler(handler)
        if self._own_log is not None:
            faulthandler.disable()
            if self._terminal is None:  # otherwise stdout and stderr use the file until the process exits
                with suppress(OSError):
                    self._own_log.close()


class _Early(logging.Handler):
    """Keeps records in memory until there is a log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Terminal(logging.Handler):
    """Prints records to stderr, one line each, above a live display if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage().strip()
            if record.name == "py.warnings" and (match := _PYTHON_WARNING.match(text)):
                text = match["text"]
            level = record.levelname.lower()
            line = Text(f"{level}: ", style=_STYLES.get(record.levelno, "")) + Text(text)
            ERR.print(line, soft_wrap=True)
        except Exception:
            self.handleError(record)
