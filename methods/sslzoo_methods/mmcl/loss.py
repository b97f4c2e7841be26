"""The MMCL loss (arXiv:2112.11450), as pure functions without modules, state or process groups.

Shapes: N anchors in the global batch, of which n are this rank's, M points in the pool of negatives (N, or 2N with the
other view), D embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslzoo.checks import require
from sslzoo.nn.compiling import compilable
from sslzoo.nn.numerics import autocast_off, normalize
from sslzoo_methods.mmcl.config import SelfTerm
from sslzoo_methods.mmcl.kernels import Kernel, kernel_shift, shifted_gram, shifted_kernel
from sslzoo_methods.mmcl.solvers import DualProblem, OfRanks, alone


@torch.no_grad()
def dual_problem(
    pool: Tensor,
    *,
    anchors: int,
    kernel: Kernel,
    self_term: SelfTerm,
    C: float | None,
    reg: float,
    rows: slice = slice(None),
) -> DualProblem:
    """The dual problems of the SVMs of the anchors ``rows``, those of this rank (equation 2.2), without gradients.

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
        own = gram.diagonal()[:anchors][rows]
        one = torch.zeros_like(own) + (1 - kernel_shift(kernel))
        self_values = one if self_term == "one" else own.clone()
    return DualProblem(
        gram=gram,
        self_term=self_values,
        self_gap=self_values - own,
        upper=math.inf if C is None else C,
        reg=reg,
        definite=kernel.name != "tanh",
        anchors=anchors,
        first=rows.start or 0,
    )


@compilable
def mmcl_loss(
    queries: Tensor,
    pool: Tensor,
    duals: Tensor,
    *,
    first: int,
    kernel: Kernel,
) -> Tensor:
    """Negative mean SVM score of the queries, equation 2.4: mean_j sum_i alpha_ji (k(x_i, z_j) - k(x_j, z_j)).

    ``queries`` (n, D): another view of anchors ``first`` .. ``first + n - 1``, whose duals are ``duals`` (n, M).
    ``pool`` (M, D) as in :func:`dual_problem`. Rows are normalised here. The duals are constants; gradients reach the
    queries and the pool, as positives and as negatives.
    There is no temperature; the scale is unbounded and the value usually negative.
    """
    z, x = normalize(queries), normalize(pool)
    with autocast_off(x):
        signed = duals.detach().clone()
        # Factors of the negatives' scores and, in the anchor's own column, the positive's.
        signed.diagonal(first).copy_(-signed.sum(dim=1))
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
def normalized(duals: Tensor, of_ranks: OfRanks = alone) -> Tensor:
    """``duals`` (n, M) divided by the mean over all ranks of alpha_x,j = sum_i alpha_ji; unchanged if that is 0."""
    mean = of_ranks(duals.sum(dim=1).mean()).mean()
    return duals / torch.where(mean == 0, 1.0, mean)


@torch.no_grad()
def dual_health(problem: DualProblem, duals: Tensor, of_ranks: OfRanks = alone) -> dict[str, Tensor]:
    """Statistics of the duals of all ranks, as scalars in their precision.

    ``frac_zero``: fraction of variables that are exactly 0; ``frac_at_C``: fraction of the positive ones that
    are at the bound; ``alpha_x``: mean of sum_i alpha_ji; ``support``: mean effective number of support vectors,
    (sum alpha)^2 / sum alpha^2; ``kkt``: largest relative residual, 0 at the optimum (INV does not reach it).
    """
    with autocast_off(duals):
        residual = problem.residual(duals, problem.lipschitz()).max()
    total, squares = duals.sum(dim=1), duals.square().sum(dim=1)
    support = (total.square() / squares.clamp(min=torch.finfo(duals.dtype).tiny)).mean()
    positive, at_bound = (mask.sum().to(duals.dtype) for mask in (duals > 0, duals == problem.upper))
    # One collective for all of them.
    own = torch.stack(
        [positive / problem.variables, at_bound / problem.variables, total.mean(), support, residual]
    )
    ranks = of_ranks(own)
    positive, at_bound, alpha_x, support = ranks[:, :4].mean(dim=0).unbind()
    return {
        "frac_zero": 1 - positive,
        "frac_at_C": at_bound / (positive + 1e-10 / problem.variables),
        "alpha_x": alpha_x,
        "support": support,
        "kkt": ranks[:, 4].max(),
    }
