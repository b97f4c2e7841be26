"""MMCL's objective. Pure: no module, no state, no process group (arXiv:2112.11450).

Letters: N anchors of the global batch, M points in the pool of negatives (N, or 2N with the other view),
n queries on this rank, D embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.numerics import autocast_off, normalize
from sslzoo_methods.mmcl.config import AlphaNormalize, SelfTerm
from sslzoo_methods.mmcl.kernels import Kernel, kernel_shift, shifted_gram, shifted_kernel
from sslzoo_methods.mmcl.solvers import DualProblem


@torch.no_grad()
def dual_problem(
    pool: Tensor,
    *,
    anchors: int,
    kernel: Kernel,
    self_term: SelfTerm,
    C: float | None,
    reg: float,
) -> DualProblem:
    """The SVM duals (2.2) of a batch. No gradient.

    ``pool`` (M, D): projections of the anchors, then, for the 2N - 2 variant, of their other views in the
    same order; of any norm. ``self_term``: ``one`` puts s_j = 1 (the official code), ``kernel`` puts
    k(x_j, x_j) (the exact derivation). ``C`` of None is no bound. Raises ``ValueError`` for fewer than two anchors.
    """
    require(
        anchors > 1,
        f"MMCL needs at least 2 images in a batch, got {anchors}: with one there is no negative; "
        "raise data.global_batch_size",
    )
    assert len(pool) in (anchors, 2 * anchors)
    x = normalize(pool)
    with autocast_off(x):
        gram = shifted_gram(x, kernel=kernel)
        own = gram.diagonal()[:anchors]
        if self_term == "one":
            own = torch.zeros_like(own) + (1 - kernel_shift(kernel))
    return DualProblem(
        gram=gram,
        self_term=own.clone(),
        upper=math.inf if C is None else C,
        reg=reg,
        definite=kernel.name != "tanh",
    )


def mmcl_loss(
    queries: Tensor,
    pool: Tensor,
    duals: Tensor,
    *,
    first: int,
    kernel: Kernel,
    alpha_normalize: AlphaNormalize,
) -> Tensor:
    """Minus the mean SVM score of the queries, equation 2.4: mean_j sum_i alpha_ji (k(x_i, z_j) - k(x_j, z_j)).

    ``queries`` (n, D): another view of anchors ``first`` .. ``first + n - 1``, one row each. ``pool`` (M, D) and
    ``duals`` (N, M) as in :func:`dual_problem`. Rows of any norm are normalised here. The duals are constants;
    gradient reaches the queries and the pool, the latter as positives and as negatives.
    ``alpha_normalize`` of ``mean`` divides the duals by the mean of alpha_x,j = sum_i alpha_ji; where all are 0,
    they stay it, and so does the loss.
    No temperature; unbounded scale, usually negative.
    """
    z, x = normalize(queries), normalize(pool)
    with autocast_off(x):
        rows, duals = slice(first, first + len(z)), duals.detach()
        total = duals.sum(dim=1)
        if alpha_normalize == "mean":
            mean = total.mean()
            mean = torch.where(mean == 0, 1.0, mean)
            duals, total = duals / mean, total / mean
        signed = duals[rows].clone()  # the multipliers of negatives and, at the anchor's own place, positive
        signed.diagonal(first).copy_(-total[rows])
        scores = shifted_kernel(z, x, kernel=kernel, centre=x.detach().mean(dim=0))  # (n, M)
        return (signed * scores).sum() / len(z)


@torch.no_grad()
def kernel_means(queries: Tensor, pool: Tensor, *, first: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Mean of k(x_j, z_j), and of k(x_i, z_j) over i != j, over view 1 in ``pool`` (N, D)."""
    z, x = normalize(queries), normalize(pool)
    with autocast_off(x):
        values = shifted_kernel(z, x, kernel=kernel, centre=x.mean(dim=0))
        values = values + kernel_shift(kernel)
        own = values.diagonal(first).sum()
        return own / len(z), (values.sum() - own) / (values.numel() - len(z))


@torch.no_grad()
def dual_health(problem: DualProblem, duals: Tensor) -> dict[str, Tensor]:
    """What the duals look like, as scalars in their own precision.

    ``frac_zero``: share of variables that are exactly 0; ``frac_at_C``: of the positive ones, at the bound;
    ``alpha_x``: mean of sum_i alpha_ji; ``support``: mean effective number of support vectors,
    (sum alpha)^2 / sum alpha^2; ``kkt``: worst relative residual, 0 at the optimum (INV's never is).
    """
    with autocast_off(duals):
        residual = problem.residual(duals, problem.lipschitz()).max()
    total, squares = duals.sum(dim=1), duals.square().sum(dim=1)
    positive = (duals > 0).sum().to(duals.dtype)
    at_bound = (duals == problem.upper).sum().to(duals.dtype)
    return {
        "frac_zero": 1 - positive / problem.variables,
        "frac_at_C": at_bound / (positive + 1e-10),
        "alpha_x": total.mean(),
        "support": (total.square() / squares.clamp(min=torch.finfo(duals.dtype).tiny)).mean(),
        "kkt": residual,
    }
