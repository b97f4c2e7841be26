"""MMCL's dual problems for all anchors at once, and four solvers (arXiv:2112.11450).

Anchor j is the positive of a kernel SVM whose negatives are the other points of a pool. Its dual
variables minimise 1/2 a' Delta_j a - 2 1'a over 0 <= a <= C, where
Delta_j[a, b] = s_j + k(a, b) - k(j, a) - k(j, b) + reg [a = b]. The matrices Delta_j are never formed, except
one at a time in :func:`solve_exact`, so the memory is O(M^2).

Shapes: M points in the pool, of which the first N are the anchors. M = N, or M = 2N if row N + j is the
other view of anchor j, its twin, which is not one of its negatives. The problems of n contiguous anchors are solved
here, those of this rank, or all N. E is the shifted Gram matrix of the pool; A (n, M) are the duals: row = anchor,
column = negative, 0 where the column is not a negative of the row. Criteria to stop are of all ranks: the argument
``of_ranks`` of a solver stacks a tensor of every rank, (W, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from sslzoo.nn.numerics import autocast_off, ieee_matmul
from sslzoo_methods.mmcl.config import Init, Step, Stop, Variant

CHECK_EVERY = (
    10  # updates between looks at the stopping criterion, for each of which the host waits for the device
)

OfRanks = Callable[[Tensor], Tensor]  # a tensor of every rank, stacked (W, ...)


def alone(x: Tensor) -> Tensor:
    """``of_ranks`` of problems that this rank solves alone."""
    return x[None]


class Solution(NamedTuple):
    """Result of a solver."""

    duals: Tensor  # (n, M)
    iterations: int  # number of updates
    change: float | None = None  # relative change at the last update, if that is the stopping criterion
    curvature: float | None = None  # max_j L_j over all ranks, if the step is a number


@dataclass(frozen=True)
class DualProblem:
    """The dual problems of the anchors ``first`` .. ``first + n - 1`` of a batch. ``gram`` and ``self_term`` may be
    shifted by a common constant."""

    gram: Tensor  # E (M, M), detached
    self_term: Tensor  # s (n,), shifted like E
    self_gap: Tensor  # s_j - k(x_j, x_j) (n,): 0 unless s is 1 and k(x, x) is not
    upper: float  # C; infinite if there is no bound
    reg: float
    definite: bool  # whether the kernel is positive semi-definite
    anchors: int  # N
    first: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the pool that are anchors here."""
        return slice(self.first, self.first + len(self.self_term))

    @property
    def twins(self) -> bool:
        """Whether the pool contains a second view of each anchor."""
        return len(self.gram) > self.anchors

    @property
    def variables(self) -> int:
        """Number of dual variables of the anchors here."""
        return len(self.self_term) * (len(self.gram) - 1 - self.twins)

    def own(self, rows: Tensor) -> Tensor:
        """The entries (n,) of ``rows`` (n, M) in the column of the row's own anchor, as a view."""
        return rows.diagonal(self.first)

    def twin(self, rows: Tensor) -> Tensor:
        """The entries (n,) of ``rows`` (n, M) in the column of the row's twin, as a view."""
        return rows.diagonal(self.anchors + self.first)

    def clear(self, duals: Tensor) -> Tensor:
        """Set entries that are not variables, those of the anchor itself and its twin, to 0 in place."""
        self.own(duals).zero_()
        if self.twins:
            self.twin(duals).zero_()
        return duals

    def project(self, duals: Tensor) -> Tensor:
        """Project onto the constraints 0 <= a <= C, in place."""
        return self.clear(duals.clamp_(0, self.upper))

    def gradient(self, duals: Tensor) -> Tensor:
        """Gradient (n, M) of all objectives by one matrix product; entries that are not variables are undefined.

        It is B E + reg A - diag(B E) + (sum A) (s - E_jj) - 2, where B is A with -sum_i A_ji in the column of
        anchor j itself.
        """
        return self.gradient_(duals.clone())

    def gradient_(self, duals: Tensor) -> Tensor:
        """The same; overwrites the entry of each row of ``duals`` in the column of its own anchor."""
        total = duals.sum(dim=1)
        self.own(duals).copy_(-total)
        with ieee_matmul():
            gradient = duals @ self.gram
        # Without the ridge, which would add rounding errors that grow with the sum of the duals.
        shift = total * self.self_gap - self.own(gradient) - 2
        return gradient.add_(duals, alpha=self.reg).add_(shift[:, None])

    def objective(self, duals: Tensor) -> Tensor:
        """The dual objectives (n,), including the ridge term."""
        return (duals * (self.gradient(duals) - 2)).sum(dim=1) / 2

    def lipschitz(self) -> Tensor:
        """L_j (n,), an upper bound of the largest eigenvalue of Delta_j, by three matrix products.

        With K_c the centred Gram matrix, u its column j and d = u_j, Delta_j is a principal submatrix of
        K_c - u 1' - 1 u' + d 1 1' + reg I, plus the self gap times 1 1'. The largest eigenvalue of K_c is at most
        its Schatten-16 norm. The other terms add at most M d if the kernel is positive semi-definite, and otherwise
        the largest eigenvalue of - u 1' - 1 u' + d 1 1', where u is orthogonal to 1:
        (M d + sqrt((M d)^2 + 4 M |u|^2)) / 2.
        """
        m, means = len(self.gram), self.gram.mean(dim=0)
        centred = _centre(self.gram)
        scale = centred.norm().clamp(min=torch.finfo(centred.dtype).tiny)
        power = centred / scale
        with ieee_matmul():
            for _ in range(3):
                power = power @ power
        top = scale * power.norm() ** (1 / 8)
        spread = m * (self.gram.diagonal() - 2 * means + means.mean())[self.rows]  # M d
        if self.definite:
            rest = spread.clamp(min=0)
        else:
            rest = (spread + (spread.square() + 4 * m * centred[self.rows].square().sum(dim=1)).sqrt()) / 2
        return top + rest + self.reg + (m - 1) * self.self_gap.clamp(min=0)

    def frobenius(self) -> Tensor:
        """|Delta_j|_F (n,) from row sums and elementwise products; with twins, which it includes, an upper bound."""
        m = len(self.gram) - 1
        ridged = self.gram + self.reg * torch.eye(m + 1, dtype=self.gram.dtype, device=self.gram.device)
        p = self.gram[self.rows].clone()  # k(j, a)
        q = ridged.sum(dim=1) - ridged[self.rows]  # row sums of the others
        for rows in (p, q):
            self.own(rows).zero_()
        p1, p2, q1, pq = p.sum(dim=1), p.square().sum(dim=1), q.sum(dim=1), (p * q).sum(dim=1)
        own = ridged.diagonal()[self.rows]
        rest = ridged.square().sum() - 2 * ridged[self.rows].square().sum(dim=1) + own.square()
        s = self.self_term
        square = (m * s).square() + rest + 2 * m * p2 + 2 * p1.square() + 2 * s * q1 - 4 * s * m * p1 - 4 * pq
        return square.clamp(min=0).sqrt()

    def residual(self, duals: Tensor, lipschitz: Tensor) -> Tensor:
        """Relative KKT residual |a - clip(a - g / L_j)| / |a| (n,): 0 only at the optimum; 1 at a suboptimal a = 0."""
        moved = self.project(duals - self.gradient(duals) / lipschitz[:, None])
        change, size, tiny = (duals - moved).norm(dim=1), duals.norm(dim=1), torch.finfo(duals.dtype).tiny
        return change / torch.where(size > tiny, size, change).clamp(min=tiny)


P = ParamSpec("P")
T = TypeVar("T")


def _in_full_precision(
    solver: Callable[Concatenate[DualProblem, P], T],
) -> Callable[Concatenate[DualProblem, P], T]:
    """Run ``solver`` without gradients and with autocast off."""

    @wraps(solver)
    def solve(problem: DualProblem, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), autocast_off(problem.gram):
            return solver(problem, *args, **kwargs)

    return solve


def _centre(gram: Tensor) -> Tensor:
    """Remove row and column means from ``gram``, and with them any constant shift."""
    means = gram.mean(dim=0)
    return (gram - means[:, None]).sub_(means - means.mean())


@_in_full_precision
def inverse_duals(problem: DualProblem) -> Tensor:
    """The unclipped duals 2 Delta_j^-1 1 (n, M), from a single factorisation.

    With H = (K_c + reg I)^-1 projected orthogonally to 1, the duals are -2 H_ji / (1 - r_j H_jj). To be accurate
    in float32, the eigenvalue along 1 is raised to the mean of the others before the factorisation, and the
    inverse is centred afterwards. The denominator is positive for positive semi-definite kernels; for others it
    may have any sign and is not guarded.
    """
    m = len(problem.gram)
    centred = _centre(problem.gram)
    lift = centred.trace() / (m - 1)
    if not problem.definite:
        lift = lift.clamp(min=0)
    centred.add_(lift / m).diagonal().add_(problem.reg)
    inverse = _centre(_inverse(centred, problem.definite))  # H
    rows = inverse[problem.rows]
    if problem.twins:  # remove the twin p from the problem: H - H_:p H_p: / H_pp
        twin = inverse[problem.anchors :][problem.rows]
        rows = rows - (problem.own(twin) / problem.twin(twin))[:, None] * twin
    diagonal = problem.own(rows)
    ratio = 1 - (problem.reg - problem.self_gap) * diagonal
    return problem.clear(rows * (-2 / ratio)[:, None])


def _inverse(matrix: Tensor, definite: bool) -> Tensor:
    """The inverse of a symmetric matrix, without a host-device synchronisation; NaN if it cannot be factored."""
    # LAPACK's layout is that of the transpose, which is the same matrix: nothing is reordered in what follows.
    if not definite:
        inverse, info = torch.linalg.inv_ex(matrix.mT)
    else:
        factor, info = torch.linalg.cholesky_ex(matrix.mT)
        inverse = torch.cholesky_inverse(factor)
    return inverse.mT.add_(torch.where(info == 0, 0.0, torch.nan))


@_in_full_precision
def solve_inv(problem: DualProblem) -> Solution:
    """INV ("least squares"): the clipped unconstrained minimiser, which is not the constrained optimum."""
    return Solution(problem.project(inverse_duals(problem)), 1)


@_in_full_precision
def start_point(problem: DualProblem, init: Init, seed: int) -> tuple[Tensor, float]:
    """Initial point (n, M) of :func:`solve_pgd` and theta_0 in [1e-8, 1), both drawn with ``seed``.

    ``gaussian`` is the relu of a standard normal draw as in the official code, so about half are exact zeros. It is
    drawn for all anchors, so that those of a rank do not depend on the number of ranks. The host waits for nothing.
    """
    like = problem.gram
    host = torch.Generator().manual_seed(seed)
    theta = 1e-8 + (1 - 1e-8) * float(torch.rand((), generator=host))
    if init == "zero":
        return like.new_zeros(len(problem.self_term), len(like)), theta
    if init == "inv":
        return solve_inv(problem).duals, theta
    generator = host if like.device.type == "cpu" else torch.Generator(like.device).manual_seed(seed)
    shape = (problem.anchors, len(like))
    normal = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return problem.project(normal[problem.rows].clone()), theta


@_in_full_precision
def solve_pgd(
    problem: DualProblem,
    start: Tensor,
    *,
    theta: float,
    variant: Variant,
    step: Step,
    max_iter: int,
    stop: Stop,
    tol: float,
    of_ranks: OfRanks = alone,
) -> Solution:
    """Projected gradient descent as in the authors' code: all anchors share momentum and stopping criterion.

    ``variant``: ``nesterov`` (momentum from theta_0 = ``theta``, no restarts) or ``vanilla``. ``step``: a
    number, ``frobenius`` (1/|Delta_j|_F) or ``lipschitz`` (1/L_j). ``stop``: ``relative_change`` stops when the mean
    over all variables of |new - old| / (old + 1e-7) is below ``tol`` after an update; ``kkt`` when the
    largest :meth:`DualProblem.residual` is, after a tenth one. In both cases the host waits once in ten updates: it
    then looks at the changes of all ten, and drops those after the first that was small enough.
    """
    bound = problem.lipschitz()
    curvature: list[Tensor] = []
    if isinstance(step, str):
        rate = (bound if step == "lipschitz" else problem.frobenius()).reciprocal()[:, None]
    else:
        rate = bound.new_full((), step)
        curvature = [of_ranks(bound.max()).amax(dim=0, keepdim=True)]
    duals, point = start, start.clone()
    moved, size = torch.empty_like(start), torch.empty_like(start)
    block: list[tuple[Tensor, Tensor]] = []  # duals and sums of changes, not looked at yet
    for iteration in range(1, max_iter + 1):
        gradient = problem.gradient_(point)
        new = problem.project(torch.addcmul(point, gradient, rate, value=-1, out=gradient))
        torch.sub(new, duals, out=moved)
        if variant == "nesterov":
            square = theta * theta
            following = (math.sqrt(square * square + 4 * square) - square) / 2
            torch.add(new, moved, alpha=theta * (1 - theta) / (square + following), out=point)
            theta = following
        else:
            point.copy_(new)
        if stop == "relative_change":
            block.append((new, moved.abs_().div_(torch.add(duals, 1e-7, out=size)).sum()))
        duals = new
        if iteration % CHECK_EVERY and iteration < max_iter:
            continue
        if stop == "kkt":
            if _converged(problem, duals, bound, tol, of_ranks):
                return Solution(duals, iteration, None, *map(float, curvature))
            continue
        sums = torch.stack([total for _, total in block])
        looked = torch.cat([of_ranks(sums / problem.variables).mean(dim=0), *curvature]).tolist()
        for i, (found, _) in enumerate(block):
            done = iteration - len(block) + 1 + i
            if looked[i] < tol or done == max_iter:
                return Solution(found, done, looked[i], *looked[len(block) :])
        block.clear()
    return Solution(duals, max_iter, None, *map(float, curvature))


def _converged(problem: DualProblem, duals: Tensor, bound: Tensor, tol: float, of_ranks: OfRanks) -> bool:
    """Whether the residuals of all ranks are below ``tol``. The host waits for the device."""
    return bool((of_ranks(problem.residual(duals, bound).max()) < tol).all())


@_in_full_precision
def solve_adaptive(
    problem: DualProblem, *, max_iter: int, tol: float | None, of_ranks: OfRanks = alone
) -> Solution:
    """The optimum by FISTA from zero, with step 1/L_j and restarts per anchor; deterministic.

    Stops when the largest :meth:`DualProblem.residual` is below ``tol``, tested at every tenth update. With ``tol``
    None it does exactly ``max_iter`` updates, without a host-device synchronisation.
    """
    bound = problem.lipschitz()
    rate = bound.reciprocal()[:, None]
    duals = problem.gram.new_zeros(len(problem.self_term), len(problem.gram))
    point = duals.clone()
    age = rate.new_ones(rate.shape)  # t_k of each anchor
    for iteration in range(1, max_iter + 1):
        gradient = problem.gradient_(point)
        new = problem.project(torch.addcmul(point, gradient, rate, value=-1, out=gradient))
        moved = new - duals
        uphill = ((point - new) * moved).sum(dim=1, keepdim=True) > 0
        age = torch.where(uphill, 1.0, age)
        following = (1 + (1 + 4 * age.square()).sqrt()) / 2
        point = torch.addcmul(new, moved, (age - 1) / following)
        duals, age = new, following
        if (
            tol is not None
            and iteration % CHECK_EVERY == 0
            and _converged(problem, duals, bound, tol, of_ranks)
        ):
            return Solution(duals, iteration)
    return Solution(duals, max_iter)


@_in_full_precision
def solve_exact(problem: DualProblem, *, of_ranks: OfRanks = alone) -> Solution:
    """The optimum computed in float64, for tests and debugging: FISTA, then an active-set refinement per anchor.

    Slow, O(N M^3). The result has the precision of ``problem``, which must be strictly convex.
    """
    gram, self_term = problem.gram.double(), problem.self_term.double()
    gap = self_term - gram.diagonal()[problem.rows]
    exact = replace(problem, gram=gram, self_term=self_term, self_gap=gap)
    rough = solve_adaptive(exact, max_iter=20_000, tol=1e-10, of_ranks=of_ranks)
    rows = [_polish(exact, j, row) for j, row in enumerate(rough.duals)]
    return Solution(torch.stack(rows).to(problem.gram.dtype), rough.iterations)


def _polish(problem: DualProblem, j: int, rough: Tensor) -> Tensor:
    """Refine the approximate optimum ``rough`` (M,) of row ``j``; returns it unchanged if the active set cycles."""
    keep, anchor = torch.ones_like(rough, dtype=torch.bool), problem.first + j
    keep[anchor] = False
    if problem.twins:
        keep[problem.anchors + anchor] = False
    gram, row = problem.gram[keep][:, keep], problem.gram[anchor, keep]
    delta = problem.self_term[j] + gram - row[:, None] - row
    delta.diagonal().add_(problem.reg)
    near = rough[keep]
    gradient = delta @ near - 2
    low = near - gradient <= 0
    high = near - gradient >= problem.upper
    for _ in range(50):
        free = ~(low | high)
        near = torch.zeros_like(near)
        near[high] = problem.upper
        near[free] = torch.linalg.solve(delta[free][:, free], 2 - delta[free] @ near)
        gradient = delta @ near - 2
        slack = 1e-12 * (1 + near.abs().max())
        new_low = torch.where(free, near < -slack, low & (gradient >= -slack))
        new_high = torch.where(free, near > problem.upper + slack, high & (gradient <= slack))
        if bool((new_low == low).all() and (new_high == high).all()):
            out = torch.zeros_like(rough)
            out[keep] = near.clamp(0, problem.upper)
            return out
        low, high = new_low, new_high
    return rough
