"""MetAug's losses and bilevel step: reference numbers, identities, derivatives, the banks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sslzoo.batchnorm import SyncBatchNorm
from sslzoo.distributed import all_reduce_mean, gather
from sslzoo.numerics import normalize
from sslzoo_methods.metaug.banks import MemoryBanks
from sslzoo_methods.metaug.loss import (
    Contrast,
    Margin,
    Objective,
    bank_objective,
    batch_objective,
    margin_regulariser,
    oucl,
    score,
)
from sslzoo_methods.metaug.meta import mean_over_ranks, meta_gradient
from tests.golden_cases import DTYPES, GoldenCase
from tests.ranks import run_ranks

PLAIN = Contrast(16.0, 16.0, "none", False, 0.25)
CIRCLE = Contrast(32.0, 16.0, "circle", True, 0.25)
LARGE = Margin("large", 1.0, False)
OFFICIAL = ("l", "ab", "ori")
# (query, key) of the official columns: l<-ab, ab<-l, l<-ori, ori<-l, ori<-ab, ab<-ori
COLUMNS = [(1, 0), (0, 1), (2, 0), (0, 2), (1, 2), (2, 1)]


# -- reference numbers ------------------------------------------------------------------------


def _contrast(hyper: Mapping[str, Any]) -> Contrast:
    return Contrast(
        hyper["gamma"],
        hyper.get("scale", 16.0),
        hyper.get("weighting", "none"),
        hyper.get("shift", False),
        hyper.get("m", 0.25),
    )


def _margin(hyper: Mapping[str, Any]) -> Margin:
    return Margin(hyper.get("margin", "large"), hyper["margin_pos_weight"], hyper.get("detach_sigma", False))


def _weights(hyper: Mapping[str, Any], *, encoder_step: bool = False) -> dict[str, Any]:
    where = hyper.get("margin_in", "both")
    off = where == "none" or (encoder_step and where == "generator")
    return {"aug_weight": hyper["aug_weight"], "margin_weight": 0.0 if off else hyper["margin_weight"]}


def _check_oucl(case: GoldenCase, precision: str) -> None:
    arrays, contrast = case.tensors(precision), _contrast(case.hyper)
    pos, neg = arrays["pos"].requires_grad_(), arrays["neg"].requires_grad_()
    loss = oucl([score(pos, neg, contrast)], contrast)
    grads = torch.autograd.grad(loss, [pos, neg])
    case.check({"loss": loss, "grad_pos": grads[0], "grad_neg": grads[1]}, precision)


def _check_margin(case: GoldenCase, precision: str) -> None:
    arrays = case.tensors(precision)
    names = ("pos", "neg", "aug_pos", "aug_neg")
    leaves = [arrays[name].requires_grad_() for name in names]
    got: dict[str, Any] = {}
    for suffix, detach in (("", False), ("_detached", True)):
        margin = _margin(case.hyper)._replace(detach_sigma=detach)
        reference = score(leaves[0], leaves[1], PLAIN)
        generated = score(leaves[2], leaves[3], PLAIN)
        loss, sigma_pos, sigma_neg = margin_regulariser([reference], [generated], margin)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        got |= {f"grad_{name}{suffix}": grad for name, grad in zip(names, grads, strict=True)}
        got |= {"loss": loss, "sigma_pos": sigma_pos, "sigma_neg": sigma_neg}
    case.check(got, precision)


def _banks(arrays: Mapping[str, Tensor], prefix: str) -> MemoryBanks:
    rows = torch.stack([arrays[prefix + name] for name in OFFICIAL])
    banks = MemoryBanks(*rows.shape, seed=0).to(rows.dtype)
    banks.rows.copy_(rows)
    return banks


def _check_banks(case: GoldenCase, precision: str) -> None:
    arrays, contrast = case.tensors(precision), _contrast(case.hyper)
    banks, got, t = _banks(arrays, "mem0_"), {}, 0
    while f"s{t}_y" in arrays:
        z = [arrays[f"s{t}_z_{name}"].requires_grad_() for name in OFFICIAL]
        keys = banks.keys(arrays[f"s{t}_idx"])
        one = Margin("large", 0.0, True)
        objective = bank_objective(
            z, z, [keys] * 5, contrast=contrast, margin=one, aug_weight=0.0, margin_weight=0.0
        )
        grads = torch.autograd.grad(objective.loss, z)
        similar = {(u, v): (1 + torch.einsum("nd,nkd->nk", z[u], keys[v])) / 2 for u, v in COLUMNS}
        banks.update(arrays[f"s{t}_y"], torch.stack(z), momentum=case.hyper["bank_momentum"])
        got |= {
            f"s{t}_loss": objective.loss,
            f"s{t}_pos": torch.cat([similar[pair][:, :1] for pair in COLUMNS], 1),
            f"s{t}_neg": torch.cat([similar[pair][:, 1:] for pair in COLUMNS], 1),
        }
        for u, name in enumerate(OFFICIAL):
            got |= {f"s{t}_grad_{name}": grads[u], f"s{t}_mem_{name}": banks.rows[u].clone()}
        t += 1
    case.check(got, precision)


def _in_batch(
    z: list[Tensor], generated: list[Tensor], hyper: Mapping[str, Any], rank: int, **weights: Any
) -> Objective:
    return batch_objective(
        z,
        generated,
        torch.stack([gather(x) for x in z]),
        offset=rank * len(z[0]),
        contrast=_contrast(hyper),
        margin=_margin(hyper),
        query_keys=torch.stack([gather(x) for x in (*z, *generated)])
        if hyper.get("same_view_negatives", False)
        else None,
        unified=hyper.get("contrast_set", "terms") == "unified",
        **weights,
    )


def _shard(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank].clone()


def _objective_rank(
    rank: int, world: int, arrays: dict[str, Tensor], hyper: dict[str, Any]
) -> dict[str, Tensor]:
    views = sum(name.startswith("zt") for name in arrays)
    names = [f"{kind}{u}" for kind in ("z", "zt") for u in range(views)]
    leaves = [_shard(arrays[name], rank, world).requires_grad_() for name in names]
    out = _in_batch(leaves[:views], leaves[views:], hyper, rank, **_weights(hyper))
    grads = torch.autograd.grad(out.loss, leaves)
    got = {f"grad_{name}": gather(grad) / world for name, grad in zip(names, grads, strict=True)}
    scalars = {"loss": out.loss, "terms": out.terms, "R": out.regulariser}
    return got | {name: all_reduce_mean(value).detach() for name, value in scalars.items()}


def _on_all_worlds(fn: Callable[..., dict[str, Any]], case: GoldenCase, precision: str) -> None:
    arrays = case.tensors(precision)
    for world in case.hyper.get("world_sizes", [1]):
        results = run_ranks(world, fn, arrays, case.hyper) if world > 1 else [fn(0, 1, arrays, case.hyper)]
        for got in results:
            case.check(got, precision)


def _network(layers: list[str], sizes: list[tuple[int, ...]], world: int) -> nn.Sequential:
    """The layers of a case; ``sizes`` are the shapes of its weights in order."""
    shapes, width, built = iter(sizes), 0, []
    for layer in layers:
        if layer == "linear":
            width, fan_in = next(shapes)
            built.append(nn.Linear(fan_in, width))
        elif layer == "batchnorm":
            next(shapes)
            kind = SyncBatchNorm if world > 1 else nn.BatchNorm1d
            built.append(kind(width, track_running_stats=False))
        else:
            built.append({"tanh": nn.Tanh, "relu": nn.ReLU, "l2norm": Unit}[layer]())
    return nn.Sequential(*built)


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return normalize(x)


def _nets(arrays: Mapping[str, Tensor], layers: list[str], prefixes: list[str], world: int) -> nn.ModuleList:
    """A network for each prefix of the arrays' names, with the parameters of ``init_<prefix>``."""
    nets = nn.ModuleList()
    for prefix in prefixes:
        head = f"init_{prefix}."
        state = {name.removeprefix(head): a for name, a in arrays.items() if name.startswith(head)}
        net = _network(layers, [tuple(a.shape) for name, a in state.items() if "weight" in name], world)
        net.to(next(iter(state.values())).dtype).load_state_dict(state)
        nets.append(net)
    return nets


def _named(nets: nn.ModuleList, prefixes: list[str]) -> dict[str, nn.Parameter]:
    return {f"{p}.{n}": w for p, net in zip(prefixes, nets, strict=True) for n, w in net.named_parameters()}


def _sgd(parameters: Any, lr: float, hyper: Mapping[str, Any]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])


def _iteration(
    encoder: nn.ModuleList,
    generators: nn.ModuleList,
    optimizers: tuple[torch.optim.SGD, torch.optim.SGD],
    inputs: list[Tensor],
    evaluate: Callable[[list[Tensor], list[Tensor], int], Objective],
    hyper: Mapping[str, Any],
) -> dict[str, Any]:
    """An encoder step and a generator step; losses and gradients are means over the ranks."""

    def objective(theta: Mapping[str, Tensor], omega: Mapping[str, Tensor], call: int) -> Tensor:
        z = functional_call(_Each(encoder), dict(theta), (inputs,))
        return evaluate(z, functional_call(_Each(generators), dict(omega), (z,)), call).loss

    live = {n: p.detach() for n, p in _Each(generators).named_parameters()}
    trained = dict(_Each(encoder).named_parameters())
    loss = objective(trained, live, 0)
    enc_grads = mean_over_ranks(torch.autograd.grad(loss, list(trained.values())))
    for p, grad in zip(trained.values(), enc_grads, strict=True):
        p.grad = grad
    optimizers[0].step()

    theta = {n: p.detach().requires_grad_() for n, p in trained.items()}
    omega = {n: p.detach().requires_grad_() for n, p in _Each(generators).named_parameters()}
    found = meta_gradient(
        lambda t: objective(t, omega, 1),
        lambda t: objective(t, omega, 2) * hyper.get("generator_loss_scale", 1.0),
        theta,
        list(omega.values()),
        virtual_lr=hyper["virtual_lr"],
        order=2,
        sync=True,
    )
    grads = mean_over_ranks(found.total)
    for p, grad in zip(_Each(generators).parameters(), grads, strict=True):
        p.grad = grad
    optimizers[1].step()
    return {
        "enc_loss": all_reduce_mean(loss).detach(),
        "enc_grad": enc_grads,
        "inner_loss": all_reduce_mean(found.inner),
        "outer_loss": all_reduce_mean(found.outer) / hyper.get("generator_loss_scale", 1.0),
        "virtual": list(found.virtual.values()),
        "gen_grad": grads,
        "gen_grad_first_order": mean_over_ranks(found.direct),
    }


class _Each(nn.Module):
    """Net u for input u; one net for all where there is one."""

    def __init__(self, nets: nn.ModuleList) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.nets[u % len(self.nets)](x) for u, x in enumerate(inputs)]


def _meta_rank(rank: int, world: int, arrays: dict[str, Tensor], hyper: dict[str, Any]) -> dict[str, Tensor]:
    views = sum(name.startswith("s0_x") for name in arrays)
    prefixes = [f"gen{u}" for u in range(views) if any(n.startswith(f"init_gen{u}.") for n in arrays)]
    encoder = _nets(arrays, hyper["encoder"], ["enc"], world)
    generators = _nets(arrays, hyper["generator"], prefixes, world)
    optimizers = (
        _sgd(encoder.parameters(), hyper["lr"], hyper),
        _sgd(generators.parameters(), hyper["generator_lr"], hyper),
    )
    got, t = {}, 0
    while f"s{t}_x0" in arrays:
        inputs = [_shard(arrays[f"s{t}_x{u}"], rank, world) for u in range(views)]

        def evaluate(z: list[Tensor], generated: list[Tensor], call: int) -> Objective:
            return _in_batch(z, generated, hyper, rank, **_weights(hyper, encoder_step=call == 0))

        out = _iteration(encoder, generators, optimizers, inputs, evaluate, hyper)
        enc, gen = _named(encoder, ["enc"]), _named(generators, prefixes)
        got |= {f"s{t}_{name}": out[name] for name in ("enc_loss", "inner_loss", "outer_loss")}
        for name, names in (
            ("enc_grad", enc),
            ("virtual", enc),
            ("gen_grad", gen),
            ("gen_grad_first_order", gen),
        ):
            got |= {f"s{t}_{name}_{key}": value for key, value in zip(names, out[name], strict=True)}
        got |= {f"s{t}_after_{key}": p.detach().clone() for key, p in (enc | gen).items()}
        t += 1
    return got


def _check_official(case: GoldenCase, precision: str) -> None:
    arrays, hyper = case.tensors(precision), case.hyper
    encoder = _nets(arrays, hyper["encoder"], [f"enc.{name}" for name in OFFICIAL], 1)
    generators = _nets(arrays, hyper["generator"], [f"gen_{name}" for name in OFFICIAL], 1)
    optimizers = (
        _sgd(encoder.parameters(), hyper["lr"], hyper),
        _sgd(generators.parameters(), hyper["generator_lr"], hyper),
    )
    banks, got, t = _banks(arrays, "init_mem_"), {}, 0
    width = arrays["init_enc.l.0.weight"].shape[1]

    def evaluate(y: Tensor, index: Tensor, z: list[Tensor], generated: list[Tensor], call: int) -> Objective:
        rows = index[5 * call : 5 * call + 5]
        keys = [banks.keys(rows[0])]
        banks.update(y, torch.stack(z).detach(), momentum=hyper["bank_momentum"])
        return bank_objective(
            z,
            generated,
            keys + [banks.keys(own) for own in rows[1:]],
            contrast=_contrast(hyper),
            margin=_margin(hyper),
            official_pairs=hyper.get("margin_pairs", "official") == "official",
            **_weights(hyper, encoder_step=call == 0),
        )

    while f"s{t}_x" in arrays:
        x, y, index = (arrays[f"s{t}_{name}"] for name in ("x", "y", "idx"))

        inputs = [x[:, :width], x[:, width:], x]
        out = _iteration(encoder, generators, optimizers, inputs, partial(evaluate, y, index), hyper)
        enc, gen = _named(encoder, list(OFFICIAL)), _named(generators, list(OFFICIAL))
        got |= {f"s{t}_{name}": out[name] for name in ("enc_loss", "inner_loss", "outer_loss")}
        got |= {f"s{t}_enc_grad.{key}": g for key, g in zip(enc, out["enc_grad"], strict=True)}
        got |= {f"s{t}_gen_grad_{key}": g for key, g in zip(gen, out["gen_grad"], strict=True)}
        got |= {f"s{t}_after_enc.{key}": p.detach().clone() for key, p in enc.items()}
        got |= {f"s{t}_after_gen_{key}": p.detach().clone() for key, p in gen.items()}
        got |= {f"s{t}_after_mem_{name}": banks.rows[u].clone() for u, name in enumerate(OFFICIAL)}
        t += 1
    case.check(got, precision)


KINDS: dict[str, Callable[[GoldenCase, str], None]] = {
    "oucl": _check_oucl,
    "margin_reg": _check_margin,
    "bank_steps": _check_banks,
    "inbatch_objective": lambda case, precision: _on_all_worlds(_objective_rank, case, precision),
    "inbatch_meta_step": lambda case, precision: _on_all_worlds(_meta_rank, case, precision),
    "official_train_step": _check_official,
}


def test_golden(golden_case: GoldenCase, precision: str) -> None:
    assert golden_case.kind in KINDS, f"unknown kind {golden_case.kind}"
    assert DTYPES[precision]
    KINDS[golden_case.kind](golden_case, precision)
