"""MMCL: the authors' numbers, the solvers against each other, ranks, precision, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sslzoo.batch import Batch
from sslzoo.distributed import gather, gather_detached, rank
from sslzoo.nn.batchnorm import to_sync
from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import HeadConfig, SGDConfig
from sslzoo.testing.golden import GoldenCase
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.mmcl.config import (
    INV,
    PGD,
    RBF,
    ConstantSigma,
    KernelName,
    MMCLConfig,
    StepSigma,
    Stop,
)
from sslzoo_methods.mmcl.kernels import Kernel, bandwidth, kernel_shift, shifted_gram, shifted_kernel
from sslzoo_methods.mmcl.loss import dual_health, dual_problem, kernel_means, mmcl_loss, normalized
from sslzoo_methods.mmcl.method import MMCL
from sslzoo_methods.mmcl.solvers import (
    DualProblem,
    Solution,
    alone,
    inverse_duals,
    solve_adaptive,
    solve_exact,
    solve_inv,
    solve_pgd,
    start_point,
)

KERNELS: tuple[KernelName, ...] = get_args(KernelName)

# -- reference numbers ---------------------------------------------------------------------------------

SPEC = {
    "kernel": "rbf",
    "sigma": 1.0,
    "self_kernel": "one",
    "C": -1,
    "reg": 0.1,
    "pgd_variant": "nesterov",
    "step": "fixed",
    "eta": 1e-3,
    "max_iterations": 1000,
    "stop_condition": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
}


def _problem(pool: Tensor, hyper: dict[str, Any], **changes: Any) -> tuple[DualProblem, dict[str, Any]]:
    """The problem of a case, and the kernel argument of its loss. ``sigma: auto`` is a rule of ours."""
    hyper = SPEC | hyper | changes
    auto = hyper["sigma"] == "auto"
    sigma = bandwidth(pool, sigma=1.0 if auto else hyper["sigma"], rule="auto" if auto else "fixed")
    kernel = Kernel(hyper["kernel"], sigma)
    problem = dual_problem(
        pool,
        anchors=changes.get("anchors", len(pool)),
        kernel=kernel,
        self_term="kernel" if hyper["self_kernel"] == "true" else "one",
        C=None if hyper["C"] == -1 else hyper["C"],
        reg=hyper["reg"],
        rows=changes.get("rows", slice(None)),
    )
    return problem, {"kernel": kernel}


def _loss_and_grad(z: Tensor, duals: Tensor, kernel: dict[str, Any]) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    view1, view2 = z.chunk(2)
    loss = mmcl_loss(view2, view1, duals, first=0, **kernel)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def _measured(z: Tensor, problem: DualProblem, duals: Tensor, kernel: dict[str, Any]) -> dict[str, Tensor]:
    view1, view2 = z.chunk(2)
    loss, grad = _loss_and_grad(z, duals, kernel)
    positive, negative = kernel_means(view2, view1, first=0, **kernel)
    return dual_health(problem, duals) | {
        "alpha": duals,
        "loss": loss,
        "grad_z": grad,
        "pos_kernel_mean": positive,
        "neg_kernel_mean": negative,
    }


def _golden_inv(case: GoldenCase, precision: str) -> dict[str, Any]:
    z = case.tensors(precision)["z"]
    problem, kernel = _problem(z.chunk(2)[0], case.hyper)
    return _measured(z, problem, solve_inv(problem).duals, kernel) | {"alpha_raw": inverse_duals(problem)}


def _golden_kernels(case: GoldenCase, precision: str) -> dict[str, Any]:
    z = case.tensors(precision)["z"]
    view1, view2 = z.chunk(2)
    got: dict[str, Any] = {}
    for label, own in case.hyper.items():
        if not isinstance(own, dict):
            continue
        hyper = case.hyper | own
        for infix, self_kernel in (("", hyper["self_kernel"]), ("true_self_", "true")):
            problem, kernel = _problem(view1, hyper, self_kernel=self_kernel)
            got[f"alpha_raw_{infix}{label}"] = inverse_duals(problem)
            loss, grad = _loss_and_grad(z, solve_inv(problem).duals, kernel)
            got |= {f"loss_{infix}{label}": loss, f"grad_z_{infix}{label}": grad}
        x, query, shift = normalize(view1), normalize(view2), kernel_shift(**kernel)
        got[f"gram11_{label}"] = shifted_gram(x, **kernel) + shift
        got[f"gram12_{label}"] = shifted_kernel(x, query, centre=x.mean(dim=0), **kernel) + shift
    return got


def _golden_pgd(case: GoldenCase, precision: str) -> dict[str, Any]:
    arrays, hyper = case.tensors(precision), case.hyper
    problem, kernel = _problem(arrays["z"].chunk(2)[0], hyper)

    def solve(max_iter: int) -> Any:
        return solve_pgd(
            problem,
            arrays["alpha_init"],
            theta=float(arrays.get("theta0", 0.5)),
            variant=hyper["pgd_variant"],
            step=hyper["eta"] if hyper["step"] == "fixed" else hyper["step"],
            max_iter=max_iter,
            stop="relative_change",
            tol=hyper["stop_condition"],
        )

    solution = solve(hyper["max_iterations"])
    got = _measured(arrays["z"], problem, solution.duals, kernel)
    got |= {"iterations": solution.iterations, "rel_change": solution.change}
    for name in arrays:
        if name.startswith("alpha_after_"):
            got[name] = solve(int(name.removeprefix("alpha_after_"))).duals
    return got


def _golden_exact(
    solve: Callable[[DualProblem, str], Tensor],
) -> Callable[[GoldenCase, str], dict[str, Any]]:
    def run(case: GoldenCase, precision: str) -> dict[str, Any]:
        z = case.tensors(precision)["z"]
        got: dict[str, Any] = {}
        for name, own in case.hyper.items():
            if isinstance(own, dict):
                i = name.removeprefix("sub_")
                problem, kernel = _problem(z.chunk(2)[0], case.hyper | own)
                duals = solve(problem, precision)
                loss, grad = _loss_and_grad(z, duals, kernel)
                got |= {f"alpha_star_{i}": duals, f"dual_objective_{i}": problem.objective(duals)}
                got |= {f"loss_{i}": loss, f"grad_z_{i}": grad}
        return got

    return run


def _converged(problem: DualProblem, precision: str) -> Tensor:
    tol = 1e-10 if precision == "float64" else 1e-5
    return solve_adaptive(problem, max_iter=5000, tol=tol).duals


def _ddp_rank(r: int, world: int, h: Tensor, weight: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
    weight = weight.clone().requires_grad_()
    local = h[r] @ weight
    local.retain_grad()
    view1, view2 = local.chunk(2)
    pool, first = gather(view1), rank() * len(view1)
    problem, kernel = _problem(pool, hyper, rows=slice(first, first + len(view1)))
    duals = solve_inv(problem).duals
    loss = mmcl_loss(view2, pool, duals, first=first, **kernel)
    loss.backward()
    assert local.grad is not None and weight.grad is not None
    # The backward of a gather sums over ranks: W copies of the global loss, as the mean of DDP expects.
    return {"loss": loss.detach(), "alpha": duals, "z": local.grad / world, "weight": weight.grad}


def _golden_ddp(case: GoldenCase, precision: str) -> dict[str, Any]:
    arrays = case.tensors(precision)
    parts = run_ranks(len(arrays["h"]), _ddp_rank, arrays["h"], arrays["weight"], case.hyper)
    return {
        "loss": torch.stack([part["loss"] for part in parts]).mean(),
        "alpha": torch.cat([part["alpha"] for part in parts]),
        "grad_local_z": torch.stack([part["z"] for part in parts]),
        "grad_weight": torch.stack([part["weight"] for part in parts]).mean(dim=0),
    }


def _golden_multistep(case: GoldenCase, precision: str) -> dict[str, Any]:
    arrays, hyper = case.tensors(precision), case.hyper
    weight = arrays["weight0"].clone().requires_grad_()
    optimizer = torch.optim.SGD(
        [weight], lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"]
    )
    got: dict[str, list[Tensor]] = {
        name: [] for name in ("losses", "neg_pos_term", "neg_term", "weights", "alphas")
    }
    for h, sigma in zip(arrays["h"], hyper["sigma_per_step"], strict=True):
        z = h @ weight
        view1, view2 = z.chunk(2)
        problem, kernel = _problem(view1, hyper, sigma=sigma)
        duals = solve_inv(problem).duals
        loss = mmcl_loss(view2, view1, duals, first=0, **kernel)
        with torch.no_grad():
            x, query = normalize(view1), normalize(view2)
            scores = shifted_kernel(query, x, centre=x.mean(dim=0), **kernel) + kernel_shift(**kernel)
            got["neg_pos_term"].append(-(duals.sum(dim=1) * scores.diagonal()).mean())
            got["neg_term"].append((duals * scores).sum(dim=1).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        got["losses"].append(loss.detach())
        got["alphas"].append(duals)
        got["weights"].append(weight.detach().clone())
    return {name: torch.stack(values) for name, values in got.items()}


GOLDEN: dict[str, list[Callable[[GoldenCase, str], dict[str, Any]]]] = {
    "inv": [_golden_inv],
    "kernels": [_golden_kernels],
    "pgd": [_golden_pgd],
    "exact_qp": [_golden_exact(_converged), _golden_exact(lambda p, _: solve_exact(p).duals)],
    "ddp": [_golden_ddp],
    "multistep": [_golden_multistep],
}


def test_golden(golden_case, precision):
    assert golden_case.kind in GOLDEN, f"unknown kind {golden_case.kind}"
    for compute in GOLDEN[golden_case.kind]:
        golden_case.check(compute(golden_case, precision), precision)


# -- the problem and its solvers -----------------------------------------------------------------------


def _rows(n: int, width: int = 7, *, cosine: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows (n, width) with mutual cosines about ``cosine`` after normalisation."""
    generator = torch.Generator().manual_seed(n)
    common = normalize(torch.randn(1, width, generator=generator, dtype=torch.float64))
    own = normalize(torch.randn(n, width, generator=generator, dtype=torch.float64))
    return (math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own).to(dtype)


def _plain_kernel(a: Tensor, b: Tensor, kernel: str, sigma: float) -> Tensor:
    """The formulas of the paper's code, as they stand."""
    cosine = a @ b.T
    return {
        "rbf": lambda: torch.exp(-(2 - 2 * cosine) / sigma),
        "linear": lambda: cosine,
        "poly": lambda: (cosine + 0.5) ** 3,
        "tanh": lambda: torch.tanh(sigma * cosine),
        "min": lambda: torch.minimum(a.relu()[:, None], b.relu()).sum(dim=2),
    }[kernel]()


def _plain_hessian(
    x: Tensor, j: int, twin: int | None, kernel: str, sigma: float, self_kernel: str
) -> Tensor:
    """Delta_j (2.3) with reg 0.1, entry by entry from the definition; and the columns it is about."""
    keep = [i for i in range(len(x)) if i not in (j, twin)]
    gram = _plain_kernel(x, x, kernel, sigma)
    s = gram[j, j] if self_kernel == "true" else 1.0
    own = gram[j, keep]
    return s + gram[keep][:, keep] - own[:, None] - own + 0.1 * torch.eye(len(keep), dtype=x.dtype)


CASES = [
    (kernel, self_kernel, twins)
    for kernel, self_kernel, twins in product(KERNELS, ("one", "true"), (False, True))
]


@pytest.mark.parametrize(("kernel", "self_kernel", "twins"), CASES)
def test_the_matrix_forms_equal_every_hessian(kernel, self_kernel, twins):
    n, sigma = 5, 0.7
    pool = _rows(2 * n if twins else n)
    hyper = {"kernel": kernel, "sigma": sigma, "self_kernel": self_kernel, "C": -1, "reg": 0.1}
    problem, _ = _problem(pool, hyper, anchors=n)
    duals = problem.clear(torch.rand(n, len(pool), dtype=torch.float64))
    gradient, objective = problem.clear(problem.gradient(duals)), problem.objective(duals)
    raw, lipschitz, frobenius = inverse_duals(problem), problem.lipschitz(), problem.frobenius()
    x = normalize(pool)
    for j in range(n):
        twin = n + j if twins else None
        keep = [i for i in range(len(pool)) if i not in (j, twin)]
        delta = _plain_hessian(x, j, twin, kernel, sigma, self_kernel)
        a = duals[j, keep]
        torch.testing.assert_close(gradient[j, keep], delta @ a - 2, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(objective[j], a @ delta @ a / 2 - 2 * a.sum(), rtol=1e-10, atol=1e-10)
        solved = torch.linalg.solve(delta, torch.full_like(a, 2.0))
        torch.testing.assert_close(raw[j, keep], solved, rtol=1e-8, atol=1e-8)
        assert lipschitz[j] >= torch.linalg.eigvalsh(delta).max() - 1e-12
        whole = _plain_hessian(x, j, None, kernel, sigma, self_kernel)
        torch.testing.assert_close(frobenius[j], whole.norm(), rtol=1e-10, atol=1e-10)
    assert (raw.diagonal() == 0).all() and problem.variables == n * (len(pool) - 1 - twins)


def test_the_step_bound_is_tight():
    problem, _ = _problem(_rows(64, 32), {"kernel": "rbf", "sigma": 5.0, "C": -1, "reg": 0.1})
    x = normalize(_rows(64, 32))
    top = torch.linalg.eigvalsh(_plain_hessian(x, 3, None, "rbf", 5.0, "one")).max()
    assert 0.9 < top / problem.lipschitz()[3] <= 1


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0, 30.0])
def test_the_step_is_bounded_for_tanh_too(sigma, cosine, twins):
    """Which is no valid kernel: M |phi(x_j) - mean|^2 can be negative there."""
    n = 9
    pool = _rows(2 * n if twins else n, cosine=cosine)
    hyper = {"kernel": "tanh", "sigma": sigma, "self_kernel": "true", "C": 1.0, "reg": 0.1}
    bound = _problem(pool, hyper, anchors=n)[0].lipschitz()
    for j in range(n):
        delta = _plain_hessian(normalize(pool), j, n + j if twins else None, "tanh", sigma, "true")
        assert bound[j] >= torch.linalg.eigvalsh(delta).max() - 1e-12


@pytest.mark.parametrize("divided", [lambda duals: duals, normalized], ids=["none", "mean"])
def test_no_support_vector_gives_no_loss_and_a_finite_residual(divided):
    """All duals 0: nothing to normalise by."""
    z = _rows(12, dtype=torch.float32)
    problem, kernel = _problem(z[:6], {"kernel": "rbf", "sigma": 0.5, "C": -1, "reg": 0.1})
    duals, query = torch.zeros(6, 6), z[6:].requires_grad_()
    loss = mmcl_loss(query, z[:6], divided(duals), first=0, **kernel)
    assert loss == 0 and (torch.autograd.grad(loss, query)[0] == 0).all()
    health = dual_health(problem, duals)
    assert health["kkt"] == 1 and all(value.isfinite() for value in health.values())


@pytest.mark.parametrize(("sigma", "C", "twins"), [(5.0, -1, False), (0.5, 0.4, False), (2.0, 1.0, True)])
def test_the_optimum_is_reached_three_ways(sigma, C, twins):
    n = 12
    pool = _rows(2 * n if twins else n)
    problem, _ = _problem(pool, {"kernel": "rbf", "sigma": sigma, "C": C, "reg": 0.1}, anchors=n)
    exact = solve_exact(problem).duals
    assert problem.residual(exact, problem.lipschitz()).max() < 1e-12
    assert (exact >= 0).all() and exact.max() <= problem.upper
    adaptive = solve_adaptive(problem, max_iter=5000, tol=1e-11)
    torch.testing.assert_close(adaptive.duals, exact, rtol=1e-6, atol=1e-8)
    start, theta = start_point(problem, "gaussian", 0)
    fixed: dict[str, Any] = {
        "variant": "vanilla",
        "step": "lipschitz",
        "stop": "kkt",
        "tol": 1e-11,
    }
    descended = solve_pgd(problem, start, theta=theta, max_iter=20_000, **fixed)
    torch.testing.assert_close(descended.duals, exact, rtol=1e-6, atol=1e-8)
    assert descended.iterations < 20_000 and adaptive.iterations < 5000


def _by_pgd(problem: DualProblem, of_ranks: Any, stop: Stop) -> Solution:
    start, theta = start_point(problem, "gaussian", 0)
    options: dict[str, Any] = {"variant": "nesterov", "step": "frobenius", "max_iter": 400, "tol": 1e-3}
    return solve_pgd(problem, start, theta=theta, stop=stop, of_ranks=of_ranks, **options)


SOLVERS: dict[str, Any] = {
    "inv": lambda problem, of_ranks: solve_inv(problem),
    "adaptive": lambda problem, of_ranks: solve_adaptive(problem, max_iter=400, tol=1e-4, of_ranks=of_ranks),
    "exact": lambda problem, of_ranks: solve_exact(problem, of_ranks=of_ranks),
    "pgd": partial(_by_pgd, stop="relative_change"),
    "pgd, kkt": partial(_by_pgd, stop="kkt"),
}
PARTS = {"rbf": {}, "tanh, twins": {"kernel": "tanh", "sigma": 0.7, "self_kernel": "true", "anchors": 12}}


def _solved(changes: dict[str, Any], rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Duals, iterations and health of every solver, for this rank's part of 12 anchors."""
    hyper = {"kernel": "rbf", "sigma": 0.5, "C": 0.7, "reg": 0.1}
    share, of_ranks = 12 // world, (lambda x: gather_detached(x[None])) if world > 1 else alone
    rows = slice(rank * share, (rank + 1) * share)
    problem, _ = _problem(_rows(24 if "anchors" in changes else 12), hyper, **changes, rows=rows)
    got = {}
    for name, solver in SOLVERS.items():
        solution = solver(problem, of_ranks)
        health = dual_health(problem, solution.duals, of_ranks)
        got[name] = (solution.duals, solution.iterations, health, normalized(solution.duals, of_ranks))
    return got


def _solved_by_ranks(rank: int, world: int) -> dict[str, Any]:
    return {case: _solved(changes, rank, world) for case, changes in PARTS.items()}


def test_ranks_that_solve_for_their_own_anchors_find_the_same():
    parts = run_ranks(3, _solved_by_ranks)
    for case, changes in PARTS.items():
        for name, (duals, iterations, health, divided) in _solved(changes).items():
            got = [part[case][name] for part in parts]
            torch.testing.assert_close(torch.cat([g[0] for g in got]), duals, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(torch.cat([g[3] for g in got]), divided, rtol=1e-9, atol=1e-11)
            assert [g[1] for g in got] == [iterations] * 3, (case, name)
            for g in got:
                torch.testing.assert_close(g[2], health, rtol=1e-7, atol=1e-12)


def test_the_host_looks_at_every_tenth_update_and_the_first_small_change_counts():
    problem, _ = _problem(_rows(12), {"kernel": "rbf", "sigma": 0.5, "C": 0.7, "reg": 0.1})
    start, theta = start_point(problem, "gaussian", 0)
    options: dict[str, Any] = {"variant": "nesterov", "step": "frobenius", "stop": "relative_change"}
    looked = []

    def of_ranks(x: Tensor) -> Tensor:
        looked.append(x.numel())
        return x[None]

    whole = solve_pgd(problem, start, theta=theta, max_iter=400, tol=1e-2, of_ranks=of_ranks, **options)
    assert whole.iterations < 400 and whole.iterations % 10 != 0
    assert looked == [10] * -(-whole.iterations // 10)
    step_by_step = [
        solve_pgd(problem, start, theta=theta, max_iter=k, tol=0.0, **options)
        for k in (whole.iterations - 1, whole.iterations)
    ]
    assert torch.equal(whole.duals, step_by_step[1].duals)
    before, after = (float(solution.change or 0) for solution in step_by_step)
    assert whole.change == after < 1e-2 <= before


def test_starts():
    problem, _ = _problem(_rows(40), {"kernel": "rbf", "sigma": 0.5, "C": 0.7, "reg": 0.1})
    gaussian, theta = start_point(problem, "gaussian", 0)
    again, _ = start_point(problem, "gaussian", 0)
    assert torch.equal(gaussian, again) and gaussian.max() == 0.7 and 1e-8 <= theta < 1
    assert 0.4 < (gaussian == 0).double().mean() < 0.6
    assert (start_point(problem, "zero", 0)[0] == 0).all()
    assert torch.equal(start_point(problem, "inv", 0)[0], solve_inv(problem).duals)


def test_a_fixed_number_of_iterations():
    problem, _ = _problem(_rows(9), {"kernel": "rbf", "sigma": 0.5, "C": 0.7, "reg": 0.1})
    assert solve_adaptive(problem, max_iter=37, tol=None).iterations == 37


@pytest.mark.parametrize(("sigma", "cosine"), list(product((0.5, 5.0, 10.0, 50.0), (0.0, 0.3, 0.9))))
def test_inv_keeps_float32(sigma, cosine):
    """Section 4.1 of the paper's dual, centred, against float64 on the same float32 features."""
    x = _rows(128, 128, cosine=cosine, dtype=torch.float32)
    hyper = {"kernel": "rbf", "sigma": sigma, "C": -1, "reg": 0.1}
    exact = inverse_duals(_problem(x.double(), hyper)[0])
    got = inverse_duals(_problem(x, hyper)[0])
    assert got.dtype == torch.float32
    assert (got - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize(("sigma", "cosine"), [(50.0, 0.9), (50.0, 0.99), (10.0, 0.999)])
def test_the_gradient_keeps_float32_where_features_are_alike(sigma: float, cosine: float) -> None:
    x = _rows(256, 128, cosine=cosine, dtype=torch.float32)
    hyper = {"kernel": "rbf", "sigma": sigma, "C": 100.0, "reg": 0.1}
    problem, exact = _problem(x, hyper)[0], _problem(x.double(), hyper)[0]
    solution = solve_adaptive(problem, max_iter=100, tol=1e-6)
    got, true = problem.gradient(solution.duals), exact.gradient(solution.duals.double())
    off = ~torch.eye(256, dtype=torch.bool)
    assert (got - true)[off].norm() < 1e-5 * true[off].norm().clamp(min=2 * 256)
    assert solution.iterations < 100


def test_total_collapse_gives_no_loss_and_no_gradient():
    for dtype in (torch.float64, torch.float32):
        z = torch.ones(12, 5, dtype=dtype)
        problem, kernel = _problem(z[:6], {"kernel": "rbf", "sigma": 0.5, "C": -1, "reg": 0.1})
        duals = solve_inv(problem).duals
        expected = 20 * (1 - torch.eye(6, dtype=dtype))
        torch.testing.assert_close(duals, expected, rtol=1e-5, atol=0)
        loss, grad = _loss_and_grad(z, duals, kernel)
        assert abs(loss) < 1e-6 and grad.abs().max() < 1e-5


def test_a_matrix_that_cannot_be_factored_gives_nan():
    problem, _ = _problem(torch.full((4, 3), math.nan), {"kernel": "rbf", "sigma": 1.0, "C": -1, "reg": 0.1})
    assert solve_inv(problem).duals.isnan().any()


@pytest.mark.parametrize("n", [2, 3, 17])
def test_any_number_of_images_from_two(n):
    z = _rows(2 * n)
    hyper = {"kernel": "rbf", "sigma": 1.0, "C": 10.0, "reg": 0.1}
    problem, kernel = _problem(z[:n], hyper)
    for solution in (
        solve_inv(problem),
        solve_adaptive(problem, max_iter=500, tol=1e-9),
        solve_exact(problem),
    ):
        loss, grad = _loss_and_grad(z, solution.duals, kernel)
        assert loss.isfinite() and grad.isfinite().all() and (solution.duals.sum(dim=1) > 0).all()
    with pytest.raises(ValueError, match="at least 2 images"):
        _problem(z[:1], hyper)


def test_inv_compiles_without_a_break():
    def duals(pool: Tensor) -> Tensor:
        problem, _ = _problem(pool, {"kernel": "rbf", "sigma": 1.0, "C": 10.0, "reg": 0.1})
        return solve_inv(problem).duals

    pool = _rows(6)
    compiled = torch.compile(duals, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pool), duals(pool))


# -- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_gradient_by_finite_differences(kernel, sigma):
    query, pool, duals = _rows(4, 5), _rows(9, 5), torch.rand(4, 9, dtype=torch.float64)

    def loss(q: Tensor, p: Tensor) -> Tensor:
        return mmcl_loss(q, p, duals, first=1, kernel=Kernel(kernel, sigma))

    assert torch.autograd.gradcheck(loss, (query.requires_grad_(), pool.requires_grad_()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_by_definition(kernel):
    x, z = _rows(6), _rows(13)[:6]
    duals = torch.rand(6, 6, dtype=torch.float64).fill_diagonal_(0)
    values = _plain_kernel(normalize(x), normalize(z), kernel, 0.3)  # k(x_i, z_j)
    terms = [duals[j] @ values[:, j] - duals[j].sum() * values[j, j] for j in range(6)]
    options: dict[str, Any] = {"first": 0, "kernel": Kernel(kernel, 0.3)}
    got = mmcl_loss(z, x, duals, **options)
    torch.testing.assert_close(got, torch.stack(terms).mean(), rtol=1e-12, atol=1e-14)
    scaled = mmcl_loss(z, x, normalized(duals), **options)
    torch.testing.assert_close(scaled, got / duals.sum(dim=1).mean(), rtol=1e-12, atol=0)


def test_small_kernel_values_keep_their_gradient_in_float32():
    """expm1 alone would differentiate as its rounded result plus one."""
    x, z = _rows(6, 3), _rows(15, 3)[:6]
    duals = torch.ones(6, 6, dtype=torch.float64).fill_diagonal_(0)
    duals[:, 1:] = 0
    grads = []
    for dtype in (torch.float64, torch.float32):
        query = z.to(dtype, copy=True).requires_grad_()
        loss = mmcl_loss(query, x.to(dtype), duals.to(dtype), first=0, kernel=Kernel("rbf", 0.05))
        grads.append(torch.autograd.grad(loss, query)[0].double())
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=1e-12)


def test_zero_rows_follow_the_formula():
    z = _rows(12)
    z[2] = 0
    z[9] = 0
    problem, kernel = _problem(z[:6], {"kernel": "rbf", "sigma": 2.0, "C": -1, "reg": 0.1})
    torch.testing.assert_close(problem.gram[2, 2].item() + 1, math.exp(-1), rtol=1e-12, atol=0)
    x = normalize(z[:6])
    delta = _plain_hessian(x, 2, None, "rbf", 2.0, "one")
    expected = torch.linalg.solve(delta, torch.full((5,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(inverse_duals(problem)[2, [0, 1, 3, 4, 5]], expected, rtol=1e-9, atol=0)
    loss, grad = _loss_and_grad(z, solve_inv(problem).duals, kernel)
    assert loss.isfinite() and grad.isfinite().all()


def test_bandwidth_rules():
    x = _rows(9)
    distances = torch.pdist(normalize(x)).square()
    assert bandwidth(x, sigma=3.0, rule="fixed") == 3
    assert bandwidth(x, sigma=2.0, rule="auto") == 2 / 7
    median = bandwidth(x, sigma=2.0, rule="median")
    torch.testing.assert_close(median, 2 * distances.median(), rtol=1e-10, atol=0)


# -- memory --------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def _peak_megabytes(run: Callable[[], object]) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events: list[Any] = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def _step(z: Tensor, kernel: str, solver: str) -> None:
    n = len(z) // 2
    problem, arguments = _problem(z[:n], {"kernel": kernel, "sigma": 5.0, "C": 100.0, "reg": 0.1})
    if solver == "pgd":
        start, theta = start_point(problem, "gaussian", 0)
        plain: dict[str, Any] = {
            "variant": "nesterov",
            "step": "frobenius",
            "stop": "relative_change",
        }
        duals = solve_pgd(problem, start, theta=theta, max_iter=3, tol=1e-9, **plain).duals
    elif solver == "pgd_adaptive":
        duals = solve_adaptive(problem, max_iter=10, tol=1e-9).duals
    else:
        duals = solve_inv(problem).duals
    _loss_and_grad(z, duals, arguments)


@pytest.mark.parametrize("solver", ["inv", "pgd", "pgd_adaptive"])
def test_memory_is_quadratic(solver):
    z = _rows(2048, 128, dtype=torch.float32)
    with _Largest() as largest:
        _step(z, "rbf", solver)
    assert largest.elements == 1024**2
    assert _peak_megabytes(lambda: _step(z, "rbf", solver)) < 200


def test_memory_of_the_min_kernel():
    assert _peak_megabytes(lambda: _step(_rows(2048, 128, dtype=torch.float32), "min", "inv")) < 200


# -- the method ----------------------------------------------------------------------------------------

OPTIM = SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0)


def _config(**changes: Any) -> MMCLConfig:
    official: dict[str, Any] = {
        "name": "mmcl",
        "solver": INV(),
        "kernel": RBF(sigma=1.0),
        "C": 100.0,
        "projector": HeadConfig(widths=(7, 5), output_norm="batch_no_shift", output_bias=False),
        "crop_batching": "per_resolution",
    }
    return MMCLConfig(**(official | changes))


def _method(**changes: Any) -> MMCL:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    method = to_sync(MMCL(_config(**changes), backbone, 8)).double()
    assert isinstance(method, MMCL)
    method.prepare(TrainingPlan(dataset_size=24, global_batch_size=12, max_epochs=200), OPTIM, seed=5)
    return method


def _batch(step: int, rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(step)
    a, b, local = (torch.randn(12, 6, dtype=torch.float64, generator=generator)[rows] for _ in range(3))
    return Batch((a, b), (local,), torch.arange(12)[rows])


def test_own_negatives_only():
    """Without gathering, a rank's loss is that of its rows alone."""
    method = _method(gather=False)
    whole = method.loss(_batch(0))
    torch.testing.assert_close(whole, _method(gather=True).loss(_batch(0)))


def _by_hand(z: list[Tensor], sigma: float, *, pairs: list[tuple[int, int]], both: bool = False) -> Tensor:
    """The INV loss, image by image: for each (anchor view, query view), from the Hessians themselves."""
    x = [normalize(view) for view in z]
    losses = []
    for anchor, query in pairs:
        n = len(x[anchor])
        pool = torch.cat([x[anchor], x[1 - anchor]]) if both else x[anchor]
        for j in range(n):
            twin = n + j if both else None
            keep = [i for i in range(len(pool)) if i not in (j, twin)]
            delta = _plain_hessian(pool, j, twin, "rbf", sigma, "one")
            alpha = torch.linalg.solve(delta, torch.full((len(keep),), 2.0, dtype=delta.dtype)).clamp(0, 100)
            values = _plain_kernel(pool[[*keep, j]], x[query][j : j + 1], "rbf", sigma)[:, 0]
            losses.append(alpha @ (values[:-1] - values[-1]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, [(0, 1), (0, 2)]),
        ({"negatives": "both"}, [(0, 1), (0, 2)]),
        ({"symmetric": True}, [(0, 1), (0, 2), (1, 0), (1, 2)]),
    ],
    ids=["extra-crop", "both", "symmetric"],
)
def test_every_other_crop_is_a_query(changes, pairs):
    method, batch = _method(crop_batching="per_crop", **changes), _batch(0)
    loss = method.loss(batch)
    with torch.no_grad():
        again = _method(crop_batching="per_crop")
        z = [again.projector(again.backbone(view)) for view in (*batch.global_views, *batch.local_views)]
        expected = _by_hand(z, 1.0, pairs=pairs, both=changes.get("negatives") == "both")
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)
    assert method.published["backbone"].shape == (12, 8)
    finite = {"alpha_x", "support", "kkt", "frac_zero", "frac_at_C", "pos_kernel_mean", "neg_kernel_mean"}
    assert finite <= {name.removeprefix("method/") for name in method.recorded}


def test_sigma_is_a_function_of_the_epoch():
    method = _method(kernel=RBF(sigma=50.0, sigma_schedule=StepSigma(milestones=(75, 125))))
    got = {}
    for epoch in (0, 73, 74, 123, 124, 199):
        # Two steps an epoch; nothing else says where a resumed run stands.
        method.optimizer_steps = epoch * 2 + 1
        method.loss(_batch(0))
        got[epoch] = method.settings["method/sigma"]
    assert got == pytest.approx({0: 50, 73: 50, 74: 5, 123: 5, 124: 0.5, 199: 0.5})


def test_the_global_generator_is_left_alone():
    method, before = _method(solver=PGD()), torch.get_rng_state()
    first = method.loss(_batch(0))
    assert torch.equal(torch.get_rng_state(), before)
    method.finish_step()
    assert method.loss(_batch(0)) != first, "every step draws a start of its own"


def _starts(method: MMCL, monkeypatch: pytest.MonkeyPatch, losses: int, steps: int) -> list[Tensor]:
    """The random starts of ``losses`` micro-batches in each of ``steps`` steps."""
    starts: list[Tensor] = []

    def seen(problem: DualProblem, init: Any, seed: int) -> tuple[Tensor, float]:
        starts.append(start_point(problem, init, seed)[0])
        return starts[-1], 0.5

    monkeypatch.setattr("sslzoo_methods.mmcl.method.start_point", seen)
    for step in range(steps):
        for _ in range(losses):
            method.loss(_batch(0))
        method.finish_step(skipped=step == 0)
    return starts


def test_every_micro_batch_starts_elsewhere(monkeypatch):
    """By its place in the run: without accumulation the step's."""
    method = _method(solver=PGD(max_iter=1))
    method.plan = replace(method.plan, accumulate=2)
    starts = _starts(method, monkeypatch, 2, 3)
    alone = _starts(_method(solver=PGD(max_iter=1)), monkeypatch, 1, 6)
    assert all(torch.equal(a, b) for a, b in zip(starts, alone, strict=True))
    assert not any(torch.equal(a, b) for a, b in combinations(starts, 2))


def test_ranks_with_negatives_of_their_own_start_elsewhere(monkeypatch):
    """As micro-batches would."""
    expected = _starts(_method(solver=PGD(max_iter=1)), monkeypatch, 1, 6)
    for r in range(2):
        monkeypatch.setattr("sslzoo_methods.mmcl.method.rank", lambda r=r: r)
        monkeypatch.setattr("sslzoo_methods.mmcl.method.world_size", lambda: 2)
        starts = _starts(_method(solver=PGD(max_iter=1), gather=False), monkeypatch, 1, 3)
        assert all(torch.equal(a, b) for a, b in zip(starts, expected[r::2], strict=True))


def test_a_step_that_is_too_long_is_said():
    method = _method(solver=PGD(step=1.0, max_iter=5))
    with pytest.warns(UserWarning, match=r"method\.solver\.step=1\.0"):
        method.loss(_batch(0))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("method.C=0", "method.C: must be positive, or null for no bound; got 0.0"),
        ("method.reg=0", "method.reg: must be positive, got 0.0"),
        ("method.kernel.sigma=0", "method.kernel.sigma: must be positive, got 0.0"),
        (
            "method.kernel.self_term=one",
            "method.kernel.self_term: not a key of method.kernel rbf, but of poly, min, tanh",
        ),
        (
            "method.kernel={name: linear, sigma: 1}",
            "method.kernel.sigma: not a key of method.kernel linear, but of rbf, tanh",
        ),
        ("method.kernel=poly", "method.kernel.self_term: missing key; method.kernel poly needs it"),
        (
            "method.kernel.sigma_schedule={name: step, milestones: [125, 75]}",
            "method.kernel.sigma_schedule.milestones: must increase and be above 1 (epochs are counted from 1), "
            "got [125, 75]",
        ),
        (
            "method.kernel.sigma_schedule={name: step, milestones: [1]}",
            "method.kernel.sigma_schedule.milestones: must increase and be above 1 ("
            "epochs are counted from 1), got [1]",
        ),
        (
            "method.kernel.sigma_schedule={name: step, milestones: [5], gamma: 1}",
            "method.kernel.sigma_schedule.gamma: must be positive and not 1, got 1.0",
        ),
        (
            "method.kernel={name: tanh, sigma: 1, self_term: kernel}; method.C=null",
            "method.C: must be a number with method.kernel tanh, which is not positive semi-definite",
        ),
        (
            "method.kernel={name: poly, self_term: one}; method.C=null; method.solver=pgd",
            "method.kernel.self_term: must be kernel with method.kernel poly, method.C=null and method.solver pgd: "
            "the problem may have no minimum",
        ),
        (
            "method.solver={name: inv, tol: 1}",
            "method.solver.tol: not a key of method.solver inv, but of pgd, pgd_adaptive",
        ),
        (
            "method.solver={name: pgd, step: 0}",
            "method.solver.step: must be positive, frobenius or lipschitz, got 0.0",
        ),
        (
            "method.solver={name: pgd, step: armijo}",
            "method.solver.step: must be one of frobenius, lipschitz; got 'armijo'",
        ),
        ("method.solver={name: pgd, max_iter: 0}", "method.solver.max_iter: must be positive, got 0"),
        ("method.solver={name: pgd, tol: 0}", "method.solver.tol: must be positive, got 0.0"),
        (
            "method.solver={name: pgd_adaptive, tol: 0}",
            "method.solver.tol: must be positive, or null to always do max_iter updates; got 0.0",
        ),
        (
            "views.0.count=1",
            "views: must have at least two views, 1 of them global, with these settings; got 1, 1 of them global",
        ),
        (
            "views=[{size: 20, scale: [0.2, 1]}, {size: 12, scale: [0.2, 1], role: local}]; method.symmetric=true",
            "views: must have at least two views, 2 of them global, with these settings; got 2, 1 of them global",
        ),
        ("method.sigma=1", "method.sigma: renamed: use method.kernel.sigma"),
        ("method.pgd.eta=1", "method.pgd: renamed: use method.solver={name: pgd, ...}"),
    ],
)
def test_refusals(overrides, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe("mmcl_fashion_mnist", overrides.split("; "))
    assert said in str(caught.value)


RECIPES = sorted(name for name in recipes() if name.startswith("mmcl_"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name):
    recipe = load_recipe(name).recipe
    assert isinstance(recipe.method, MMCLConfig)
    assert sum(view.count for view in recipe.views) == 2
    assert isinstance(recipe.method.kernel, RBF)
    schedule = recipe.method.kernel.sigma_schedule
    assert isinstance(schedule, ConstantSigma) or schedule.milestones[-1] <= recipe.trainer["max_epochs"]
