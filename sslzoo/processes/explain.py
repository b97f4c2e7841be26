"""Map exceptions to exit codes and one-sentence messages that say what to do."""

from __future__ import annotations

import errno
import traceback

from torch import OutOfMemoryError

from sslzoo.data.disk import DataError
from sslzoo.exits import ExitCode, Leave, RunError
from sslzoo.processes.departure import RankLost
from sslzoo.processes.ending import Ending
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import EvalConfig

# Errors that, before the start, are due to the user's input and not to a bug.
REFUSED = (ValueError, OSError)
# File-system errors: full, over quota, too large, read-only, forbidden, gone.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}


def explain(error: BaseException, *, rank: int, phase: str, begun: bool, out_of_memory: str = "") -> Ending:
    """The ending of a rank that raised ``error`` in ``phase``; ``begun`` says whether the run has its directory.

    ``out_of_memory`` is the message if a device is out of memory. Errors that one sentence explains count as expected,
    and their traceback is not shown on the terminal.
    """
    code, kind, message, expected = ExitCode.FAILURE, type(error).__name__, one_line(error), True
    if isinstance(error, Leave):
        code, message = error.exit_code, error.message
    elif isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        # Lightning turns the interrupt into a SystemExit.
        code, kind, message = ExitCode.INTERRUPT, KeyboardInterrupt.__name__, f"interrupted while {phase}"
    elif isinstance(error, REFUSED) and not begun and phase == "starting":
        code = ExitCode.USAGE
    elif isinstance(error, OutOfMemoryError) and out_of_memory:
        message = out_of_memory
    elif (
        not isinstance(error, (RunError, RankLost, DataError)) and getattr(error, "errno", None) not in _DISK
    ):
        message, expected = f"{kind}: {message}", False
    text = "".join(traceback.format_exception(error)) if code == ExitCode.FAILURE else ""
    return Ending(code=code, message=message, kind=kind, traceback=text, expected=expected, rank=rank)


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one line; for file-system errors, the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def out_of_memory(plan: TrainingPlan, evaluation: EvalConfig, *, device: str, phase: str) -> str:
    """Message that says which batch was too large for ``device``, and what to change."""
    if phase == "evaluating":
        return (
            f"out of memory on {device} while evaluating; set eval.batch_size below {evaluation.batch_size}"
        )
    return (
        f"out of memory on {device} with {plan.micro_batch_size} samples in a forward pass "
        f"(data.global_batch_size={plan.global_batch_size} over {plan.world_size} process(es) and "
        f"{plan.accumulate} micro-batch(es)); set trainer.accumulate_grad_batches={2 * plan.accumulate}, "
        "trainer.precision=bf16-mixed, more devices or a smaller data.global_batch_size"
    )
