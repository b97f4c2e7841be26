"""Linear probe on frozen features: multinomial logistic regression for several L2 strengths at once.

Collective: every rank passes its shard, whose size may differ, and all ranks get the same result. Shapes:
N samples, F features, C classes, S strengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum
from sslzoo.evaluate.metrics import Standardizer, standardizer, within_top
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import CHUNK, Features, Task, rows_to_learn
from sslzoo.nn.numerics import autocast_off

# Values of l2 in mean cross-entropy + l2/2 |W|^2 on standardised features. On 12,000 images, seven strengths and 100
# iterations give accuracies within one point of these.
STRENGTHS = (3e-4, 3e-3, 3e-2)
ITERATIONS = 50


class ProbeResult(NamedTuple):
    """Results of the selected probe; accuracies are fractions."""

    top1: float
    top5: float
    l2: float
    holdout_top1: float


class LinearClassifiers(NamedTuple):
    """One softmax classifier per strength, on standardised features."""

    standardize: Standardizer
    weight: Tensor  # (S, C, F)
    bias: Tensor  # (S, C)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (S, N, C) of raw features ``x`` (N, F)."""
        return self.standardize(x) @ self.weight.mT + self.bias.unsqueeze(1)


@torch.no_grad()
def fit_linear(
    data: Features,
    rows: Tensor,
    *,
    classes: int,
    strengths: tuple[float, ...],
    report: Report = unseen,
    brief: bool = False,
) -> LinearClassifiers:
    """Minimise mean cross-entropy + l2/2 |W|^2 over ``rows`` (indices) for each of ``strengths``; the bias is
    not penalised.

    The Hessian of softmax regression is bounded by half of the features' covariance for every class (Böhning
    1992), so a step with the inverse of (covariance / 2 + l2) always decreases the objective, for any scale and
    conditioning of the features. It is combined with Nesterov acceleration and restarts (arXiv:1204.3982), and
    needs neither random numbers nor a learning rate.
    """
    standardize = standardizer(data, rows)
    count = all_reduce_sum(standardize.mean.new_tensor([len(rows)]))
    covariance = count.new_zeros(data.x.shape[1], data.x.shape[1])
    for x, _ in data.chunks(rows):
        z = standardize(x)
        covariance.addmm_(z.T, z)
    covariance = all_reduce_sum(covariance) / count
    l2 = covariance.new_tensor(strengths)[:, None, None]  # (S, 1, 1)
    # Add a bound on rounding errors, which may make the smallest eigenvalues too small; a larger bound is still valid.
    rounding = len(covariance) * torch.finfo(covariance.dtype).eps
    curvature = covariance.double() / 2 + (l2 + rounding) * torch.eye(len(covariance), device=l2.device)
    root = torch.linalg.cholesky(curvature).to(l2.dtype)  # (S, F, F)

    weight = l2.new_zeros(len(strengths), classes, 1 + len(covariance))  # bias first
    ahead, inertia = weight.clone(), l2.new_ones(len(strengths), 1, 1)
    iterations = 1 if brief else ITERATIONS
    for iteration in range(iterations):
        gradient = all_reduce_sum(_cross_entropy_gradient(data, rows, standardize, ahead)) / count
        gradient[..., 1:] += l2 * ahead[..., 1:]
        step = torch.cat([2 * gradient[..., :1], torch.cholesky_solve(gradient[..., 1:].mT, root).mT], dim=2)
        new = ahead - step
        # Restart the momentum of a problem if it points uphill.
        uphill = (gradient * (new - weight)).sum((1, 2), keepdim=True) > 0
        inertia = torch.where(uphill, 1.0, inertia)
        following = (1 + (1 + 4 * inertia * inertia).sqrt()) / 2
        ahead = new + (inertia - 1) / following * (new - weight)
        weight, inertia = new, following
        report((iteration + 1) / iterations)
    return LinearClassifiers(standardize, weight[..., 1:], weight[..., 0])


def _cross_entropy_gradient(
    data: Features, rows: Tensor, standardize: Standardizer, weight: Tensor
) -> Tensor:
    """Sum over ``rows`` of d cross-entropy / d ``weight`` (S, C, 1+F), bias first, in closed form."""
    strengths, classes = weight.shape[:2]
    flat = weight.flatten(0, 1)  # (S*C, 1+F)
    total = torch.zeros_like(flat)
    for x, y in data.chunks(rows):
        z = standardize(x)
        error = torch.addmm(flat[:, 0], z, flat[:, 1:].T).unflatten(1, (strengths, classes)).softmax(-1)
        error.scatter_add_(
            2,
            y[:, None, None].expand(-1, strengths, 1),
            error.new_full((1, 1, 1), -1.0).expand(len(y), strengths, 1),
        )
        total[:, 0] += error.flatten(1).sum(0)
        total[:, 1:].addmm_(error.flatten(1).T, z)
    return total.view_as(weight)


@torch.no_grad()
def linear_probe(
    task: Task,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    report: Report = unseen,
    brief: bool = False,
) -> ProbeResult:
    """Fit on the training samples, select the strength on the held-out samples, and test once.

    Features are standardised with statistics of the fitted samples. The selected strength has the best accuracy on
    the held-out samples (ties: the largest). Non-finite training samples are skipped; non-finite held-out and test
    samples count as wrong. If no training samples remain, the accuracy is 0. ``brief`` does one iteration, for
    dry runs. Raises ``ValueError`` if no sample, or every sample, is held out.
    """
    train, test = task.train, task.test
    rows, usable = rows_to_learn(task)
    if usable == 0:
        return ProbeResult(0.0, 0.0, max(strengths), 0.0)
    with autocast_off(train.label):
        model = fit_linear(
            train,
            rows,
            classes=task.classes,
            strengths=tuple(strengths),
            report=report,
            brief=brief,
        )
        chosen = _right(model, train, task.roles.held_out.nonzero().squeeze(1))  # (3, S)
        require(
            bool(chosen[2, 0] > 0), "no training sample is held out to choose the probe; raise probe.holdout"
        )
        # argmax returns the first of equal values; flipped, it is the largest strength.
        best = len(strengths) - 1 - int(chosen[0].flip(0).argmax())
        tested = _right(model, test)
        require(bool(tested[2, 0] > 0), "the test set is empty")
    top1, top5, _ = (tested[:, best] / tested[2, best]).tolist()
    return ProbeResult(top1, top5, strengths[best], float(chosen[0, best] / chosen[2, best]))


def _right(model: LinearClassifiers, data: Features, rows: Tensor | None = None) -> Tensor:
    """Numbers (3, S) of ``rows`` (default: all) correct at top-1, correct at top-5, and in total, over all ranks."""
    counts = model.weight.new_zeros(3, len(model.weight), dtype=torch.float64)
    for x, y in data.chunks(rows):
        logits = model.logits(x)
        counts[0] += within_top(logits, y, 1).sum(1)
        counts[1] += within_top(logits, y, 5).sum(1)
        counts[2] += len(y)
    return all_reduce_sum(counts)


@torch.no_grad()
def principal_components(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean (F,) and the leading eigenvectors (F, min(width, F)) of the covariance of ``x`` (N, F) over all
    ranks."""
    count = all_reduce_sum(x.new_tensor([len(x)]))
    mean = all_reduce_sum(x.sum(0)) / count
    covariance = x.new_zeros(x.shape[1], x.shape[1])
    for part in x.split(CHUNK):
        covariance.addmm_((part - mean).T, part - mean)
    covariance = all_reduce_sum(covariance) / count
    vectors = torch.linalg.eigh(covariance.double())[1].to(x.dtype)  # eigenvalues ascend
    return mean, vectors.flip(1)[:, :width]
