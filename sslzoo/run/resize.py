"""Whether a run may continue on another number of processes, or with other micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.method import SSLMethod
from sslzoo.recipe.plan import Division
from sslzoo.recipe.sections import Recipe


def obstacle(method: SSLMethod[Any], recipe: Recipe, before: Division, *, draws: bool) -> str:
    """Why the numbers of a run that was divided as ``before`` would change with ``method.plan``; empty if they do not.

    ``draws``: whether its steps have drawn random numbers in the main process, such as dropout's.
    """
    now = method.plan.division
    return next(filter(None, _reasons(method, recipe, before, now, draws)), "")


def _reasons(
    method: SSLMethod[Any], recipe: Recipe, before: Division, now: Division, draws: bool
) -> Iterator[str]:
    if draws and now != before:
        yield "random numbers such as those of dropout depend on both"
    has_norms = any(isinstance(module, _BatchNorm) for module in method.modules())
    if now.processes != before.processes:
        if has_norms and not recipe.trainer.get("sync_batchnorm", False):
            yield "batch norm has statistics of the images of one process (trainer.sync_batchnorm=false)"
        yield method.depends_on_processes()
    if now.micro_batches != before.micro_batches:
        if has_norms:
            yield "batch norm has statistics of the images of one micro-batch"
        if recipe.analyses:
            yield "the recipe's analyses observe one micro-batch"
        yield method.depends_on_micro_batches()
