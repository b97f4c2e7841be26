"""Linear probe on frozen features: multinomial logistic regression, several L2 strengths at once.

Collective: every rank passes its own, possibly unequal, shard and all get the same result; with one
process the shard is the whole set. N samples, F features, C classes, S strengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum
from sslzoo.evaluate.metrics import Standardizer, standardizer, within_top
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.nn.numerics import autocast_off

# Mean cross-entropy + l2/2 |W|^2 on standardised features; half a decade apart.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ITERATIONS = 100
CHUNK = 8192  # rows whose logits exist at a time


class ProbeResult(NamedTuple):
    """What the chosen probe reaches; accuracies are fractions."""

    top1: float
    top5: float
    l2: float
    holdout_top1: float


class LinearClassifiers(NamedTuple):
    """One softmax classifier a strength, on raw features."""

    standardize: Standardizer
    basis: Tensor  # (F, F), eigenvectors of the training covariance
    weight: Tensor  # (S, C, 1+F) in that basis, bias first

    def logits(self, x: Tensor) -> Tensor:
        """Of features (N, F): (S, N, C)."""
        z = self.standardize(x) @ self.basis
        return z @ self.weight[..., 1:].mT + self.weight[..., 0].unsqueeze(1)


@torch.no_grad()
def fit_linear(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    strengths: tuple[float, ...],
    report: Report = unseen,
    brief: bool = False,
) -> LinearClassifiers:
    """Minimise mean cross-entropy + l2/2 |W|^2 for each of ``strengths``; the bias is not penalised.

    The Hessian of softmax regression is at most 1/2 of the features' covariance in every class
    (Böhning 1992), so in the covariance's eigenbasis one diagonal step always descends, whatever the
    features' scale or conditioning. Nesterov acceleration with restarts (arXiv:1204.3982) on top.
    No randomness and no learning rate.
    """
    standardize = standardizer(x)
    z = standardize(x)
    count = all_reduce_sum(z.new_tensor([len(z)]))
    covariance = all_reduce_sum(z.T @ z) / count
    eigenvalues, basis = torch.linalg.eigh(covariance.double())
    basis = basis.to(z.dtype)
    z = torch.cat([z.new_ones(len(z), 1), z @ basis], dim=1)  # (N, 1+F)
    l2 = z.new_tensor(strengths)[:, None, None]  # (S, 1, 1)
    decay = l2 * (torch.arange(z.shape[1], device=z.device) > 0)  # (S, 1, 1+F)
    curvature = torch.cat([eigenvalues.new_ones(1), eigenvalues.clamp_min(0)]).to(z.dtype) / 2 + decay

    weight = z.new_zeros(len(strengths), classes, z.shape[1])
    ahead, inertia = weight.clone(), z.new_ones(len(strengths), 1, 1)
    iterations = 1 if brief else ITERATIONS
    for iteration in range(iterations):
        gradient = all_reduce_sum(_cross_entropy_gradient(z, y, ahead)) / count + decay * ahead
        new = ahead - gradient / curvature
        # Restart a problem's momentum where it points uphill.
        uphill = ((ahead - new) * curvature * (new - weight)).sum((1, 2), keepdim=True) > 0
        inertia = torch.where(uphill, 1.0, inertia)
        following = (1 + (1 + 4 * inertia * inertia).sqrt()) / 2
        ahead = new + (inertia - 1) / following * (new - weight)
        weight, inertia = new, following
        report((iteration + 1) / iterations)
    return LinearClassifiers(standardize, basis, weight)


def _cross_entropy_gradient(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of d cross-entropy / d ``weight`` (S, C, 1+F), in closed form."""
    total = torch.zeros_like(weight)
    flat = weight.flatten(0, 1)  # (S*C, 1+F)
    for rows, labels in zip(z.split(CHUNK), y.split(CHUNK), strict=True):
        error = (rows @ flat.T).unflatten(1, weight.shape[:2]).softmax(-1)  # (n, S, C)
        error.scatter_add_(
            2,
            labels[:, None, None].expand(-1, len(weight), 1),
            error.new_full((1, 1, 1), -1.0).expand(len(rows), len(weight), 1),
        )
        total += (error.flatten(1).T @ rows).view_as(weight)
    return total


@torch.no_grad()
def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    held_out: Tensor,
    *,
    classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
    report: Report = unseen,
    brief: bool = False,
) -> ProbeResult:
    """Fit on the training samples outside ``held_out`` (bool, N), choose the strength on those inside,
    report it on the test set once.

    Features are (N, F), standardised by the statistics of the fitted samples; labels (N,) int64. The
    strength that is right most often on the held-out samples wins, the larger of equal ones. ``brief``
    takes one iteration, which shows only that it can be done.
    Raises ``ValueError`` when nothing is held out, or everything.
    """
    with autocast_off(train_x):
        fitted = ~held_out
        model = fit_linear(
            train_x[fitted].float(),
            train_y[fitted],
            classes=classes,
            strengths=tuple(strengths),
            report=report,
            brief=brief,
        )
        chosen = _right(model, train_x[held_out].float(), train_y[held_out])  # (3, S)
        require(
            bool(chosen[2, 0] > 0), "no training sample is held out to choose the probe; raise probe.holdout"
        )
        # argmax of equal values: the last one is the most regularised.
        best = len(strengths) - 1 - int(chosen[0].flip(0).argmax())
        tested = _right(model, test_x.float(), test_y)
        require(bool(tested[2, 0] > 0), "the test set is empty")
    top1, top5, _ = (tested[:, best] / tested[2, best]).tolist()
    return ProbeResult(top1, top5, strengths[best], float(chosen[0, best] / chosen[2, best]))


def _right(model: LinearClassifiers, x: Tensor, y: Tensor) -> Tensor:
    """Over all ranks, by strength: samples right at top-1, at top-5, and samples (3, S)."""
    counts = x.new_zeros(3, len(model.weight), dtype=torch.float64)
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        logits = model.logits(rows)
        counts[0] += within_top(logits, labels, 1).sum(1)
        counts[1] += within_top(logits, labels, 5).sum(1)
        counts[2] += len(labels)
    return all_reduce_sum(counts)


@torch.no_grad()
def principal_components(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean (F,) and the ``width`` leading eigenvectors (F, width) of the covariance of ``x`` (N, F) over
    all ranks; at most F of them."""
    count = all_reduce_sum(x.new_tensor([len(x)]))
    mean = all_reduce_sum(x.sum(0)) / count
    centred = x - mean
    covariance = all_reduce_sum(centred.T @ centred) / count
    vectors = torch.linalg.eigh(covariance.double())[1].to(x.dtype)  # eigenvalues ascend
    return mean, vectors.flip(1)[:, :width]
