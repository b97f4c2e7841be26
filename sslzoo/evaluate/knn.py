"""Weighted cosine k-NN (Wu et al., arXiv:1805.01978, section 3.4), exact and sharded over ranks.

Shapes: Q queries, M samples in the bank, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum, gather_detached, rank, world_size
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import Features, Task
from sslzoo.nn.numerics import normalize

QUERIES = 4096  # maximum number of test samples for which the bank is read once
COMPARED = 512  # maximum number of test samples compared with a chunk of the bank at a time
BANK = 65536  # maximum number of samples in a chunk of the bank,
BANK_VALUES = 2**25  # and of their features: 128 MiB, like the similarities
GROUP = 16  # columns of similarities that are looked at only if the largest of them is among the nearest
GATHERED = 2**26  # maximum number of neighbours gathered from all ranks at a time: 768 MiB


def nearest(queries: Tensor, bank: Features, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and labels of the ``k`` nearest samples among ``rows`` (indices) of ``bank``, each (Q, k),
    descending.

    ``queries`` (Q, F) are L2-normalised. Non-finite samples are left out. If fewer than ``k`` samples remain, the rest
    has similarity -inf.
    """
    similarity = queries.new_full((len(queries), k), float("-inf"))
    neighbours = rows.new_zeros(len(queries), k)
    size = max(1, min(BANK, BANK_VALUES // max(1, queries.shape[1])))
    buffer = queries.new_empty(min(COMPARED, len(queries)) * min(size, len(rows)))
    for x, labels in bank.chunks(rows, size):
        part, y = normalize(x), labels
        finite = part.sum(1).isfinite()
        if not bool(finite.all()):
            part, y = part[finite], y[finite]
        for start in range(0, len(queries), COMPARED):
            some = slice(start, start + COMPARED)
            shape = len(queries[some]), len(part)
            found = torch.mm(queries[some], part.T, out=buffer[: prod(shape)].view(shape))
            value, index = _largest(found, min(k, len(part)))
            best, order = torch.cat([similarity[some], value], dim=1).topk(k, dim=1)
            neighbours[some] = torch.cat([neighbours[some], y[index]], dim=1).gather(1, order)
            similarity[some] = best
    return similarity, neighbours


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(k, dim=1)`` in less time: the ``k`` largest of a row are in the ``k`` groups of columns with the
    largest maxima."""
    groups = scores.shape[1] // GROUP
    if groups <= k:
        return scores.topk(k, dim=1)
    # A group has columns that are ``groups`` apart.
    maxima = scores[:, : GROUP * groups].unflatten(1, (GROUP, groups)).amax(1)
    best = maxima.topk(k, dim=1, sorted=False).indices
    among = torch.arange(0, GROUP * groups, groups, device=scores.device)[:, None] + best[:, None]
    rest = torch.arange(GROUP * groups, scores.shape[1], device=scores.device)
    columns = torch.cat([among.flatten(1), rest.expand(len(scores), -1)], dim=1)
    value, order = scores.gather(1, columns).topk(k, dim=1)
    return value, columns.gather(1, order)


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Class scores (Q, C): the sum of exp(similarity / temperature) over the neighbours of each class.

    Scores are relative to the weight of the nearest neighbour, which avoids overflow for small temperatures.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


@torch.no_grad()
def knn_accuracies(
    task: Task, ks: Sequence[int], temperatures: Sequence[float], report: Report = unseen
) -> dict[tuple[int, float], float]:
    """Top-1 accuracy, as a fraction, of classifying the test samples by their k nearest neighbours in the bank, for
    every pair (k, temperature) of ``ks`` and ``temperatures``, with one search.

    Collective: every rank passes its own shards, which may differ in size or be empty. Each rank's queries are
    compared with the banks of all ranks, and only the k best of each are gathered, so no Q x M matrix is stored.
    Non-finite rows are never neighbours, and count as wrong when tested.
    Raises ``ValueError`` if a k exceeds the size of the whole bank.
    """
    most, bank = max(ks), task.roles.bank.nonzero().squeeze(1)
    sizes = all_reduce_sum(torch.tensor([len(bank), len(task.test.label)], device=bank.device))
    require(
        most <= int(sizes[0]),
        f"k-NN with k={most} exceeds the {int(sizes[0])} training samples of the bank; lower k (eval.knn_k)",
    )
    require(int(sizes[1]) > 0, "the test set is empty")
    right = torch.zeros(len(ks), len(temperatures), dtype=torch.int64, device=bank.device)
    for owner in range(world_size()):
        for queries, labels, done in _queries(task.test, owner, most):
            similarity, neighbours = nearest(queries, task.train, bank, most)
            if world_size() > 1:
                similarity, neighbours = _merge(similarity, neighbours, most)
            if owner == rank():
                for i, k in enumerate(ks):
                    for j, temperature in enumerate(temperatures):
                        scores = vote(
                            similarity[:, :k],
                            neighbours[:, :k],
                            classes=task.classes,
                            temperature=temperature,
                        )
                        # Scores are NaN for queries that are not finite or have no neighbour.
                        right[i, j] += ((scores.argmax(1) == labels) & scores.isfinite().all(1)).sum()
            report((owner + done) / world_size())
    counts = all_reduce_sum(right).tolist()
    return {
        (k, temperature): counts[i][j] / int(sizes[1])
        for i, k in enumerate(ks)
        for j, temperature in enumerate(temperatures)
    }


def knn_accuracy(task: Task, *, k: int, temperature: float, report: Report = unseen) -> float:
    """:func:`knn_accuracies` for one k and one temperature."""
    return knn_accuracies(task, [k], [temperature], report)[k, temperature]


def _queries(test: Features, owner: int, k: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The normalised test samples (Q, F) of rank ``owner`` in chunks, on every rank; their labels, which are only
    valid on the owner; and the finished fraction after the chunk."""
    rows = torch.tensor([len(test.label)], device=test.device)
    if world_size() > 1:
        dist.broadcast(rows, src=owner)
    count, size = int(rows), max(1, min(QUERIES, GATHERED // (world_size() * k)))
    chunks = test.chunks(sizes=size)
    for start in range(0, count, size):
        if owner == rank():
            queries, labels = next(chunks)
            queries = normalize(queries)
        else:
            n = min(size, count - start)
            queries = torch.empty(n, test.x.shape[1], dtype=test.x.dtype, device=test.device)
            labels = test.label.new_zeros(n)
        if world_size() > 1:
            dist.broadcast(queries, src=owner)
        yield queries, labels, (start + len(labels)) / count


def _merge(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest neighbours among the ``k`` nearest of each rank: similarities and labels, each (Q, k)."""
    shape = (world_size(), *similarity.shape)
    all_similarity = gather_detached(similarity).view(shape).transpose(0, 1).flatten(1)  # (Q, W*k)
    all_labels = gather_detached(labels).view(shape).transpose(0, 1).flatten(1)
    best, order = all_similarity.topk(k, dim=1)
    return best, all_labels.gather(1, order)
