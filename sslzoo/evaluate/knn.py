"""Weighted cosine k-NN (Wu et al., arXiv:1805.01978, section 3.4), exact and sharded over ranks.

Q queries, M samples in the bank, F features, C classes.
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
    """Cosine similarities and labels of the ``k`` nearest of ``bank`` (M, F), each (Q, k), descending.

    ``queries`` (Q, F) and ``bank`` are L2-normalised. A bank of fewer than ``k`` is filled up with
    similarity -inf.
    """
    similarity = queries.new_full((len(queries), k), float("-inf"))
    found = labels.new_zeros(len(queries), k)
    for part, part_labels in zip(bank.split(BANK), labels.split(BANK), strict=True):
        value, index = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity, order = torch.cat([similarity, value], dim=1).topk(k, dim=1)
        found = torch.cat([found, part_labels[index]], dim=1).gather(1, order)
    return similarity, found


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Class scores (Q, C): the sum of exp(similarity / temperature) of the neighbours of each class.

    Scaled by the nearest one's weight, which keeps small temperatures finite and no decision changes.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


@torch.no_grad()
def knn_accuracy(task: Task, *, k: int, temperature: float, report: Report = unseen) -> float:
    """Top-1 accuracy, a fraction, of the test samples voted by those of the bank.

    Collective: every rank passes its own shards, which may be unequal or empty. The queries of each
    rank visit all banks and only the k best of each return, so no Q x M matrix is ever held. Rows that are
    not finite are nobody's neighbours, and wrong when they are tested.
    Raises ``ValueError`` when ``k`` exceeds the whole bank.
    """
    bank, bank_labels, _ = task.bank()
    test, test_labels, _ = task.test
    sizes = all_reduce_sum(torch.tensor([len(bank), len(test)], device=bank.device))
    require(
        k <= int(sizes[0]),
        f"eval.knn_k={k} exceeds the {int(sizes[0])} training samples of the bank; lower eval.knn_k",
    )
    require(int(sizes[1]) > 0, "the test set is empty")
    known = finite_rows(bank)
    if not bool(known.all()):
        bank, bank_labels = bank[known], bank_labels[known]
    bank, test = normalize(bank), normalize(test)
    right = torch.zeros(1, dtype=torch.int64, device=bank.device)
    for owner in range(world_size()):
        chunks = _queries(test, test_labels, owner)
        for done, (queries, labels) in enumerate(chunks, 1):
            similarity, found = nearest(queries, bank, bank_labels, k)
            if world_size() > 1:
                similarity, found = _merge(similarity, found, k)
            if owner == rank():
                scores = vote(similarity, found, classes=task.classes, temperature=temperature)
                # Of a query that is not finite, or has no neighbour, no score is a number.
                right += ((scores.argmax(1) == labels) & scores.isfinite().all(1)).sum()
            report((owner + done / len(chunks)) / world_size())
    return int(all_reduce_sum(right)) / int(sizes[1])


def _queries(test: Tensor, labels: Tensor, owner: int) -> list[tuple[Tensor, Tensor]]:
    """The chunks of rank ``owner``'s test shard, on every rank; their labels on the owner only."""
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
    """The ``k`` best of every rank's ``k`` best, each (Q, k)."""
    shape = (world_size(), *similarity.shape)
    all_similarity = gather_detached(similarity).view(shape).transpose(0, 1).flatten(1)  # (Q, W*k)
    all_labels = gather_detached(labels).view(shape).transpose(0, 1).flatten(1)
    best, order = all_similarity.topk(k, dim=1)
    return best, all_labels.gather(1, order)
