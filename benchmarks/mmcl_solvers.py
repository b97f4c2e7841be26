"""MMCL's solvers, and its loss with one of them, compared with a plain batched solver that forms every Delta_j.

    python benchmarks/mmcl_solvers.py

One thread; the solvers run in turn; medians of the ratios.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages

import torch
from measure import Result, alternating, ratio, report
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sslzoo_methods.mmcl.kernels import Kernel
from sslzoo_methods.mmcl.loss import dual_problem, mmcl_loss
from sslzoo_methods.mmcl.solvers import DualProblem, solve_adaptive, solve_inv, solve_pgd, start_point

N, D, REG, ETA, ITERATIONS = 256, 128, 0.1, 1e-3, 60
TIMES = 20  # solves that make up one measurement of inv, which is short


def features(n: int, mean_cosine: float) -> Tensor:
    """Unit rows (n, D) with a mean pairwise cosine of ``mean_cosine``."""
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(1, D, generator=generator), dim=1)
    own = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=1)
    return torch.nn.functional.normalize(
        math.sqrt(mean_cosine) * common + math.sqrt(1 - mean_cosine) * own, dim=1
    )


def problem(n: int, mean_cosine: float, sigma: float) -> DualProblem:
    """A dual problem as in the ImageNet recipe: RBF kernel, no bound."""
    return dual_problem(
        features(n, mean_cosine),
        anchors=n,
        kernel=Kernel("rbf", sigma),
        self_term="one",
        C=None,
        reg=REG,
    )


def batched_hessians(x: Tensor, sigma: float) -> Tensor:
    """All matrices Delta_j, (n, n-1, n-1)."""
    n = len(x)
    gram = torch.exp(-(2 - 2 * x @ x.T) / sigma)
    others = torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    own = gram.gather(1, others)
    hessians = gram[others[:, :, None], others[:, None, :]]
    return hessians.add_(1).sub_(own[:, :, None]).sub_(own[:, None, :]).add_(REG * torch.eye(n - 1))


def batched_inv(x: Tensor, sigma: float) -> Tensor:
    """Clipped 2 Delta_j^-1 1, (n, n-1)."""
    hessians = batched_hessians(x, sigma)
    return torch.linalg.solve(hessians, torch.full((*hessians.shape[:2], 1), 2.0)).squeeze(2).relu()


def batched_pgd(hessians: Tensor, start: Tensor, theta: float, iterations: int) -> Tensor:
    """Nesterov's iteration with a fixed step, including the relative change for the stopping criterion."""
    duals = point = start
    for _ in range(iterations):
        gradient = torch.bmm(hessians, point[:, :, None]).squeeze(2) - 2
        new = (point - ETA * gradient).relu()
        following = (math.sqrt(theta**4 + 4 * theta**2) - theta**2) / 2
        point = new + theta * (1 - theta) / (theta**2 + following) * (new - duals)
        assert ((new - duals) / (duals + 1e-7)).abs().mean() > 0
        duals, theta = new, following
    return duals


def peak_bytes(fn: Callable[[], object]) -> int:
    """Peak memory of one call, as recorded by the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        fn()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events: list[Any] = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def without_diagonal(square: Tensor) -> Tensor:
    """Remove the diagonal: (n, n) to (n, n-1)."""
    n = len(square)
    return square[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def inv(rounds: int) -> list[Result]:
    """The direct solver."""
    sigma = 10.0
    x, ours = features(N, 0.3), problem(N, 0.3, sigma)
    torch.testing.assert_close(
        without_diagonal(solve_inv(ours).duals), batched_inv(x, sigma), rtol=1e-2, atol=1e-2
    )
    extra = peak_bytes(lambda: solve_inv(problem(N, 0.3, sigma))) / 2**20

    def own() -> None:
        for _ in range(TIMES):
            solve_inv(problem(N, 0.3, sigma))

    seconds = alternating({"plain": lambda: batched_inv(x, sigma), "own": own}, rounds)
    large = alternating({"own": lambda: solve_inv(problem(2048, 0.3, 10.0))}, 1)["own"][0]
    return [
        Result(
            work=f"MMCL inv, N={N}",
            baseline="plain batched solver",
            value=TIMES * ratio(seconds, "plain", "own"),
            unit="x as fast",
            at_least=95,
        ),
        Result(
            work=f"MMCL inv, N={N}", baseline="memory beyond the inputs", value=extra, unit="MiB", at_most=4
        ),
        Result(work="MMCL inv, N=2048", baseline="CPU time", value=large, unit="s", at_most=5),
    ]


def loss(rounds: int) -> list[Result]:
    """The loss with the direct solver, forward and backward."""
    sigma, noise = 10.0, torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    x = features(N, 0.3)
    z = torch.nn.functional.normalize(x + 0.05 * noise, dim=1)

    def gradients(form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        both = torch.stack([x, z]).requires_grad_()
        form(both[0], both[1]).backward()
        assert both.grad is not None
        return both.grad

    def lean(x: Tensor, z: Tensor) -> Tensor:
        kernel = Kernel("rbf", sigma)
        problem = dual_problem(x.detach(), anchors=N, kernel=kernel, self_term="one", C=None, reg=REG)
        return mmcl_loss(z, x, solve_inv(problem).duals, first=0, kernel=kernel)

    def plain(x: Tensor, z: Tensor) -> Tensor:
        x, z = (torch.nn.functional.normalize(side, dim=1) for side in (x, z))
        duals = batched_inv(x.detach(), sigma)
        kernel = torch.exp(-(2 - 2 * z @ x.T) / sigma)
        return (duals.sum(1) * -kernel.diagonal() + (duals * without_diagonal(kernel)).sum(1)).mean()

    exact = gradients(plain)
    assert (gradients(lean) - exact).norm() < 1e-3 * exact.norm()

    def own() -> None:
        for _ in range(TIMES):
            gradients(lean)

    seconds = alternating({"plain": lambda: gradients(plain), "own": own}, rounds)
    return [
        Result(
            work=f"MMCL loss with inv, N={N}, forward and backward",
            baseline="with the plain batched solver",
            value=TIMES * ratio(seconds, "plain", "own"),
            unit="x as fast",
            at_least=54,
        )
    ]


def pgd(rounds: int) -> list[Result]:
    """An iteration of the projected gradient descent."""
    sigma = 10.0
    ours, hessians = problem(N, 0.3, sigma), batched_hessians(features(N, 0.3), sigma)
    start, theta = start_point(ours, "gaussian", 0)

    def own() -> Tensor:
        return solve_pgd(
            ours,
            start,
            theta=theta,
            variant="nesterov",
            step=ETA,
            max_iter=ITERATIONS,
            stop="relative_change",
            tol=1e-12,
        ).duals

    def plain() -> Tensor:
        return batched_pgd(hessians, without_diagonal(start), theta, ITERATIONS)

    torch.testing.assert_close(without_diagonal(own()), plain(), rtol=1e-3, atol=1e-4)
    return [
        Result(
            work=f"MMCL pgd, N={N}, an iteration",
            baseline="plain batched solver",
            value=ratio(alternating({"plain": plain, "own": own}, rounds), "plain", "own"),
            unit="x as fast",
            at_least=31,
        )
    ]


def convergence() -> list[Result]:
    """How far ``pgd_adaptive`` is from the optimum after 60 iterations, for four kernels."""
    results = []
    for sigma in (0.5, 5.0, 10.0, 50.0):
        ours = problem(N, 0.0, sigma)
        stopped = solve_adaptive(ours, max_iter=1000, tol=1e-3).iterations
        objective, exact = ours.objective(solve_adaptive(ours, max_iter=60, tol=None).duals), optimum(ours)
        excess = ((objective - exact) / exact.abs()).max().item()
        work = f"MMCL pgd_adaptive, N={N}, sigma={sigma:g}"
        results += [
            Result(work=work, baseline="until 1e-3", value=stopped, unit="iterations", at_most=60),
            Result(
                work=work, baseline="optimum, after 60 iterations", value=excess, unit="apart", at_most=1e-3
            ),
        ]
    return results


def optimum(problem: DualProblem) -> Tensor:
    """The optimal dual objectives (n,), from a converged solve in float64."""
    exact = replace(problem, gram=problem.gram.double(), self_term=problem.self_term.double())
    return exact.objective(solve_adaptive(exact, max_iter=5000, tol=1e-8).duals)


def measure(rounds: int = 7) -> list[Result]:
    """Speed, memory and convergence of the solvers, and speed of the loss."""
    torch.set_num_threads(1)
    return [*inv(rounds), *loss(rounds), *pgd(rounds), *convergence()]


if __name__ == "__main__":
    sys.exit(report(measure()))
