"""Exit codes of ``sslzoo`` and of ``fit`` in particular."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a scheduler's script can act on: requeue on 75, look at the run on 76 and 77."""

    DONE = 0
    FAILURE = 1  # at run time
    USAGE = 2  # wrong command line or recipe; nothing was started
    PREEMPTED = 75  # SIGTERM or SIGUSR1: saved, `--resume auto` continues
    NAN = 76  # the loss is not finite; the checkpoints are from before
    COLLAPSE = 77  # the representation collapsed
    INTERRUPT = 130  # Ctrl-C
