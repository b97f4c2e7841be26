"""SogCLR: reference numbers, identities, ranks, state, and the recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslzoo.numerics import normalize
from sslzoo.optim import LARS
from sslzoo_methods.sogclr.bimodal import bimodal_loss
from sslzoo_methods.sogclr.gamma import decay_epochs, inner_rate
from sslzoo_methods.sogclr.gathering import columns_gradient, gather_columns
from sslzoo_methods.sogclr.loss import gcl_loss, gcl_loss_lean, ntxent_loss
from sslzoo_methods.sogclr.table import Descent, EstimatorTable, remember
from tests.golden_cases import DTYPES, GoldenCase
from tests.ranks import run_ranks

FORMS = {"dense": gcl_loss, "lean": gcl_loss_lean}
UNIMODAL = Descent(rho=0.3, eta=0.01, beta=0.9, tau_min=0.05, tau_max=0.7)
BIMODAL = Descent(rho=6.0, eta=0.01, beta=0.9, tau_min=0.005, tau_max=0.05)


# -- reference numbers ------------------------------------------------------------------------


def _gammas(hyper: dict[str, Any], steps: int) -> list[float]:
    schedule = hyper.get("gamma_schedule", "constant")
    per_epoch = hyper.get("steps_per_epoch", steps)
    epochs = hyper.get("epochs", max(steps // per_epoch, 1))
    return [
        inner_rate(
            step,
            schedule=schedule,
            gamma=hyper.get("gamma", 0.9),
            gamma_min=hyper.get("gamma_min", 0.2),
            decay_epochs=decay_epochs(hyper.get("gamma_decay_epochs", 0), epochs),
            steps_per_epoch=per_epoch,
        )
        for step in range(steps)
    ]


def _options(hyper: dict[str, Any]) -> dict[str, Any]:
    first = hyper.get("first_visit", "sample")
    return {
        "first_visit": first if first in ("batch", "none") else "sample",
        "u_write": "sum" if hyper.get("write", "mean").startswith("sum") else "mean",
        "u_floor": hyper.get("eps_clamp_u", 0.0),
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
            table.read(index),
            temperature=table.tau_i[index] if individual else tau,
            gamma=gamma,
            offset=0,
            **options,
        )
        loss.backward()
        assert h.grad is not None
        table.write(index, learned.log_u, learned.slope)
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
            (tables[0].read(index), tables[1].read(index)),
            temperature=(tables[0].tau_i[index], tables[1].tau_i[index]) if individual else (tau, tau),
            gamma=gamma,
            first_visit=_options(hyper)["first_visit"],
            u_floor=hyper.get("floor_on_u", 1e-20),
            scale="official",
            offset=0,
        )
        grads = torch.autograd.grad(loss, (za, zb))
        now = {"loss": loss.detach(), "grad_za": grads[0], "grad_zb": grads[1]}
        for side, table, estimates in zip("ab", tables, learned, strict=True):
            table.write(index, estimates.log_u, estimates.slope)
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
        log_u = table.read(index)
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
