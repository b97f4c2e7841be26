"""Exit codes of ``sslzoo``, and the exceptions that end a run in an orderly way."""

from __future__ import annotations

import signal
from enum import IntEnum

# Signals that ask a run to stop: from SLURM (scancel, or a warning before the time limit), torchrun and timeout (TERM),
# submitit (USR2), a closed terminal (HUP).
LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class ExitCode(IntEnum):
    """Exit codes that a job script can act on: requeue on 75, inspect the run on 76 and 77."""

    DONE = 0
    FAILURE = 1  # an error at run time
    USAGE = 2  # invalid command line, recipe, data or directory; nothing was started
    PREEMPTED = 75  # stopped by a signal; `--resume auto` continues
    NAN = 76  # the loss is not finite; the checkpoints predate that
    COLLAPSED = 77  # the representation has collapsed, and eval.stop_on_collapse is set
    INTERRUPT = 130  # Ctrl-C


class RunError(ValueError):
    """A run cannot be started as requested, or its directory cannot be used; the message says what to change."""


class Leave(SystemExit):
    """An orderly end of a run. Not an ``Exception``, so that no handler on the way treats it as an error.

    ``message`` says in one sentence what happened.
    """

    exit_code: ExitCode

    def __init__(self, message: str) -> None:
        super().__init__(int(self.exit_code))
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preempted(Leave):
    """A signal asked the run to stop."""

    exit_code = ExitCode.PREEMPTED


class Diverged(Leave):
    """The loss is not finite."""

    exit_code = ExitCode.NAN


class Collapsed(Leave):
    """The representation has collapsed, and the recipe asks to stop then."""

    exit_code = ExitCode.COLLAPSED
