"""MMCL's solvers compared with a plain batched solver that forms every Delta_j. One thread, alternating rounds.

    python benchmarks/mmcl_solvers.py

Asserts that ``inv`` at N=256 is at least 80 times faster and needs less than 4 MiB of extra memory; that ``pgd`` is
at least 20 times faster per iteration; that ``inv`` at N=2048 takes less than 5 s; and that ``pgd_adaptive`` at N=256
is within 1e-3 of the optimum after at most 60 iterations, for sigma in {0.5, 5, 10, 50}.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sslzoo_methods.mmcl.kernels import Kernel
from sslzoo_methods.mmcl.loss import dual_problem
from sslzoo_methods.mmcl.solvers import DualProblem, solve_adaptive, solve_inv, solve_pgd, start_point

N, D, REG, ETA, ITERATIONS, ROUNDS = 256, 128, 0.1, 1e-3, 60, 3


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


def seconds(fn: Callable[[], object]) -> float:
    """CPU time of one call, in seconds."""
    start = time.process_time()
    fn()
    return time.process_time() - start


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


def compare_inv() -> None:
    sigma = 10.0
    x, ours = features(N, 0.3), problem(N, 0.3, sigma)
    torch.testing.assert_close(
        without_diagonal(solve_inv(ours).duals), batched_inv(x, sigma), rtol=1e-2, atol=1e-2
    )
    rounds = [
        (
            seconds(lambda: batched_inv(x, sigma)),
            min(seconds(lambda: solve_inv(problem(N, 0.3, sigma))) for _ in range(5)),
        )
        for _ in range(ROUNDS)
    ]
    ratio = median(plain / own for plain, own in rounds)
    extra = peak_bytes(lambda: solve_inv(problem(N, 0.3, sigma))) / 2**20
    print(
        f"inv   N={N}: {median(own for _, own in rounds) * 1e3:.1f} ms, {ratio:.0f}x faster, {extra:.1f} MiB"
    )
    assert ratio >= 80, f"inv is {ratio:.0f}x faster, expected 80x"
    assert extra < 4, f"inv takes {extra:.1f} MiB, expected less than 4"


def compare_pgd() -> None:
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
    rounds = [(seconds(plain), seconds(own)) for _ in range(ROUNDS)]
    ratio = median(a / b for a, b in rounds)
    print(
        f"pgd   N={N}: {median(b for _, b in rounds) / ITERATIONS * 1e3:.2f} ms an iteration, {ratio:.0f}x faster"
    )
    assert ratio >= 20, f"pgd is {ratio:.0f}x faster an iteration, expected 20x"


def large_inv() -> None:
    large = seconds(lambda: solve_inv(problem(2048, 0.3, 10.0)))
    print(f"inv   N=2048: {large:.2f} s")
    assert large < 5, f"inv takes {large:.1f} s at N=2048, expected less than 5"


def converge() -> None:
    for sigma in (0.5, 5.0, 10.0, 50.0):
        ours = problem(N, 0.0, sigma)
        stopped = solve_adaptive(ours, max_iter=1000, tol=1e-3).iterations
        objective, exact = ours.objective(solve_adaptive(ours, max_iter=60, tol=None).duals), optimum(ours)
        excess = ((objective - exact) / exact.abs()).max().item()
        print(
            f"pgd_adaptive N={N} sigma={sigma:g}: stops at 1e-3 after {stopped} iterations; "
            f"worst excess after 60: {excess:.1e}"
        )
        assert stopped <= 60 and excess < 1e-3, f"sigma={sigma}: {stopped} iterations, excess {excess:.1e}"


def optimum(problem: DualProblem) -> Tensor:
    """The optimal dual objectives (n,), from a converged solve in float64."""
    exact = replace(problem, gram=problem.gram.double(), self_term=problem.self_term.double())
    return exact.objective(solve_adaptive(exact, max_iter=5000, tol=1e-8).duals)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_inv()
    compare_pgd()
    large_inv()
    converge()
