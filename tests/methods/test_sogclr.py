"""SogCLR: reference numbers, identities, ranks, state, and the recipes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslzoo.batch import Batch
from sslzoo.callbacks.histograms import Histograms
from sslzoo.callbacks.meter import Meter
from sslzoo.distributed import all_reduce_mean
from sslzoo.nn.backbones import build_backbone, parameter_count
from sslzoo.nn.batchnorm import to_sync
from sslzoo.nn.numerics import normalize
from sslzoo.optim.optimizers import LARS, set_learning_rate
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import method_class, recipes
from sslzoo.recipe.sections import HeadConfig, LARSConfig
from sslzoo.run.build import load_weights
from sslzoo.testing.golden import DTYPES, GoldenCase
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.sogclr.bimodal import bimodal_loss, global_temperature_loss
from sslzoo_methods.sogclr.config import (
    GCL,
    BimodalGCL,
    CosineGamma,
    IndividualTemperatures,
    LearnableTemperature,
    NTXent,
    SogCLRConfig,
)
from sslzoo_methods.sogclr.gamma import inner_rate
from sslzoo_methods.sogclr.gathering import columns_gradient, gather_columns
from sslzoo_methods.sogclr.health import objective
from sslzoo_methods.sogclr.loss import (
    first_visits,
    gcl_columns_loss,
    gcl_loss,
    gcl_loss_lean,
    mix,
    negatives,
    new_entries,
    ntxent_loss,
)
from sslzoo_methods.sogclr.method import SogCLR
from sslzoo_methods.sogclr.table import Descent, EstimatorTable, mean_over_duplicates, remember

FORMS: dict[str, Callable[..., Any]] = {"dense": gcl_loss, "lean": gcl_loss_lean}
UNIMODAL = Descent(rho=0.3, eta=0.01, beta=0.9, tau_min=0.05, tau_max=0.7)
BIMODAL = Descent(rho=6.0, eta=0.01, beta=0.9, tau_min=0.005, tau_max=0.05)


# -- reference numbers ------------------------------------------------------------------------

SPEC = {"temperature": 0.1, "weight_decay": 0.0}


def _gammas(hyper: dict[str, Any], steps: int) -> list[float]:
    per_epoch = hyper.get("steps_per_epoch", steps)
    epochs = hyper.get("epochs", max(steps // per_epoch, 1))
    gamma, schedule = hyper.get("gamma", 0.9), hyper.get("gamma_schedule", "constant")
    if schedule != "constant":
        gamma = CosineGamma(
            min=hyper.get("gamma_min", 0.2),
            decay_epochs=hyper.get("gamma_decay_epochs") or None,
            interval="step" if schedule == "per_step" else "epoch",
        )
    return [inner_rate(step, gamma, steps_per_epoch=per_epoch, max_epochs=epochs) for step in range(steps)]


def _options(hyper: dict[str, Any]) -> dict[str, Any]:
    first = hyper.get("first_visit", "sample")
    return {
        "first_visit": first if first in ("batch", "none") else "sample",
        "u_write": "sum" if hyper.get("write", "mean").startswith("sum") else "mean",
        "u_floor": hyper.get("eps_clamp_u") or None,
    }


def _descent(hyper: dict[str, Any], defaults: Descent) -> Descent:
    return Descent(**{name: hyper.get(name, value) for name, value in defaults._asdict().items()})


def _table(size: int, tau: float, descent: Descent | None, dtype: torch.dtype) -> EstimatorTable:
    table = EstimatorTable(size, tau_init=tau, descent=descent).to(dtype)
    table.tau_i.fill_(tau)  # float32's rounding of tau is too coarse for a float64 run
    return table


def _unimodal(
    case: GoldenCase, precision: str, form: Callable[..., Any], individual: bool, **changes: Any
) -> dict[str, Any]:
    arrays, hyper = case.tensors(precision), case.hyper
    steps = arrays["h1"].shape[0]
    tau = hyper.get("tau_init", hyper["temperature"])
    table = _table(hyper["N"], tau, _descent(hyper, UNIMODAL) if individual else None, DTYPES[precision])
    options = _options(hyper) | changes
    gammas = _gammas(hyper, steps)
    got: dict[str, list[Tensor]] = {
        name: [] for name in ("loss", "grad_h1", "grad_h2", "log_u", "tau", "tau_grad_ema")
    }
    for step, gamma in enumerate(gammas):
        h = torch.stack([arrays["h1"][step], arrays["h2"][step]]).requires_grad_()
        index = arrays["index"][step]
        z = normalize(h)
        loss, learned = form(
            z,
            z,
            table.read("log_u", index),
            temperature=table.tau_i[index] if individual else tau,
            gamma=gamma,
            offset=0,
            **options,
        )
        loss.backward()
        assert h.grad is not None
        table.update(index, learned.log_u, learned.slope)
        for name, value in (
            ("loss", loss),
            ("grad_h1", h.grad[0]),
            ("grad_h2", h.grad[1]),
            ("log_u", table.log_u),
            ("tau", table.tau_i),
            ("tau_grad_ema", table.tau_grad),
        ):
            got[name].append(value.detach().clone())
    stacked = {name: torch.stack(values) for name, values in got.items()}
    return stacked | {
        "u": stacked["log_u"].exp(),
        "gamma_used": torch.tensor(gammas, dtype=DTYPES[precision]),
    }


def _check_unimodal(case: GoldenCase, precision: str, individual: bool = False) -> None:
    for form in FORMS.values():
        case.check(_unimodal(case, precision, form, individual), precision)


def _check_first_visit(case: GoldenCase, precision: str) -> None:
    for form in FORMS.values():
        batch = _unimodal(case, precision, form, False, first_visit="batch")
        sample = _unimodal(case, precision, form, False, first_visit="sample")
        case.check(batch | {f"sample_{name}": value for name, value in sample.items()}, precision)


def _check_bimodal(case: GoldenCase, precision: str, individual: bool) -> None:
    arrays, hyper = case.tensors(precision), case.hyper
    steps = arrays["za"].shape[0]
    tau = hyper.get("tau_init", hyper["temperature"])
    descent = _descent(hyper, BIMODAL) if individual else None
    tables = [_table(hyper["N"], tau, descent, DTYPES[precision]) for _ in "ab"]
    got: dict[str, list[Tensor]] = {}
    for step, gamma in enumerate(_gammas(hyper, steps)):
        za, zb = (arrays[name][step].requires_grad_() for name in ("za", "zb"))
        index = arrays["index"][step]
        loss, learned = bimodal_loss(
            (za, zb),
            (za, zb),
            (tables[0].read("log_u", index), tables[1].read("log_u", index)),
            temperature=(tables[0].tau_i[index], tables[1].tau_i[index]) if individual else (tau, tau),
            gamma=gamma,
            first_visit=_options(hyper)["first_visit"],
            u_floor=hyper.get("floor_on_u", 1e-20) or None,
            scale="official",
            offset=0,
        )
        grads = torch.autograd.grad(loss, (za, zb))
        now = {"loss": loss.detach(), "grad_za": grads[0], "grad_zb": grads[1]}
        for side, table, estimates in zip("ab", tables, learned, strict=True):
            table.update(index, estimates.log_u, estimates.slope)
            now |= {
                f"log_u_{side}": table.log_u.clone(),
                f"u_{side}": table.log_u.exp(),
                f"tau_{side}": table.tau_i.clone(),
                f"tau_grad_ema_{side}": table.tau_grad.clone(),
            }
        for name, value in now.items():
            got.setdefault(name, []).append(value)
    case.check({name: torch.stack(values) for name, values in got.items()}, precision)


def _ddp_rank(
    index_of_rank: int, world: int, arrays: dict[str, Tensor], hyper: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    steps, tau = arrays["h1"].shape[0], hyper["temperature"]
    options = _options(hyper)
    out: dict[str, list[Any]] = {}
    table = _table(hyper["N"], tau, None, dtype)
    for step, gamma in enumerate(_gammas(hyper, steps)):
        index = arrays["index"][step, index_of_rank]
        offset = index_of_rank * len(index)
        log_u = table.read("log_u", index)
        learned = None
        for how in ("full", "local", "full_noreduce"):
            for name, form in FORMS.items():
                h = torch.stack([arrays[k][step, index_of_rank] for k in ("h1", "h2")]).requires_grad_()
                z = normalize(h)
                columns = gather_columns(z, how)
                loss, learned = form(
                    z, columns, log_u, temperature=tau, gamma=gamma, offset=offset, **options
                )
                total = loss
                if how == "full_noreduce":
                    total = loss + columns_gradient(
                        z, columns, learned.log_mixed, temperature=tau, u_floor=options["u_floor"]
                    )
                total.backward()
                assert h.grad is not None
                out.setdefault(f"loss_{how}_{name}", []).append(loss.detach().numpy())
                out.setdefault(f"grad_{how}_{name}", []).append(h.grad.numpy())
        assert learned is not None
        remember([table], index, [learned])
        out.setdefault("log_u", []).append(table.log_u.clone().numpy())
    return out


def _check_ddp(case: GoldenCase, precision: str) -> None:
    arrays = case.tensors(precision)
    world = arrays["h1"].shape[1]
    ranks = run_ranks(world, _ddp_rank, arrays, case.hyper, DTYPES[precision])

    def of(name: str) -> Tensor:  # (S, W, ...)
        return torch.stack([torch.stack([torch.as_tensor(x) for x in r[name]]) for r in ranks], dim=1)

    tables = of("log_u")
    assert (tables == tables[:, :1]).all(), "the ranks' tables differ"
    for form in FORMS:
        for full in ("full", "full_noreduce"):
            grad, local = of(f"grad_{full}_{form}"), of(f"grad_local_{form}")
            got: dict[str, Tensor | float | int] = {
                "loss": of(f"loss_{full}_{form}"),
                "grad_h1": grad[:, :, 0],
                "grad_h2": grad[:, :, 1],
                "grad_local_h1": local[:, :, 0],
                "grad_local_h2": local[:, :, 1],
                "u": tables[:, 0].exp(),
                "log_u": tables[:, 0],
            }
            case.check(got, precision)


def _check_ntxent(case: GoldenCase, precision: str) -> None:
    arrays = case.tensors(precision)
    h = torch.stack([arrays["h1"], arrays["h2"]]).requires_grad_()
    z = normalize(h)
    loss = ntxent_loss(z, z, temperature=case.hyper["temperature"], offset=0)
    (grad,) = torch.autograd.grad(loss, h)
    case.check({"loss": loss, "grad_h1": grad[0], "grad_h2": grad[1]}, precision)


def _check_lars(case: GoldenCase, precision: str) -> None:
    arrays, hyper = case.tensors(precision), case.hyper
    names = [name.removesuffix("_init") for name in arrays if name.endswith("_init")]
    params = {name: torch.nn.Parameter(arrays[f"{name}_init"].clone()) for name in names}
    optimizer = LARS(
        params.values(),
        lr=0.0,
        momentum=hyper.get("momentum", 0.9),
        weight_decay=hyper["weight_decay"],
        trust_coefficient=hyper.get("trust_coefficient", 0.001),
    )
    got: dict[str, list[Tensor]] = {name: [] for name in names}
    for step, lr in enumerate(case.arrays["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            param.grad = arrays[f"{name}_grad"][step]
        optimizer.step()
        for name, param in params.items():
            got[name].append(param.detach().clone())
    case.check({name: torch.stack(values) for name, values in got.items()}, precision)


GOLDEN: dict[str, Callable[[GoldenCase, str], None]] = {
    "unimodal": _check_unimodal,
    "unimodal_first_visit": _check_first_visit,
    "unimodal_legacy_sum": _check_unimodal,
    "unimodal_cosine": _check_unimodal,
    "unimodal_individual_tau": lambda case, precision: _check_unimodal(case, precision, individual=True),
    "bimodal_constant_tau": lambda case, precision: _check_bimodal(case, precision, individual=False),
    "bimodal_individual_tau": lambda case, precision: _check_bimodal(case, precision, individual=True),
    "ddp": _check_ddp,
    "ntxent": _check_ntxent,
    "lars": _check_lars,
}


def test_golden(golden_case: GoldenCase, precision: str) -> None:
    assert golden_case.kind in GOLDEN, f"unknown kind {golden_case.kind!r}"
    GOLDEN[golden_case.kind](golden_case, precision)


# -- the losses ------------------------------------------------------------------------------


def _embeddings(views: int, batch: int, dim: int = 6, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(views, batch, dim, dtype=torch.float64, generator=generator))


OPTIONS: dict[str, Any] = {
    "temperature": 0.2,
    "gamma": 0.7,
    "first_visit": "sample",
    "u_write": "mean",
    "u_floor": None,
    "offset": 0,
}


def _gradient(form: Callable[..., Any], z: Tensor, log_u: Tensor, **changes: Any) -> Tensor:
    z = z.detach().requires_grad_()
    (grad,) = torch.autograd.grad(form(z, z, log_u, **(OPTIONS | changes))[0], z)
    return grad


def test_gamma_one_is_tau_times_the_decoupled_loss():
    z = _embeddings(2, 7).requires_grad_()
    scores = torch.einsum("gbd,vcd->gbvc", z, z)
    negatives = scores.masked_fill(torch.eye(7, dtype=torch.bool)[None, :, None], -torch.inf) / 0.2
    positive = (z[0] * z[1]).sum(1)
    decoupled = (negatives.flatten(2).logsumexp(2) - positive / 0.2).sum(0).mean()
    (expected,) = torch.autograd.grad(0.2 * decoupled, z)
    for form in FORMS.values():
        grad = _gradient(form, z, torch.randn(7, dtype=torch.float64), gamma=1.0)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


def test_a_stale_estimate_scales_only_the_repulsion_and_at_most_by_one_over_gamma():
    z, seen = _embeddings(2, 5), torch.zeros(5, dtype=torch.float64)
    attraction = -z.flip(0) * 2 / 5  # of both anchors: as anchor and as the other's positive
    fresh = _gradient(gcl_loss_lean, z, seen, gamma=1.0) - attraction
    lagging = _gradient(gcl_loss_lean, z, seen - 1e4, gamma=0.25) - attraction
    torch.testing.assert_close(lagging, fresh / 0.25, rtol=1e-12, atol=1e-14)
    ahead = _gradient(gcl_loss_lean, z, seen + 1e4, gamma=0.25) - attraction
    torch.testing.assert_close(ahead, torch.zeros_like(ahead), rtol=0, atol=1e-12)


@pytest.mark.parametrize("views", [(2, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("individual", [False, True])
def test_lean_equals_dense(views, individual, monkeypatch):
    monkeypatch.setattr("sslzoo.nn.streaming.BLOCK", {"cpu": 40})  # blocks of one to three anchors
    anchors, total = views
    z = _embeddings(total, 9)
    own = z[:anchors, 2:6].clone()
    log_u = torch.tensor([-torch.inf, 0.3, -2.0, 5.0], dtype=torch.float64)
    tau = torch.tensor([0.1, 0.2, 0.3, 0.05], dtype=torch.float64) if individual else 0.1
    got = []
    for form in FORMS.values():
        a, c = own.clone().requires_grad_(), z.clone().requires_grad_()
        changes = {"temperature": tau, "u_floor": 0.5, "offset": 2, "u_write": "sum"}
        loss, learned = form(a, c, log_u, **(OPTIONS | changes))
        got.append([loss.detach(), *torch.autograd.grad(loss, (a, c)), *learned])
    for dense, lean in zip(*got, strict=True):
        torch.testing.assert_close(lean, dense, rtol=1e-11, atol=1e-13)


def test_lean_needs_no_gradient_to_be_computed():
    z = _embeddings(2, 5)
    log_u = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        losses = [form(z, z, log_u, **OPTIONS)[0] for form in FORMS.values()]
    torch.testing.assert_close(losses[0], losses[1])


def test_surrogate_gradient_by_finite_differences():
    """With the weights held, that is at gamma = 1 by the objective itself: its gradient is L's."""
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def true_objective(h: Tensor) -> Tensor:
        n = normalize(h)
        _, learned = FORMS["dense"](n, n, torch.zeros(4, dtype=torch.float64), **(OPTIONS | {"gamma": 1.0}))
        return objective(learned.log_mixed, learned.positive, 0.2) * 2  # L sums the directions

    n = normalize(z)
    loss, _ = FORMS["lean"](n, n, torch.zeros(4, dtype=torch.float64), **(OPTIONS | {"gamma": 1.0}))
    (grad,) = torch.autograd.grad(loss, z)
    direction, eps = torch.randn_like(z), 1e-6
    with torch.no_grad():
        slope = (true_objective(z + eps * direction) - true_objective(z - eps * direction)) / (2 * eps)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tiny_temperature_and_duplicate_images_stay_finite(form):
    z = _embeddings(2, 6)
    z[:, 1] = z[:, 0]  # the same image twice: similarity 1, over 0.008 beyond float32's exp
    log_u = torch.full((6,), -torch.inf, dtype=torch.float64)
    exact = _gradient(form, z, log_u, temperature=0.008)
    rounded = _gradient(form, z.float(), log_u.float(), temperature=0.008)
    assert rounded.isfinite().all()
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-3, atol=2e-4)
    exact, rounded = (_gradient(form, x, log_u.to(x.dtype), temperature=0.07) for x in (z, z.float()))
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_one_image_a_rank_without_reducing(views):
    """Four ranks of one image each: no column of a rank is another image's for its own anchors."""
    batch = 4
    log_u = torch.randn(batch, dtype=torch.float64)
    whole = _embeddings(views, batch).requires_grad_()
    loss, estimates = gcl_loss_lean(whole[:2], whole, log_u, **OPTIONS)
    (expected,) = torch.autograd.grad(loss, whole)
    fixed = {name: OPTIONS[name] for name in ("temperature", "u_floor")}
    for r in range(batch):
        own = whole.detach()[:, r : r + 1].requires_grad_()
        options: dict[str, Any] = OPTIONS | {"offset": r}
        anchored, _ = gcl_loss_lean(own[:2], whole.detach(), log_u[r : r + 1], **options)
        columns = gcl_columns_loss(own, whole.detach()[:2], estimates.log_mixed, **fixed, offset=r)
        (got,) = torch.autograd.grad(anchored + columns, own)
        torch.testing.assert_close(got[:, 0] / batch, expected[:, r])


def test_first_visit_rules():
    log_u, log_batch = torch.tensor([-torch.inf, 0.0]), torch.zeros(1, 2)
    none = mix(log_u, log_batch, first_visits(log_u, "none"), 0.25).exp()
    sample = mix(log_u, log_batch, first_visits(log_u, "sample"), 0.25).exp()
    mixed = mix(log_u, log_batch, first_visits(log_u, "batch"), 0.25).exp()
    torch.testing.assert_close(none, torch.tensor([[0.25, 1.0]]))
    torch.testing.assert_close(sample, torch.ones(1, 2))
    torch.testing.assert_close(mixed, none)
    unseen = log_u[:1].expand(2)
    assert first_visits(unseen, "batch").all()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="diverges"):
        new_entries(torch.zeros(2, 3), u_write="sum", gamma=0.5)
    with pytest.raises(ValueError, match="no negatives"):
        negatives(torch.zeros(2, 1, 4))


def test_ntxent_by_brute_force_with_a_local_view():
    z, tau = _embeddings(3, 4), 0.3
    total = 0.0
    for g in range(2):
        for i in range(4):
            s = {(v, j): z[g, i] @ z[v, j] / tau for v in range(3) for j in range(4) if (v, j) != (g, i)}
            positive = sum(s[v, i] for v in range(3) if v != g) / 2
            total += torch.stack(list(s.values())).logsumexp(0) - positive
    got = ntxent_loss(z[:2], z, temperature=tau, offset=0)
    torch.testing.assert_close(got, total / 4, rtol=1e-12, atol=0)


def test_individual_temperatures_follow_the_objective():
    """At gamma = 1, slope + rho is d/dtau of the mean over views of tau * log g, plus rho * tau."""
    z, tau = _embeddings(2, 5), torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    log_u, eps = torch.zeros(5, dtype=torch.float64), 1e-6

    def learned(t: Tensor) -> Any:
        return gcl_loss_lean(z, z, log_u, **(OPTIONS | {"gamma": 1.0, "temperature": t}))[1]

    values = [(t * learned(t).log_mixed).mean(0) for t in (tau + eps, tau - eps)]
    torch.testing.assert_close(learned(tau).slope, (values[0] - values[1]) / (2 * eps), rtol=1e-7, atol=1e-8)


def _bimodal(z: Tensor, tables: list[Tensor], tau: float | Tensor, **changes: Any) -> Any:
    """The loss of two equal modalities (2, B, D) on one process, at gamma = 1 unless changed."""
    options: dict[str, Any] = {
        "gamma": 1.0,
        "first_visit": "sample",
        "u_floor": None,
        "scale": "mean",
    } | changes
    return bimodal_loss(list(z), list(z), tables, temperature=(tau, tau), offset=0, **options)


def test_bimodal_temperature_gradients_are_the_objectives():
    z = _embeddings(2, 5)
    tables, eps, rho = [torch.zeros(5, dtype=torch.float64)] * 2, 1e-6, 6.5

    def learned(tau: Any) -> Any:
        return _bimodal(z, tables, tau)[1]

    def value(tau: Tensor) -> Tensor:
        both = torch.stack([tau * estimates.log_mixed[0] for estimates in learned(tau)])
        return both.sum(0).mean() / 2 + rho * tau

    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(global_temperature_loss(tau, learned(tau), rho=rho), tau)
    with torch.no_grad():
        slope = (value(tau + eps) - value(tau - eps)) / (2 * eps)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-8)

    rows = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    for side in range(2):
        up, down = (t * learned(t)[side].log_mixed[0] for t in (rows + eps, rows - eps))
        expected = (up - down) / (2 * eps)
        torch.testing.assert_close(learned(rows)[side].slope, expected, rtol=1e-7, atol=1e-8)


def test_bimodal_scale_and_floor():
    z = _embeddings(2, 5)
    tables = [torch.full((5,), -torch.inf, dtype=torch.float64)] * 2
    mean, learned = _bimodal(z, tables, 0.1, gamma=0.8)
    official, _ = _bimodal(z, tables, 0.1, gamma=0.8, scale="official")
    torch.testing.assert_close(official, 4 * mean)
    floor = float(learned[0].log_u.exp().max()) * 2
    _, high = _bimodal(z, tables, 0.1, gamma=0.8, u_floor=floor)
    assert (high[0].log_u.exp() >= floor * (1 - 1e-12)).all()


def test_bimodal_gradient_at_gamma_one_by_finite_differences():
    z = _embeddings(2, 4).requires_grad_()
    tables = [torch.zeros(4, dtype=torch.float64)] * 2
    (grad,) = torch.autograd.grad(_bimodal(z, tables, 0.2)[0], z)

    def value(x: Tensor) -> Tensor:
        learned = _bimodal(x, tables, 0.2)[1]
        return 0.2 * torch.stack([e.log_mixed for e in learned]).mean()

    direction, eps = torch.randn_like(z), 1e-6
    with torch.no_grad():
        slope = (value(z + eps * direction) - value(z - eps * direction)) / (2 * eps)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-7, atol=1e-9)


def test_gamma_schedules():
    def rate(step: int, gamma: float | CosineGamma, max_epochs: int = 100) -> float:
        return inner_rate(step, gamma, steps_per_epoch=10, max_epochs=max_epochs)

    cosine = CosineGamma(min=0.2, decay_epochs=4)
    assert rate(25, 0.9) == 0.9
    assert rate(9, cosine) == 1.0
    assert rate(25, cosine) == pytest.approx(0.6)
    assert rate(40, cosine) == 0.2
    fine = CosineGamma(min=0.2, decay_epochs=4, interval="step")
    assert rate(9, fine) < 1.0
    assert rate(20, fine) == pytest.approx(0.6)
    half = CosineGamma(min=0.2)
    assert rate(179, half, 37) > rate(180, half, 37) == 0.2
    assert rate(9, half, 1) == 1.0
    assert rate(10, half, 1) == 0.2


# -- the table -------------------------------------------------------------------------------


def test_duplicates_share_their_mean(monkeypatch):
    monkeypatch.setattr("sslzoo_methods.sogclr.table.PAIRS", 10)  # two rows at a time
    index, values = torch.tensor([3, 1, 3, 0, 3]), torch.tensor([1.0, 2.0, 4.0, -1.0, 7.0])
    linear = mean_over_duplicates(index, values, log_space=False)
    torch.testing.assert_close(linear, torch.tensor([4.0, 2.0, 4.0, -1.0, 4.0]))
    logs = mean_over_duplicates(index, values.log().nan_to_num(0), log_space=True).exp()
    torch.testing.assert_close(logs, torch.tensor([4.0, 2.0, 4.0, 1.0, 4.0]))


# -- the method ------------------------------------------------------------------------------

IMAGES, BATCH = 20, 6
INDIVIDUAL = IndividualTemperatures(rho=0.3, eta=0.1, beta=0.9, tau_min=0.05, tau_max=0.7)
GLOBAL = LearnableTemperature(rho=6.0, tau_min=0.1, lr_factor=2.0)
PLAIN = SogCLRConfig(
    name="sogclr",
    temperature=0.2,
    loss=GCL(gamma=0.8),
    projector=HeadConfig(widths=(7, 5), output_norm="batch_no_affine", output_bias=False),
)
FLAVOURS: dict[str, SogCLRConfig] = {
    "gcl": PLAIN,
    "locals": replace(PLAIN, loss=GCL(gamma=CosineGamma(min=0.3))),
    "individual": replace(PLAIN, loss=GCL(gamma=0.8, temperature_rule=INDIVIDUAL)),
    "noreduce": replace(
        PLAIN,
        loss=GCL(
            gamma=0.8, temperature_rule=INDIVIDUAL, gather_grad="full_noreduce", divide_by_temperature=True
        ),
        crop_batching="per_crop",
    ),
    "bimodal": replace(PLAIN, loss=BimodalGCL(gamma=0.8, u_floor=1e-20)),
    "bimodal-individual": replace(
        PLAIN, loss=BimodalGCL(gamma=0.8, scale="official", temperature_rule=INDIVIDUAL)
    ),
    "bimodal-global": replace(
        PLAIN, loss=BimodalGCL(gamma=0.8, temperature_rule=GLOBAL), projector=HeadConfig(widths=(7, 5))
    ),
    "ntxent": replace(PLAIN, loss=NTXent()),
}


def _method(flavour: str, world: int = 1, dtype: torch.dtype = torch.float64) -> SogCLR:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    method = SogCLR(FLAVOURS[flavour], backbone, 8)
    plan = TrainingPlan(dataset_size=IMAGES, global_batch_size=BATCH, max_epochs=2, world_size=world)
    optim = LARSConfig(lr=0.5, lr_scaling="none", weight_decay=1e-3, warmup_epochs=0)
    method.prepare(plan, optim, 0)
    converted = to_sync(method).to(dtype)
    assert isinstance(converted, SogCLR)
    return converted


def _only_table(method: SogCLR) -> EstimatorTable:
    (table,) = method.tables
    assert isinstance(table, EstimatorTable)
    return table


def _batch(step: int, rows: slice, dtype: torch.dtype = torch.float64, local: bool = False) -> Batch:
    """Rows of a global batch in which an image occurs three times, on several ranks."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(3, BATCH, 6, dtype=torch.float64, generator=generator).to(dtype)
    index = torch.randperm(IMAGES, generator=generator)[:BATCH]
    index[[2, 5]] = index[0].clone()
    a, b, c = views[:, rows]
    return Batch((a, b), (c,) if local else (), index[rows])


def _train(method: SogCLR, steps: range, world: int, rows: slice, local: bool = False) -> list[Tensor]:
    """A bare training loop with DDP's mean of the gradients; the losses."""
    optimizer = method.configure_optimizers()
    losses = []
    for step in steps:
        loss = method.loss(_batch(step, rows, local=local))
        optimizer.zero_grad()
        loss.backward()
        for p in method.parameters():
            if p.grad is not None:
                p.grad.copy_(all_reduce_mean(p.grad))
        set_learning_rate(optimizer, 0.5)
        optimizer.step()
        method.finish_step()
        losses.append(all_reduce_mean(loss.detach()))
    return losses


def _after_training(index_of_rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Losses and state of each flavour."""
    share = BATCH // world
    rows = slice(index_of_rank * share, (index_of_rank + 1) * share)
    found = {}
    for flavour in FLAVOURS:
        method = _method(flavour, world)
        losses = _train(method, range(5), world, rows, local=flavour == "locals")
        found[flavour] = {"losses": torch.stack(losses), **method.state_dict()}
    return found


def test_an_image_that_several_processes_hold_counts_as_on_one():
    """The contract's tests have every variant on images that differ; here one comes three times."""
    alone = _after_training(0, 1)
    ranks = run_ranks(3, _after_training)
    for flavour, expected in alone.items():
        for states in ranks:
            for name, value in expected.items():
                got = states[flavour][name]
                torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-10, msg=f"{flavour}: {name}")
                if name.startswith("tables"):
                    assert torch.equal(got, ranks[0][flavour][name]), (
                        f"{flavour}: {name} differs between ranks"
                    )


def test_table_holds_exactly_the_visited_images():
    method = _method("individual")
    _train(method, range(3), 1, slice(0, BATCH))
    table = _only_table(method)
    *earlier, last = (_batch(step, slice(0, BATCH)).sample_id for step in range(3))
    again = torch.isin(last, torch.cat(earlier)).double().mean()
    assert 0 < again < 1
    assert float(method.recorded["method/visited"]) == pytest.approx(float(again))
    seen = torch.cat([*earlier, last]).unique()
    finite = table.log_u.isfinite().nonzero().squeeze(1)
    assert finite.tolist() == seen.tolist()
    touched = (table.tau_i != torch.tensor(0.2)).nonzero().squeeze(1)
    assert touched.tolist() == seen.tolist()
    assert method.recorded["method/temperature"] > 0


def test_gradient_accumulation_is_two_batches_of_their_own():
    """Each micro-batch has its own negatives and writes the table: stated, not hidden."""
    method = _method("gcl")
    for half in (slice(0, 3), slice(3, 6)):
        method.loss(_batch(0, half))
    whole = _method("gcl")
    whole.loss(_batch(0, slice(0, 6)))
    halves, together = _only_table(method).log_u, _only_table(whole).log_u
    assert not torch.equal(halves, together)
    assert torch.equal(halves.isfinite(), together.isfinite())


def test_weights_alone_start_with_an_empty_table(tmp_path):
    trained = _method("individual")
    _train(trained, range(2), 1, slice(0, BATCH))
    torch.save({"state_dict": trained.state_dict(), "optimizer_steps": 2}, tmp_path / "a.ckpt")
    method = _method("individual")
    load_weights(method, tmp_path / "a.ckpt")
    name = "projector.0.weight"
    assert torch.equal(method.state_dict()[name], trained.state_dict()[name])
    assert _only_table(method).log_u.isneginf().all()


def test_weights_go_to_a_loss_without_a_table(tmp_path, caplog):
    """Heads included, though the checkpoint has keys that this method has not."""
    trained, checkpoint = _method("individual"), {}
    trained.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | {"state_dict": trained.state_dict()}, tmp_path / "a.ckpt")
    method = _method("ntxent")
    weight = method.state_dict()["projector.0.weight"].zero_()
    load_weights(method, tmp_path / "a.ckpt")
    assert torch.equal(weight, trained.state_dict()["projector.0.weight"])
    assert "not loading tables.0" in caplog.text


def test_histograms_on_request(tmp_path):
    method = _method("bimodal")
    method.cfg = replace(PLAIN, loss=BimodalGCL(gamma=0.8, histogram_every_epochs=2))
    meter = Meter(tmp_path, every_steps=1)
    _train(method, range(method.plan.steps_per_epoch), 1, slice(0, BATCH))
    method._trainer = SimpleNamespace(callbacks=[meter])  # type: ignore[assignment]
    method.on_train_epoch_end()
    assert Histograms(tmp_path).read() == []
    method.optimizer_steps = 2 * method.plan.steps_per_epoch
    method.on_train_epoch_end()
    first, second = Histograms(tmp_path).read()
    assert (first.name, first.step) == ("method/log_u_0", 6)
    assert (second.name, second.step) == ("method/log_u_1", 6)
    table = method.tables[1]
    assert isinstance(table, EstimatorTable)
    known = table.known()
    assert sum(second.counts) == len(known) and second.edges[-1] == pytest.approx(float(known.max()))


class _NoSync(TorchDispatchMode):
    """Refuses what waits for a device: reading a scalar, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "_unique2",
            "bincount",
            "masked_select",
            "equal",
        )
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_step_does_not_synchronise_with_the_host(flavour):
    method = _method(flavour, dtype=torch.float32)
    method.loss(_batch(0, slice(0, BATCH), torch.float32))  # the first one validates the ids
    with _NoSync():
        method.loss(_batch(1, slice(0, BATCH), torch.float32)).backward()
    with pytest.raises(AssertionError), _NoSync():
        torch.ones(()).item()


def test_learnable_temperature_has_its_own_group_and_bound():
    method = _method("bimodal-global")
    groups = method.configure_optimizers().param_groups
    (own,) = [g for g in groups if any(p is method.tau for p in g["params"])]
    assert own["params"] == [method.tau]
    assert own["weight_decay"] == 0
    assert own["lr_factor"] == 2.0
    _train(method, range(5), 1, slice(0, BATCH))  # rho 6 drives it down
    assert method.tau.item() == pytest.approx(0.1)


def test_an_id_outside_the_table_is_refused():
    method = _method("gcl")
    with pytest.raises(ValueError, match="outside the table of 20"):
        method.loss(_batch(0, slice(0, BATCH))._replace(sample_id=torch.arange(15, 15 + BATCH)))


RULE = "{name: individual, rho: 0.3, eta: 0.1, beta: 0.9, tau_min: 0.05, tau_max: 0.7}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["temperature=individual"], "temperature: expected a number, got 'individual'"),
        (["tau=0.1"], "tau: renamed: use method.temperature"),
        (["gamma_min=0.1"], "gamma_min: renamed: use method.loss.gamma={name: cosine, min: ...}"),
        (["rho=0.1"], "rho: renamed: use method.loss.temperature_rule.rho"),
        (["separate_views=true"], "separate_views: renamed: use method.crop_batching"),
        (["on_data_change=refuse"], "on_data_change: unknown key"),
        (["temperature=0"], "temperature: must be positive"),
        (["loss=gcl"], "loss.gamma: missing key; method.loss gcl needs it"),
        (["loss.gamma=0"], "loss.gamma: must lie in"),
        (["loss.gamma={min: 0.2}"], "loss.gamma.name: missing key; one of cosine"),
        (["loss.gamma={name: cosine, min: 0}"], "loss.gamma.min: must lie in"),
        (["loss.gamma={name: cosine, min: 0.2, decay_epochs: 0}"], "loss.gamma.decay_epochs: must be positive"),
        (["loss.u_write=sum", "loss.gamma=0.5"], "loss.u_write: must be mean with gamma=0.5"),
        (["loss.u_write=sum", "loss.gamma=1"], "loss.u_write: must be mean with gamma=1.0"),
        (["loss.first_visit=batch", "loss.gamma=1"], "loss.first_visit: must be sample with gamma=1"),
        (["loss.u_floor=0"], "loss.u_floor: must be positive"),
        (["loss={name: ntxent, gamma: 0.9}"], "loss.gamma: not a key of method.loss ntxent"),
        (["loss={name: ntxent, gather_grad: full_noreduce}"], "loss.gather_grad: must be one of full, local"),
        (["loss={name: gcl_bimodal, gamma: 0.9, u_write: sum}"], "loss.u_write: not a key of method.loss gcl_b"),
        (["loss.temperature_rule=global_learnable"], "loss.temperature_rule: must be one of constant, individual"),
        (["loss.temperature_rule.rho=0.3"], "loss.temperature_rule.rho: not a key of"),
        (["loss.temperature_rule=individual"], "loss.temperature_rule.rho: missing key"),
        ([f"loss.temperature_rule={RULE}", "temperature=0.8"], "temperature: must be at most"),
        ([f"loss.temperature_rule={RULE}", "temperature=0.01"], "temperature: must be at least"),
        ([f"loss.temperature_rule={RULE}", "loss.temperature_rule.beta=1.5"], "beta: must be at most 1"),
        ([f"loss.temperature_rule={RULE}", "loss.temperature_rule.tau_max=0.01"], "tau_max: must be at least"),
        (["loss.histogram_every_epochs=1"], "loss.histogram_every_epochs: needs TensorBoard or W&B"),
        (["!views.0.count=1"], "views: must have at least two global views, got 1"),
        (
            ["loss={name: gcl_bimodal, gamma: 0.9}", "!views.0.count=3"],
            "views: must be exactly two global views",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_say(overrides, said):
    overrides = [o[1:] if o.startswith("!") else f"method.{o}" for o in overrides]
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("sogclr_fashion_mnist", overrides)


# -- recipes and runs ------------------------------------------------------------------------

BUNDLED = [name for name in recipes() if name.startswith("sogclr_")]


@pytest.mark.parametrize("name", BUNDLED)
def test_recipe_builds(name):
    recipe = load_recipe(name, []).recipe
    with torch.device("meta"):
        backbone, width = build_backbone(recipe.backbone)
        method = method_class("sogclr")(recipe.method, backbone, width)
    assert isinstance(method, SogCLR)
    if name == "sogclr_in1k_pt":  # the official network's size
        assert parameter_count(method) == 27_968_576
        assert parameter_count(method.projector) == 4_460_544
    if name == "sogclr_in100":
        classes = recipe.data.class_names
        assert len(classes) == 100
        assert list(classes) == sorted(classes)
        assert (classes[0], classes[-1]) == ("n01440764", "n01855672")


def test_the_cards_example_runs():
    card = Path(__file__).parents[2] / "methods/sslzoo_methods/sogclr/README.md"
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["loss"].isfinite()
    assert all(int(table.log_u.isfinite().sum()) == 8 for table in names["tables"])
