"""Weighted cosine k-NN (Wu et al., arXiv:1805.01978, section 3.4), exact and sharded over ranks.

Shapes: Q queries, M samples in the bank, F features, C classes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum, gather_detached, rank, world_size
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import Task, finite_rows
from sslzoo.nn.numerics import normalize

QUERIES = 512  # test samples compared at a time
BANK = 65536  # bank samples compared at a time: 128 MiB of similarities


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and labels of the ``k`` nearest samples in ``bank`` (M, F), each (Q, k), descending.

    ``queries`` (Q, F) and ``bank`` are L2-normalised. If the bank has fewer than ``k`` samples, the rest has
    similarity -inf.
    """
    similarity = queries.new_full((len(queries), k), float("-inf"))
    neighbours = labels.new_zeros(len(queries), k)
    for part, part_labels in zip(bank.split(BANK), labels.split(BANK), strict=True):
        value, index = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity, order = torch.cat([similarity, value], dim=1).topk(k, dim=1)
        neighbours = torch.cat([neighbours, part_labels[index]], dim=1).gather(1, order)
    return similarity, neighbours


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Class scores (Q, C): the sum of exp(similarity / temperature) over the neighbours of each class.

    Scores are relative to the weight of the nearest neighbour, which avoids overflow for small temperatures.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


@torch.no_grad()
def knn_accuracy(task: Task, *, k: int, temperature: float, report: Report = unseen) -> float:
    """Top-1 accuracy, as a fraction, of classifying the test samples by their nearest neighbours in the bank.

    Collective: every rank passes its own shards, which may differ in size or be empty. Each rank's queries are
    compared with the banks of all ranks, and only the k best of each are gathered, so no Q x M matrix is stored.
    Non-finite rows are never neighbours, and count as wrong when tested.
    Raises ``ValueError`` if ``k`` exceeds the size of the whole bank.
    """
    bank, bank_labels, _ = task.bank()
    test, test_labels, _ = task.test
    sizes = all_reduce_sum(torch.tensor([len(bank), len(test)], device=bank.device))
    require(
        k <= int(sizes[0]),
        f"eval.knn_k={k} exceeds the {int(sizes[0])} training samples of the bank; lower eval.knn_k",
    )
    require(int(sizes[1]) > 0, "the test set is empty")
    finite = finite_rows(bank)
    if not bool(finite.all()):
        bank, bank_labels = bank[finite], bank_labels[finite]
    bank, test = normalize(bank), normalize(test)
    right = torch.zeros(1, dtype=torch.int64, device=bank.device)
    for owner in range(world_size()):
        chunks = _queries(test, test_labels, owner)
        for done, (queries, labels) in enumerate(chunks, 1):
            similarity, neighbours = nearest(queries, bank, bank_labels, k)
            if world_size() > 1:
                similarity, neighbours = _merge(similarity, neighbours, k)
            if owner == rank():
                scores = vote(similarity, neighbours, classes=task.classes, temperature=temperature)
                # Scores are NaN for queries that are not finite or have no neighbour.
                right += ((scores.argmax(1) == labels) & scores.isfinite().all(1)).sum()
            report((owner + done / len(chunks)) / world_size())
    return int(all_reduce_sum(right)) / int(sizes[1])


def _queries(test: Tensor, labels: Tensor, owner: int) -> list[tuple[Tensor, Tensor]]:
    """The test samples of rank ``owner`` in chunks, on every rank; labels are only valid on the owner."""
    if world_size() > 1:
        rows = torch.tensor([len(test)], device=test.device)
        dist.broadcast(rows, src=owner)
        features = test.contiguous() if owner == rank() else test.new_empty(int(rows), test.shape[1])
        if len(features):
            dist.broadcast(features, src=owner)
        labels = labels if owner == rank() else labels.new_zeros(int(rows))
        test = features
    return list(zip(test.split(QUERIES), labels.split(QUERIES), strict=True)) if len(test) else []


def _merge(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest neighbours among the ``k`` nearest of each rank: similarities and labels, each (Q, k)."""
    shape = (world_size(), *similarity.shape)
    all_similarity = gather_detached(similarity).view(shape).transpose(0, 1).flatten(1)  # (Q, W*k)
    all_labels = gather_detached(labels).view(shape).transpose(0, 1).flatten(1)
    best, order = all_similarity.topk(k, dim=1)
    return best, all_labels.gather(1, order)
