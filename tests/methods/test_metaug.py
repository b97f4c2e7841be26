"""MetAug's losses and bilevel step: reference numbers, identities, derivatives, the banks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sslzoo.distributed import all_reduce_mean, gather
from sslzoo.nn.batchnorm import SyncBatchNorm
from sslzoo.nn.numerics import normalize
from sslzoo.testing.golden import DTYPES, GoldenCase
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.metaug.banks import MemoryBanks
from sslzoo_methods.metaug.config import Circle
from sslzoo_methods.metaug.loss import (
    Contrast,
    Margin,
    Objective,
    bank_objective,
    batch_objective,
    margin_regulariser,
    oucl,
    score,
    view_pairs,
)
from sslzoo_methods.metaug.meta import mean_over_ranks, meta_gradient

PLAIN = Contrast(16.0, 16.0, None)
CIRCLE = Contrast(32.0, 16.0, Circle(m=0.25))
SHIFTED = Contrast(3.0, 16.0, Circle(m=0.25, weights=False))
LARGE = Margin(weight=0.3, positive_weight=1.0, thresholds="large", detach_thresholds=False)
OFFICIAL = ("l", "ab", "ori")
# (query, key) of the official columns: l<-ab, ab<-l, l<-ori, ori<-l, ori<-ab, ab<-ori
COLUMNS = [(1, 0), (0, 1), (2, 0), (0, 2), (1, 2), (2, 1)]


# -- reference numbers ------------------------------------------------------------------------

SPEC = {
    "gamma": 16.0,
    "aug_weight": 1e-5,
    "margin_weight": 1e-11,
    "margin_pos_weight": 1e-4,
    "virtual_lr": 1e-3,
    "lr": 0.03,
    "generator_lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "bank_momentum": 0.5,
    "K": 1024,
}


def _contrast(hyper: Mapping[str, Any]) -> Contrast:
    weights, shift = hyper.get("weighting", "none") == "circle", hyper.get("shift", False)
    circle = Circle(m=hyper.get("m", 0.25), weights=weights, shift=shift) if weights or shift else None
    return Contrast(hyper["gamma"], hyper.get("scale", 16.0), circle)


def _margin(hyper: Mapping[str, Any], *, encoder_step: bool = False) -> Margin:
    where = hyper.get("margin_in", "both")
    off = where == "none" or (encoder_step and where == "generator")
    return Margin(
        weight=0.0 if off else hyper.get("margin_weight", 0.0),
        positive_weight=hyper["margin_pos_weight"],
        thresholds=hyper.get("margin", "large"),
        detach_thresholds=hyper.get("detach_sigma", False),
    )


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
        margin = _margin(case.hyper)._replace(detach_thresholds=detach)
        reference = score(leaves[0], leaves[1], PLAIN)
        generated = score(leaves[2], leaves[3], PLAIN)
        loss, sigma_pos, sigma_neg = margin_regulariser([reference], [generated], margin)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        got |= {f"grad_{name}{suffix}": grad for name, grad in zip(names, grads, strict=True)}
        got |= {"loss": loss, "sigma_pos": sigma_pos, "sigma_neg": sigma_neg}
    case.check(got, precision)


def _banks(arrays: Mapping[str, Tensor], prefix: str, hyper: Mapping[str, Any]) -> MemoryBanks:
    rows = torch.stack([arrays[prefix + name] for name in OFFICIAL])
    views, size, dim = rows.shape
    banks = MemoryBanks(views, size, dim, negatives=hyper["K"], momentum=hyper["bank_momentum"], seed=0)
    banks.to(rows.dtype).rows.copy_(rows)
    return banks


def _check_banks(case: GoldenCase, precision: str) -> None:
    arrays, contrast = case.tensors(precision), _contrast(case.hyper)
    banks, got, t = _banks(arrays, "mem0_", case.hyper), {}, 0
    while f"s{t}_y" in arrays:
        z = [arrays[f"s{t}_z_{name}"].requires_grad_() for name in OFFICIAL]
        keys = banks.rows[:, arrays[f"s{t}_idx"]]
        objective = bank_objective(z, z, [keys] * 5, contrast=contrast, margin=None, generated_weight=0.0)
        grads = torch.autograd.grad(objective.loss, z)
        similar = {(u, v): (1 + torch.einsum("nd,nkd->nk", z[u], keys[v])) / 2 for u, v in COLUMNS}
        banks.update(arrays[f"s{t}_y"], torch.stack(z))
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
    z: list[Tensor], generated: list[Tensor], hyper: Mapping[str, Any], rank: int, encoder_step: bool
) -> Objective:
    return batch_objective(
        z,
        generated,
        torch.stack([gather(x) for x in z]),
        offset=rank * len(z[0]),
        contrast=_contrast(hyper),
        margin=_margin(hyper, encoder_step=encoder_step),
        generated_weight=hyper["aug_weight"],
        query_keys=torch.stack([gather(x) for x in (*z, *generated)])
        if hyper.get("same_view_negatives", False)
        else None,
        unified=hyper.get("contrast_set", "terms") == "unified",
    )


def _shard(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank].clone()


def _objective_rank(
    rank: int, world: int, arrays: dict[str, Tensor], hyper: dict[str, Any]
) -> dict[str, Tensor]:
    views = sum(name.startswith("zt") for name in arrays)
    names = [f"{kind}{u}" for kind in ("z", "zt") for u in range(views)]
    leaves = [_shard(arrays[name], rank, world).requires_grad_() for name in names]
    out = _in_batch(leaves[:views], leaves[views:], hyper, rank, encoder_step=False)
    assert out.regulariser is not None
    grads = torch.autograd.grad(out.loss, leaves)
    got = {f"grad_{name}": gather(grad) / world for name, grad in zip(names, grads, strict=True)}
    scalars = {"loss": out.loss, "terms": out.terms, "R": out.regulariser.value}
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
            return _in_batch(z, generated, hyper, rank, encoder_step=call == 0)

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
    banks, got, t = _banks(arrays, "init_mem_", hyper), {}, 0
    width = arrays["init_enc.l.0.weight"].shape[1]

    def evaluate(y: Tensor, index: Tensor, z: list[Tensor], generated: list[Tensor], call: int) -> Objective:
        rows = index[5 * call : 5 * call + 5]
        keys = [banks.rows[:, rows[0]]]
        banks.update(y, torch.stack(z).detach())
        return bank_objective(
            z,
            generated,
            keys + [banks.rows[:, own] for own in rows[1:]],
            contrast=_contrast(hyper),
            margin=_margin(hyper, encoder_step=call == 0),
            generated_weight=hyper["aug_weight"],
            official_pairs=hyper.get("margin_pairs", "official") == "official",
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


# -- the losses -------------------------------------------------------------------------------


def _features(views: int, n: int = 5, dim: int = 4, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, dim, generator=g, dtype=torch.float64)) for _ in range(views)]


def _batch(z: list[Tensor], generated: list[Tensor], **changes: Any) -> Objective:
    options: dict[str, Any] = {"offset": 0, "contrast": PLAIN, "margin": LARGE, "generated_weight": 0.5}
    return batch_objective(z, generated, torch.stack(z), **(options | changes))


def _term(queries: list[tuple[int, Tensor]], keys: list[Tensor], gamma: float, same: bool = False) -> Tensor:
    """A term by loops over samples, pairs and keys; a query of view -1 meets every key view."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(keys[0])):
        pos, neg = [], []
        for u, q in queries:
            for v, key in enumerate(keys):
                if u != v:
                    pos.append((1 + q[i] @ key[i]) / 2)
                    neg += [(1 + q[i] @ key[j]) / 2 for j in range(len(key)) if j != i]
            neg += [(1 + q[i] @ q[j]) / 2 for j in range(len(q)) if same and j != i]
        total = total + torch.stack([((n - p) * gamma).exp() for p in pos for n in neg]).sum().log1p()
    return total * 16 / gamma / len(keys[0])


@pytest.mark.parametrize("views", [2, 3])
def test_terms_by_loops(views: int) -> None:
    """M+2 terms; local crops in the first alone; the unified set; own-view negatives."""
    z, zt, local = _features(views), _features(views, seed=1), _features(2, seed=2)
    both = list(enumerate(z)), list(enumerate(zt))
    mixed = [[(u, zt[u] if u == w else z[u]) for u in range(views)] for w in range(views)]
    expected = [_term(queries, z, 16.0) for queries in (both[0], *mixed, both[1])]
    torch.testing.assert_close(_batch(z, zt).terms, torch.stack(expected), rtol=1e-12, atol=0)
    first = _term([*both[0], *[(-1, x) for x in local]], z, 16.0)
    got = _batch(z, zt, local=local)
    torch.testing.assert_close(got.terms, torch.stack([first, *expected[1:]]), rtol=1e-12, atol=0)
    unified = _batch(z, zt, unified=True).terms
    torch.testing.assert_close(unified, _term([*both[0], *both[1]], z, 16.0)[None], rtol=1e-12, atol=0)
    same = _batch(z, zt, query_keys=torch.stack([*z, *zt])).terms
    ends = [_term(queries, z, 16.0, same=True) for queries in both]
    torch.testing.assert_close(same[[0, -1]], torch.stack(ends), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["large", "small", "mean"])
def test_margin_by_loops(kind: str) -> None:
    z, zt = _features(2), _features(2, seed=1)
    got = _batch(z, zt, margin=LARGE._replace(thresholds=kind, positive_weight=0.7))
    assert got.regulariser is not None
    s, st = ([(1 + q @ k.T) / 2 for q, k in ((x[0], z[1]), (x[1], z[0]))] for x in (z, zt))
    above, below = [], []
    for i in range(5):
        a = min(float(x[i, i]) for x in s)
        b = max(float(x[i, j]) for x in s for j in range(5) if j != i)
        low, high = {"large": (min(a, b), max(a, b)), "small": (max(a, b), min(a, b))}.get(
            kind, ((a + b) / 2, (a + b) / 2)
        )
        above += [max(float(x[i, i]) - low, 0) for x in st]
        below += [max(high - float(x[i, j]), 0) for x in st for j in range(5) if j != i]
    expected = 0.7 * sum(above) / len(above) + sum(below) / len(below)
    assert float(got.regulariser.value) == pytest.approx(expected, rel=1e-12)
    assert float(got.loss) == pytest.approx(
        float(got.terms[0] + 0.5 * got.terms[1:].sum()) + 0.3 * expected, rel=1e-12
    )


def test_official_pairs_are_the_codes_columns() -> None:
    """T_l gives its first four columns, T_ab the 1st, 2nd, 5th, 6th, T_ori the 3rd to 6th."""
    z, zt = _features(3), _features(3, seed=1)
    # (view, sample, own row and 3 negatives, dim)
    keys = [torch.stack([torch.stack(_features(5, 4, seed=10 * t + v)) for v in range(3)]) for t in range(5)]
    options: dict[str, Any] = {"contrast": PLAIN, "margin": LARGE, "generated_weight": 0.5}
    got = bank_objective(z, zt, keys, official_pairs=True, **options)

    def columns(t: int) -> list[Tensor]:
        queries = [zt[u] if u == t - 1 else z[u] for u in range(3)]
        return [(1 + torch.einsum("nd,nkd->nk", queries[u], keys[t][v])) / 2 for u, v in COLUMNS]

    of_l, of_ab, of_ori = columns(1), columns(2), columns(3)
    hard = [*of_l[:4], *[of_ab[c] for c in (0, 1, 4, 5)], *of_ori[2:]]
    reference = [*of_ori[:2], *of_ab[2:4], *of_l[4:]]
    blocks = [[score(c[:, :1], c[:, 1:], PLAIN) for c in columns] for columns in (reference, hard)]
    assert got.regulariser is not None
    expected = margin_regulariser(blocks[0], blocks[1], LARGE)
    torch.testing.assert_close(got.regulariser.value, expected.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.regulariser.sigma_pos, expected.sigma_pos, rtol=0, atol=0)


@pytest.mark.parametrize("contrast", [PLAIN, SHIFTED, CIRCLE])
def test_oucl_gradients_in_closed_form(contrast: Contrast) -> None:
    g = torch.Generator().manual_seed(0)
    pos, neg = (torch.rand(4, k, generator=g, dtype=torch.float64).requires_grad_() for k in (2, 6))
    loss = oucl([score(pos, neg, contrast)], contrast)
    got = torch.autograd.grad(loss, [pos, neg])
    up = torch.ones_like(pos), torch.ones_like(neg)
    circle = contrast.circle
    if circle is not None and circle.weights:
        up = ((1.25 - pos).clamp_min(0), (neg + 0.25).clamp_min(0))
    shift = (0.75, 0.25) if circle is not None and circle.shift else (0.0, 0.0)
    logits = -contrast.gamma * up[0] * (pos - shift[0]), contrast.gamma * up[1] * (neg - shift[1])
    sigma = (logits[0].logsumexp(1) + logits[1].logsumexp(1)).sigmoid()[:, None] * contrast.scale / 4
    expected = -sigma * logits[0].softmax(1) * up[0], sigma * logits[1].softmax(1) * up[1]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.1, 512.0, 4096.0])
def test_extreme_gamma_in_float32(gamma: float) -> None:
    """Loss and gradient as in float64, as far as the logits' rounding lets them."""
    contrast = PLAIN._replace(gamma=gamma)
    values = [
        torch.rand(6, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (2, 9)
    ]
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.float().to(dtype).requires_grad_() for x in values]
        loss = oucl([score(leaves[0], leaves[1], contrast)], contrast)
        found.append((loss.double(), *[x.double() for x in torch.autograd.grad(loss, leaves)]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=max(2e-5, 1e-6 * gamma), atol=1e-6)


def test_without_the_regulariser() -> None:
    z, zt = _features(2), _features(2, seed=1)
    got = _batch(z, zt, margin=None)
    assert got.regulariser is None
    torch.testing.assert_close(got.loss, got.terms[0] + 0.5 * got.terms[1:].sum())


def test_collapsed_and_duplicate_features_stay_finite() -> None:
    for z in ([torch.ones(3, 4) / 2] * 2, [torch.eye(3)[[0, 0, 1]]] * 2):
        leaves = [x.clone().requires_grad_() for x in z]
        for contrast in (PLAIN, CIRCLE):
            out = _batch(leaves, leaves, contrast=contrast)
            grads = torch.autograd.grad(out.loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)  # type: ignore[arg-type]
            assert out.loss.isfinite() and all(x.isfinite().all() for x in (*grads, *second))


def test_objective_derivatives_by_finite_differences() -> None:
    """First and second, with everything on, over views, local crops and own-view keys."""
    flat = torch.stack([*_features(2, 3), *_features(2, 3, seed=1), *_features(1, 3, seed=2)])

    def loss(x: Tensor, **changes: Any) -> Tensor:
        z = list(x[:2])
        return _batch(z, list(x[2:4]), local=[x[4]], query_keys=x[:4], **changes).loss

    assert torch.autograd.gradcheck(loss, flat.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, flat)


def test_half_precision_inputs_are_promoted() -> None:
    z, zt = _features(2), _features(2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _batch([x.bfloat16() for x in z], [x.bfloat16() for x in zt])
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), _batch(z, zt).loss, rtol=0.02, atol=0)


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="has no negatives"):
        _batch(_features(2, 1), _features(2, 1))
    assert view_pairs(3) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


# -- the banks --------------------------------------------------------------------------------


def _draws(rank: int, world: int) -> Tensor:
    banks = MemoryBanks(2, 50, 3, negatives=7, momentum=0.5, seed=4)
    return torch.stack([banks.draw(torch.arange(6).chunk(world)[rank], step=3, call=c) for c in range(2)])


def test_draws_depend_on_step_call_and_place_alone() -> None:
    whole = _draws(0, 1)  # (2, 2, 6, 8, 3)
    for world in (2, 3):
        assert torch.equal(torch.cat(run_ranks(world, _draws), dim=2), whole)
    banks = MemoryBanks(2, 50, 3, negatives=7, momentum=0.5, seed=4)
    assert torch.equal(whole[:, :, :, 0], banks.rows[:, :6].expand(2, 2, 6, 3))  # the own row first
    again = banks.draw(torch.arange(6), step=3, call=0)
    assert torch.equal(again, whole[0])
    assert not torch.equal(banks.draw(torch.arange(6), step=4, call=0), again)
    assert not torch.equal(whole[0], whole[1])
    many = MemoryBanks(1, 10, 1, negatives=20000, momentum=0.5, seed=4)
    many.rows.copy_(torch.arange(10.0)[None, :, None])
    counts = many.draw(torch.zeros(1, dtype=torch.int64), step=0, call=0)[0, 0, 1:, 0].long().bincount()
    assert counts.min() > 1800 and counts.max() < 2200


def test_banks_begin_at_unit_length_and_the_last_duplicate_stays() -> None:
    banks = MemoryBanks(2, 400, 12, negatives=1, momentum=0.5, seed=0)
    assert float(banks.rows.square().sum(2).mean()) == pytest.approx(1, rel=0.05)
    old, z = banks.rows.clone(), torch.stack([x.float() for x in _features(2, 4, 12)])
    banks.update(torch.tensor([7, 2, 7, 3]), z)
    for row, source in ((7, 2), (2, 1), (3, 3)):
        expected = F.normalize(0.5 * old[:, row] + 0.5 * z[:, source], dim=1)
        torch.testing.assert_close(banks.rows[:, row], expected)
    untouched = [i for i in range(400) if i not in (2, 3, 7)]
    assert torch.equal(banks.rows[:, untouched], old[:, untouched])
