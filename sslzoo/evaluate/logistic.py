"""Linear probe on frozen features: multinomial logistic regression for several L2 strengths at once.

Collective: every rank passes its shard, whose size may differ, and all ranks get the same result. Shapes:
N samples, F features, C classes, S strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum, broadcast_from_zero
from sslzoo.evaluate.metrics import Standardizer, standardizer, within_top
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import CHUNK, Features, Task, rows_to_learn
from sslzoo.nn.numerics import autocast_off, ieee_matmul


class Effort(NamedTuple):
    """Which optima are sought, and how closely they are approached."""

    strengths: tuple[float, ...]  # values of l2 in mean cross-entropy + l2/2 |W|^2 on standardised features
    tolerance: float  # a fit has converged if its gradient's norm is this fraction of that at zero weights
    iterations: int  # maximum, each one pass over the samples


QUICK = Effort((3e-4, 3e-3, 3e-2), 1e-3, 50)  # during training
# The objective is at least as low as that of scikit-learn's L-BFGS with its default tolerance.
THOROUGH = Effort((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 2e-4, 1000)

PAIRS = 5  # steps that L-BFGS remembers
TOO_LONG = 0.8  # a step that ends uphill, at this fraction of the steepness at its start, is shortened
LOGITS = 2**24  # maximum number of logits at a time: 64 MiB
KEPT = (
    2**26
)  # standardised features are kept in memory up to this many values (256 MiB), otherwise made in each pass


class Fit(NamedTuple):
    """How the fit for one strength ended."""

    l2: float
    iterations: int
    gradient: float  # norm of the gradient as a fraction of that at zero weights
    converged: bool


def converged(fits: Sequence[Fit]) -> str:
    """Which of ``fits`` have converged, and after how many iterations, as text."""
    most = f"{max((fit.iterations for fit in fits), default=0):,} iterations"
    left = ", ".join(f"L2 {fit.l2:g}" for fit in fits if not fit.converged)
    return f"all but {left} ({most})" if left else f"all {len(fits)} in {most}"


class ProbeResult(NamedTuple):
    """Results of the selected probe; accuracies are fractions."""

    top1: float
    top5: float
    l2: float
    holdout_top1: float
    fits: tuple[Fit, ...]  # of all strengths


class LinearClassifiers(NamedTuple):
    """One softmax classifier per strength, on standardised features."""

    standardize: Standardizer
    weight: Tensor  # (S, C, F)
    bias: Tensor  # (S, C)
    fits: tuple[Fit, ...]

    def logits(self, x: Tensor) -> Tensor:
        """Logits (S, N, C) of raw features ``x`` (N, F)."""
        return self.standardize(x) @ self.weight.mT + self.bias.unsqueeze(1)


@torch.no_grad()
def fit_linear(
    data: Features, rows: Tensor, *, classes: int, effort: Effort, report: Report = unseen
) -> LinearClassifiers:
    """Minimise mean cross-entropy + l2/2 |W|^2 over ``rows`` (indices) for each strength; the bias is not penalised.

    The variables are changed such that the Hessian at zero weights, (covariance of the features / C + l2) for every
    class, becomes the identity. L-BFGS (Nocedal, Math. Comp. 35, 1980) then needs few iterations for any scale and
    conditioning of the features, and neither random numbers nor a learning rate. All strengths share each pass over
    the samples; those that have converged leave.
    """
    standardize = standardizer(data, rows)
    size = _rows_at_a_time(len(effort.strengths), classes)

    def read() -> Iterable[tuple[Tensor, Tensor]]:
        return ((standardize(x), y) for x, y in data.chunks(rows, size))

    kept = list(read()) if len(rows) * data.x.shape[1] <= KEPT else None

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return read() if kept is None else kept

    count = all_reduce_sum(standardize.mean.new_tensor([len(rows)]))
    covariance = count.new_zeros(data.x.shape[1], data.x.shape[1])
    for z, _ in batches():
        covariance.addmm_(z.T, z)
    root = _root(all_reduce_sum(covariance) / count, effort.strengths, classes)
    l2 = count.new_tensor(effort.strengths)[:, None, None]  # (S, 1, 1)

    def gradient(weight: Tensor, l2: Tensor) -> Tensor:
        total = all_reduce_sum(_cross_entropy_gradient(batches(), weight)) / count
        total[..., 1:] += l2 * weight[..., 1:]
        return total

    weight, fits = _minimise(gradient, root, l2, classes, effort, report)
    return LinearClassifiers(standardize, weight[..., 1:], weight[..., 0], fits)


def _rows_at_a_time(strengths: int, classes: int) -> int:
    return max(1, min(CHUNK, LOGITS // (strengths * classes)))


def _root(covariance: Tensor, strengths: tuple[float, ...], classes: int) -> Tensor:
    """Cholesky factors (S, 1+F, 1+F), bias first, of (``covariance`` / C + l2) for each of ``strengths``."""
    width = 1 + len(covariance)
    root = covariance.new_empty(len(strengths), width, width)
    # A bound on rounding errors, which may make the smallest eigenvalues negative.
    rounding = width * torch.finfo(covariance.dtype).eps
    for factor, l2 in zip(root, strengths, strict=True):
        hessian = torch.zeros_like(factor, dtype=torch.float64)
        hessian[0, 0] = 1 / classes  # standardised features have no covariance with the bias
        hessian[1:, 1:] = covariance.double() / classes
        hessian.diagonal()[1:] += l2 + rounding
        factor.copy_(torch.linalg.cholesky(hessian))
    return root


def _cross_entropy_gradient(batches: Iterable[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Sum over the samples of d cross-entropy / d ``weight`` (S, C, 1+F), bias first, in closed form."""
    strengths, classes = weight.shape[:2]
    flat = weight.flatten(0, 1)  # (S*C, 1+F)
    total = torch.zeros_like(flat)
    for z, y in batches:
        error = torch.addmm(flat[:, 0], z, flat[:, 1:].T).unflatten(1, (strengths, classes)).softmax(-1)
        error.scatter_add_(
            2,
            y[:, None, None].expand(-1, strengths, 1),
            error.new_full((1, 1, 1), -1.0).expand(len(y), strengths, 1),
        )
        total[:, 0] += error.flatten(1).sum(0)
        total[:, 1:].addmm_(error.flatten(1).T, z)
    return total.view_as(weight)


class _Pair(NamedTuple):
    """A step of L-BFGS (S, C, 1+F), the change of the gradient over it, and the inverse of their product (S, 1, 1)."""

    step: Tensor
    change: Tensor
    inverse: Tensor  # 0 where no step was made


def _minimise(
    gradient_of: Callable[[Tensor, Tensor], Tensor],
    root: Tensor,
    l2: Tensor,
    classes: int,
    effort: Effort,
    report: Report,
) -> tuple[Tensor, tuple[Fit, ...]]:
    """Minimise S convex functions of weights (C, 1+F), from zero, by L-BFGS in the variables weights @ ``root``.

    ``gradient_of(weights, l2)`` gives the gradients of all or some functions. Returns the weights (S, C, 1+F) and how
    each fit ended.
    """

    def evaluate(points: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the changed variables, and norms of the gradients, of the functions ``some`` (indices)."""
        plain = gradient_of(solve(root[some], points, upper=False, left=False), l2[some])
        return solve(root[some].mT, plain, upper=True, left=False), plain.flatten(1).norm(dim=1)

    solve, worst = torch.linalg.solve_triangular, 1.0
    point = root.new_zeros(len(root), classes, root.shape[1])
    active = torch.arange(len(root), device=root.device)
    gradient, norm = evaluate(point, active)
    start, iterations = norm.clamp_min(torch.finfo(norm.dtype).tiny), [0] * len(root)
    left = (norm / start).tolist()
    direction, step, scale = -gradient, torch.ones_like(l2), torch.ones_like(l2)
    pairs: list[_Pair] = []
    for iteration in range(1, effort.iterations + 1):
        # What remains, of the iterations and of the way to the tolerance, both shrink.
        report(1 - (1 - (iteration - 1) / effort.iterations) * (1 - log(worst) / log(effort.tolerance)))
        trial = point + step * direction
        new, new_norm = gradient.clone(), norm.clone()
        new[active], new_norm[active] = evaluate(trial[active], active)
        # On a convex function the slope along the direction only grows, so that no function value is needed.
        before, slope = _dot(gradient, direction), _dot(new, direction)
        accepted = torch.zeros_like(slope, dtype=torch.bool).index_fill_(0, active, True)
        accepted &= ~(slope > -TOO_LONG * before)
        moved, change = (torch.where(accepted, d, 0.0) for d in (trial - point, new - gradient))
        curved = _dot(moved, change)
        pairs = [*pairs, _Pair(moved, change, torch.where(curved > 0, 1 / curved, 0.0))][-PAIRS:]
        scale = torch.where(curved > 0, curved / _dot(change, change), scale)
        point, gradient = torch.where(accepted, trial, point), torch.where(accepted, new, gradient)
        norm = torch.where(accepted.flatten(), new_norm, norm)
        direction = torch.where(accepted, -_quasi_newton(gradient, pairs, scale), direction)
        step = torch.where(accepted, 1.0, step * before / (before - slope))
        # Rank 0's numbers decide, because other processors may round differently.
        left = broadcast_from_zero(norm / start).tolist()
        for i in active.tolist():
            iterations[i] = iteration
        unfinished = [i for i, part in enumerate(left) if part > effort.tolerance]
        if not unfinished:
            break
        worst = min(worst, max(left[i] for i in unfinished))
        active = torch.tensor(unfinished, device=root.device)
    report(1.0)
    fits = [
        Fit(strength, used, part, part <= effort.tolerance)
        for strength, used, part in zip(effort.strengths, iterations, left, strict=True)
    ]
    return solve(root, point, upper=False, left=False), tuple(fits)


def _quasi_newton(gradient: Tensor, pairs: list[_Pair], scale: Tensor) -> Tensor:
    """The L-BFGS estimate of the inverse Hessian, initially ``scale``, times ``gradient``: the two-loop recursion."""
    result, shares = gradient, list[Tensor]()
    for pair in reversed(pairs):
        shares.append(pair.inverse * _dot(pair.step, result))
        result = result - shares[-1] * pair.change
    result = scale * result
    for pair, share in zip(pairs, reversed(shares), strict=True):
        result = result + (share - pair.inverse * _dot(pair.change, result)) * pair.step
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products (S, 1, 1) of the functions' vectors."""
    return (a * b).sum((1, 2), keepdim=True)


@torch.no_grad()
def linear_probe(task: Task, *, effort: Effort, report: Report = unseen, brief: bool = False) -> ProbeResult:
    """Fit on the training samples, select the strength on the held-out samples, and test once.

    Features are standardised with statistics of the fitted samples. The selected strength has the best accuracy on
    the held-out samples (ties: the largest). Non-finite training samples are skipped; non-finite held-out and test
    samples count as wrong. If no training samples remain, the accuracy is 0. ``brief`` does one iteration for one
    strength, for dry runs. Raises ``ValueError`` if no sample, or every sample, is held out.
    """
    if brief:
        effort = effort._replace(strengths=effort.strengths[:1], iterations=1)
    train, test, strengths = task.train, task.test, effort.strengths
    rows, usable = rows_to_learn(task)
    if usable == 0:
        return ProbeResult(0.0, 0.0, max(strengths), 0.0, ())
    with autocast_off(train.label), ieee_matmul():
        model = fit_linear(
            train,
            rows,
            classes=task.classes,
            effort=effort,
            report=report,
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
    return ProbeResult(top1, top5, strengths[best], float(chosen[0, best] / chosen[2, best]), model.fits)


def _right(model: LinearClassifiers, data: Features, rows: Tensor | None = None) -> Tensor:
    """Numbers (3, S) of ``rows`` (default: all) correct at top-1, correct at top-5, and in total, over all ranks."""
    counts = model.weight.new_zeros(3, len(model.weight), dtype=torch.float64)
    for x, y in data.chunks(rows, _rows_at_a_time(*model.bias.shape)):
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
