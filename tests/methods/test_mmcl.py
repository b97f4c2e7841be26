"""MMCL: the authors' numbers, the solvers against each other, ranks, precision, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslzoo.distributed import gather, rank
from sslzoo.numerics import normalize
from sslzoo_methods.mmcl.kernels import kernel_shift, shifted_gram, shifted_kernel
from sslzoo_methods.mmcl.loss import dual_health, dual_problem, kernel_means, mmcl_loss
from sslzoo_methods.mmcl.solvers import (
    DualProblem,
    inverse_duals,
    solve_adaptive,
    solve_exact,
    solve_inv,
    solve_pgd,
)
from tests.golden_cases import GoldenCase
from tests.ranks import run_ranks

# -- reference numbers ---------------------------------------------------------------------------------


def _problem(pool: Tensor, hyper: dict[str, Any], **changes: Any) -> tuple[DualProblem, dict[str, Any]]:
    """The problem of a case, and the kernel arguments of its loss. ``sigma: auto`` is a rule of ours."""
    hyper = {"self_kernel": "one", "sigma": 1.0} | hyper | changes
    auto = hyper["sigma"] == "auto"
    problem, sigma = dual_problem(
        pool,
        anchors=changes.get("anchors", len(pool)),
        kernel=hyper["kernel"],
        sigma=1.0 if auto else hyper["sigma"],
        sigma_rule="auto" if auto else "fixed",
        self_kernel=hyper["self_kernel"],
        C=hyper["C"],
        reg=hyper["reg"],
    )
    return problem, {"kernel": hyper["kernel"], "sigma": sigma}


def _loss_and_grad(z: Tensor, duals: Tensor, kernel: dict[str, Any]) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    view1, view2 = z.chunk(2)
    loss = mmcl_loss(view2, view1, duals, first=0, alpha_normalize="none", **kernel)
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
        for infix, self_kernel in (("", hyper.get("self_kernel", "one")), ("true_self_", "true")):
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
            step=hyper["step"],
            eta=hyper["eta"] or math.nan,
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
    pool = gather(view1)
    problem, kernel = _problem(pool, hyper)
    duals = solve_inv(problem).duals
    loss = mmcl_loss(view2, pool, duals, first=rank() * len(view1), alpha_normalize="none", **kernel)
    loss.backward()
    assert local.grad is not None and weight.grad is not None
    # The backward of a gather sums over ranks: W copies of the global loss, as the mean of DDP expects.
    return {"loss": loss.detach(), "alpha": duals, "z": local.grad / world, "weight": weight.grad}


def _golden_ddp(case: GoldenCase, precision: str) -> dict[str, Any]:
    arrays = case.tensors(precision)
    parts = run_ranks(len(arrays["h"]), _ddp_rank, arrays["h"], arrays["weight"], case.hyper)
    assert all(torch.equal(part["alpha"], parts[0]["alpha"]) for part in parts)
    return {
        "loss": torch.stack([part["loss"] for part in parts]).mean(),
        "alpha": parts[0]["alpha"],
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
        loss = mmcl_loss(view2, view1, duals, first=0, alpha_normalize="none", **kernel)
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
