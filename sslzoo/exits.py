"""Exit codes of ``sslzoo`` and of ``fit`` in particular, and the ways in which a run leaves in order."""

from __future__ import annotations

import signal
from enum import IntEnum

# What schedulers send to ask a run to leave: SLURM's scancel and its warning before the time limit, torchrun and
# timeout (TERM), submitit (USR2), a closed terminal (HUP).
LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class ExitCode(IntEnum):
    """What a scheduler's script can act on: requeue on 75, look at the run on 76."""

    DONE = 0
    FAILURE = 1  # at run time
    USAGE = 2  # wrong command line, recipe, data or directory; nothing was started
    PREEMPTED = 75  # a signal asked the run to leave; `--resume auto` continues
    NAN = 76  # the loss is not finite; the checkpoints are from before
    INTERRUPT = 130  # Ctrl-C


class RunError(ValueError):
    """A run cannot be started as asked, or its directory not be used; the message says what to change."""


class Leave(SystemExit):
    """A run that leaves in order. No ``Exception``, so that nothing on the way takes it for an error.

    ``message`` says in one sentence what happened.
    """

    exit_code: ExitCode

    def __init__(self, message: str) -> None:
        super().__init__(int(self.exit_code))
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preempted(Leave):
    """A signal asked the run to leave."""

    exit_code = ExitCode.PREEMPTED


class Diverged(Leave):
    """The loss is not finite."""

    exit_code = ExitCode.NAN
