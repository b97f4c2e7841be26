"""The last lines on the terminal: what happened and what to do next. Importable without torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sslzoo.processes.ending import Ending
from sslzoo.processes.placement import Placement
from sslzoo.recipe.load import LoadedRecipe
from sslzoo.recipe.registry import name_of
from sslzoo.records.directory import Run


def last_words(
    ending: Ending,
    placement: Placement,
    run: Run | None,
    loaded: LoadedRecipe,
    trouble: str = "",
    *,
    verb: str = "fit",
) -> str:
    """The last lines on the terminal for a run that did not finish: what happened and what to do next.

    ``run`` is None if no directory was created; ``trouble`` describes a second error, if any; ``verb`` is the command.
    """
    lines = [] if ending.expected else [ending.traceback.rstrip()]
    lines.append(f"sslzoo {verb}: {ending.described(placement.world_size)}")
    lines += [trouble] if trouble else []
    return "\n".join([*lines, *(_what_next(ending, placement, run, loaded) if run is not None else [])])


def _what_next(ending: Ending, placement: Placement, run: Run, loaded: LoadedRecipe) -> Iterator[str]:
    saved = sorted(run.checkpoints.glob("step=*.ckpt"))
    # These cases need a changed recipe, so resuming is no option.
    if ending.kind == "Diverged":
        spoilt = f"; even the weights in {saved[-1].name} may already be unusable" if saved else ""
        yield f"lower optim.lr or raise optim.warmup_epochs, and start a new run with a different --out{spoilt}"
        return
    if ending.kind == "Collapsed":
        yield "change the recipe, and start a new run with a different --out; eval.stop_on_collapse=false trains on"
        return
    if ending.kind == "OutOfMemoryError" and "eval.batch_size" not in ending.message:
        start = f", initialised with --init-from {run.path}" if saved else ""
        yield f"start a new run with a different --out{start}"
        return
    if ending.is_failure and not ending.expected:
        yield f"the traceback is in {run.rank_log(ending.rank)}"
    command = command_to_continue(run, loaded, placement)
    if saved:
        yield f"the newest checkpoint is {saved[-1].name}; continue with: {command}"
    else:
        yield f"no checkpoint was written yet; start again with: {command}"


def command_to_continue(run: Run, loaded: LoadedRecipe, placement: Placement) -> str:
    """The command that continues ``run``."""
    words = ["sslzoo", "fit", "--recipe", name_of(loaded.source), "--out", str(run.path), "--resume", "auto"]
    started = {"torchrun": "torchrun ... -m ", "srun": "srun "}.get(placement.starter, "")
    return started + shlex.join([*words, *loaded.overrides])
