"""Our own protocol: nothing is chosen by the test images, which are looked at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslzoo.protocols.protocol import FeatureProtocol, LinearResult

if TYPE_CHECKING:
    from sslzoo.evaluate.progress import Report
    from sslzoo.evaluate.task import Task
    from sslzoo.recipe.sections import ProbeConfig


def evaluate(task: Task, probe: ProbeConfig, seed: int, report: Report) -> LinearResult:
    """Train on ``task`` by SGD with the rates of ``probe``; see :func:`sslzoo.evaluate.sgd_probe.sgd_evaluation`.
    ``n_unreadable`` is 0: a task has no unreadable images. Collective."""
    import torch

    from sslzoo.distributed import all_reduce_sum
    from sslzoo.evaluate.sgd_probe import sgd_evaluation

    found = sgd_evaluation(task, probe, seed=seed, report=report)
    counts = [task.roles.learned.sum(), task.roles.held_out.sum(), len(task.test.label)]
    learned, held_out, test = all_reduce_sum(torch.tensor(counts, device=task.train.device)).tolist()
    return LinearResult(
        top1=found.top1,
        top5=found.top5,
        classifier=f"rate {found.lr:g}",
        held_out_top1=found.holdout_top1,
        best=None,
        n_train=learned,
        n_held_out=held_out,
        n_test=test,
        n_unreadable=0,
    )


HONEST = FeatureProtocol(
    name="honest",
    source="sslzoo",
    summary="SGD on standardised features of plain images, chosen on held-out images",
    evaluate=evaluate,
)
