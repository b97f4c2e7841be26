"""The MMCL loss (arXiv:2112.11450), as pure functions without modules, state or process groups.

Shapes: N anchors in the global batch, M points in the pool of negatives (N, or 2N with the other view),
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
    """The dual problems of a batch's SVMs (equation 2.2), without gradients.

    ``pool`` (M, D): projections, of any norm, of the anchors, followed by their other views in the same order
    for the 2N - 2 variant. ``self_term``: s_j = 1 for ``one`` (official code), k(x_j, x_j) for ``kernel`` (exact
    derivation). ``C`` is the upper bound of the duals, or None. Raises ``ValueError`` for fewer than two anchors.
    """
    require(
        anchors > 1,
        f"MMCL needs at least 2 images in a batch, got {anchors}, which leaves no negatives; "
        "raise data.global_batch_size",
    )
    assert len(pool) in (anchors, 2 * anchors)
    x = normalize(pool)
    with autocast_off(x):
        gram = shifted_gram(x, kernel=kernel)
        self_values = gram.diagonal()[:anchors]
        if self_term == "one":
            self_values = torch.zeros_like(self_values) + (1 - kernel_shift(kernel))
    return DualProblem(
        gram=gram,
        self_term=self_values.clone(),
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
    """Negative mean SVM score of the queries, equation 2.4: mean_j sum_i alpha_ji (k(x_i, z_j) - k(x_j, z_j)).

    ``queries`` (n, D): another view of anchors ``first`` .. ``first + n - 1``. ``pool`` (M, D) and ``duals`` (N, M)
    as in :func:`dual_problem`. Rows are normalised here. The duals are constants; gradients reach the queries and
    the pool, as positives and as negatives. ``alpha_normalize="mean"`` divides the duals by the mean of
    alpha_x,j = sum_i alpha_ji; if all duals are 0, they and the loss stay 0.
    There is no temperature; the scale is unbounded and the value usually negative.
    """
    z, x = normalize(queries), normalize(pool)
    with autocast_off(x):
        rows, duals = slice(first, first + len(z)), duals.detach()
        total = duals.sum(dim=1)
        if alpha_normalize == "mean":
            mean = total.mean()
            mean = torch.where(mean == 0, 1.0, mean)
            duals, total = duals / mean, total / mean
        signed = duals[
            rows
        ].clone()  # factors of the negatives' scores and, in the anchor's own column, the positive's
        signed.diagonal(first).copy_(-total[rows])
        scores = shifted_kernel(z, x, kernel=kernel, centre=x.detach().mean(dim=0))  # (n, M)
        return (signed * scores).sum() / len(z)


@torch.no_grad()
def kernel_means(queries: Tensor, pool: Tensor, *, first: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Mean of k(x_j, z_j), and of k(x_i, z_j) over i != j, for ``queries`` z (n, D) and view 1 x in ``pool`` (N, D)."""
    z, x = normalize(queries), normalize(pool)
    with autocast_off(x):
        values = shifted_kernel(z, x, kernel=kernel, centre=x.mean(dim=0))
        values = values + kernel_shift(kernel)
        positive = values.diagonal(first).sum()
        return positive / len(z), (values.sum() - positive) / (values.numel() - len(z))


@torch.no_grad()
def dual_health(problem: DualProblem, duals: Tensor) -> dict[str, Tensor]:
    """Statistics of the duals, as scalars in their precision.

    ``frac_zero``: fraction of variables that are exactly 0; ``frac_at_C``: fraction of the positive ones that
    are at the bound; ``alpha_x``: mean of sum_i alpha_ji; ``support``: mean effective number of support vectors,
    (sum alpha)^2 / sum alpha^2; ``kkt``: largest relative residual, 0 at the optimum (INV does not reach it).
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
