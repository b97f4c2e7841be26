"""The margin method: reference numbers, numerics at the poles, identities, ranks, resume."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import cos, log, pi
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslzoo.batch import Batch
from sslzoo.nn.batchnorm import to_sync
from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import HeadConfig, SGDConfig
from sslzoo.testing.golden import GoldenCase
from sslzoo_methods.margin.analysis.observe import angle_histogram
from sslzoo_methods.margin.config import (
    MACL,
    ArcFace,
    BaseConfig,
    BYOLConfig,
    Combined,
    Constant,
    CosFace,
    Effects,
    EqCo,
    Family,
    Isolated,
    MarginConfig,
    MoCoV2Config,
    MoCoV3Config,
    NoMargin,
    Ramp,
    Schedule,
    SimCLRConfig,
    SimSiamConfig,
    Whole,
)
from sslzoo_methods.margin.factors import (
    NO_MARGIN,
    Chunk,
    Factors,
    Margin,
    Pairs,
    WideAngle,
    gradient_factors,
    pull_sums,
)
from sslzoo_methods.margin.loss import (
    attract,
    contrast,
    contrast_queue,
    isolated_loss,
    isolated_push,
    macl_loss,
    macl_push,
    macl_temperature,
    margin_loss,
    margin_push,
    view_alignment,
)
from sslzoo_methods.margin.method import MarginContrast
from sslzoo_methods.simclr.loss import nt_xent

Outputs = dict[str, Tensor | float | int]

# -- reference numbers ------------------------------------------------------------------------

SPEC = {
    "tau": 0.2,
    "m1": 0.0,
    "m2": 0.0,
    "beta": 1.0,
    "wide_angle": "exact",
    "loss_scale": "2*tau",
    "tau0": 0.1,
    "alpha": 0.5,
    "A0": 0.0,
    "eps": 1e-8,
}


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def margin_of(hyper: dict[str, Any]) -> Margin:
    hyper = SPEC | hyper
    return Margin(angular=hyper["m1"], subtractive=hyper["m2"], wide_angle=hyper["wide_angle"])


def per_anchor(pairs: Pairs, hyper: dict[str, Any]) -> Tensor:
    return margin_loss(
        pairs,
        margin_of(hyper),
        temperature=hyper["tau"],
        beta=hyper.get("beta", SPEC["beta"]),
        detached=False,
    )


def factors_of(pairs: Pairs, hyper: dict[str, Any]) -> Factors:
    margin = margin_of(hyper)
    return gradient_factors(pairs, margin, temperature=hyper["tau"], sums=pull_sums(pairs.theta, margin))


def outputs(pairs: Pairs, loss: Tensor, hyper: dict[str, Any]) -> Outputs:
    f = factors_of(pairs, hyper)
    return {
        "out_loss": loss.mean(),
        "out_loss_i": loss,
        "out_theta": pairs.theta,
        "out_P_pos": f.p,
        "out_P0_pos": f.p0,
    }


def two_views(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Pairs:
    z, n = torch.cat([z1, z2]), len(z1)
    own = torch.arange(2 * n)
    return contrast(z, z, (own + n) % (2 * n), own=own, temperature=temperature, chunk=None)


def infonce(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    u, v = leaf(t["in_U"]), leaf(t["in_V"])
    pairs = contrast(u, v, t["in_pos"], own=None, temperature=h["tau"], chunk=None)
    loss = per_anchor(pairs, h)
    got = outputs(pairs, loss, h)
    got["out_grad_U"], got["out_grad_V"] = torch.autograd.grad(loss.mean(), [u, v])
    return got


def ntxent(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    z1, z2 = leaf(t["in_z1"]), leaf(t["in_z2"])
    pairs = two_views(z1, z2, h["tau"])
    loss = per_anchor(pairs, h)
    got = outputs(pairs, loss, h)
    got["out_grad_z1"], got["out_grad_z2"] = torch.autograd.grad(loss.mean(), [z1, z2])
    return got


def byol(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    p = leaf(t["in_p"])
    pairs = attract(p, t["in_z"])
    h = h | {"tau": 0.5, "beta": 0.0}
    loss = 2 + per_anchor(pairs, h)
    return {
        "out_loss": loss.mean(),
        "out_loss_i": loss,
        "out_theta": pairs.theta,
        "out_B": margin_of(h).slope_factor(pairs.theta.detach()),
        "out_grad_p": torch.autograd.grad(loss.mean(), p)[0],
    }


BOUNDLESS = (-torch.inf, torch.inf)
EFFECTS: dict[str, dict[str, Any]] = {
    "E1": {"emphasis": "batch"},
    "E2": {"angle": True},
    "E1E2": {"emphasis": "batch", "angle": True},
    "E3": {"logit": "both"},
    "E1E3": {"emphasis": "batch", "logit": "both"},
    "E2E3": {"angle": True, "logit": "both"},
    "all": {"emphasis": "batch", "angle": True, "logit": "both"},
}


def isolated(pairs: Pairs, hyper: dict[str, Any], **effects: Any) -> Tensor:
    margin = margin_of(hyper)
    if "emphasis" in effects or "angle" in effects:
        effects = {"factor_range": BOUNDLESS} | effects
    return isolated_loss(
        pairs,
        margin,
        Isolated(**effects),
        temperature=hyper["tau"],
        beta=hyper.get("beta", SPEC["beta"]),
        sums=pull_sums(pairs.theta, margin),
    )


def decomposition(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    got = infonce(case, precision)
    u, v = leaf(t["in_U"]), leaf(t["in_V"])
    pairs = contrast(u, v, t["in_pos"], own=None, temperature=h["tau"], chunk=None)
    plain = margin_loss(pairs, NO_MARGIN, temperature=h["tau"], beta=h.get("beta", 1.0), detached=False)
    isolations = {name: isolated(pairs, h, **effects) for name, effects in EFFECTS.items()}
    for name, every in (("base", plain), *isolations.items()):
        loss = every.mean()
        got[f"out_grad_U_{name}"], got[f"out_grad_V_{name}"] = torch.autograd.grad(
            loss, [u, v], retain_graph=True
        )
    f, margin, theta = factors_of(pairs, h), margin_of(h), pairs.theta.detach()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=theta.dtype)
    return got | {
        "out_delta": f.delta,
        "out_A": f.logit,
        "out_B": f.slope,
        "out_E1": f.emphasis,
        "out_E2": f.angle,
        "out_m2_eq": h["tau"] * f.delta,
        "out_theta_star": torch.tensor(margin.neutral_angle, dtype=theta.dtype),
        "out_pos_grad_theta": f.one_minus_p * margin.pull(theta) / h["tau"],
        "out_neg_coef_sum": f.one_minus_p / h["tau"],
        "out_one_minus_P": f.one_minus_p,
        "out_one_minus_P0": f.one_minus_p0,
        "out_hist_counts": angle_histogram(theta),
        "out_q": torch.quantile(theta, quantiles),
    }


def mocov3_ranks(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    assert h["loss_scale"] == "2*tau"
    world, n = h["world_size"], len(t["in_q1"]) // h["world_size"]
    q1, q2 = leaf(t["in_q1"]), leaf(t["in_q2"])
    losses = []
    for rank in range(world):
        rows = torch.arange(n) + rank * n
        terms = [
            contrast(q[rows], k, rows, own=None, temperature=h["tau"], chunk=None)
            for q, k in ((q1, t["in_k2"]), (q2, t["in_k1"]))
        ]
        losses.append(2 * h["tau"] * torch.stack([per_anchor(pairs, h).mean() for pairs in terms]).sum())
    loss = torch.stack(losses)
    grads = torch.autograd.grad(loss.sum(), [q1, q2])
    return {
        "out_rank_loss": loss,
        "out_loss": loss.mean(),
        "out_grad_q1": grads[0],
        "out_grad_q2": grads[1],
    }


def queue(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    q = leaf(t["in_q"])
    pairs = contrast_queue(q, t["in_k"], t["in_queue"], temperature=h["tau"], chunk=None)
    loss = per_anchor(pairs, h)
    return outputs(pairs, loss, h) | {"out_grad_q": torch.autograd.grad(loss.mean(), q)[0]}


def macl(case: GoldenCase, precision: str) -> Outputs:
    t, h = case.tensors(precision), case.hyper
    z1, z2 = leaf(t["in_z1"]), leaf(t["in_z2"])
    alignment = view_alignment([z1, z2])
    temperature = macl_temperature(alignment, temperature=h["tau0"], alpha=h["alpha"], initial=h["A0"])
    loss, weight = macl_loss(two_views(z1, z2, temperature), temperature=temperature, eps=h["eps"])
    grads = torch.autograd.grad(loss.mean(), [z1, z2])
    return {
        "out_loss": loss.mean(),
        "out_temperature": temperature,
        "out_alignment": alignment,
        "out_V": weight,
        "out_grad_z1": grads[0],
        "out_grad_z2": grads[1],
    }


KINDS: dict[str, Callable[[GoldenCase, str], Outputs]] = {
    "infonce": infonce,
    "ntxent": ntxent,
    "byol": byol,
    "decomposition": decomposition,
    "mocov3_ranks": mocov3_ranks,
    "queue": queue,
    "macl": macl,
}


def test_golden(golden_case: GoldenCase, precision: str) -> None:
    assert golden_case.kind in KINDS, f"unknown kind {golden_case.kind}"
    golden_case.check(KINDS[golden_case.kind](golden_case, precision), precision)


# -- numerics, against the closed form in 60 digits ---------------------------------------------


def exact_gradient(
    u: Tensor, v: Tensor, positive: list[int], tau: float, m1: float, m2: float
) -> tuple[list[float], Tensor, Tensor]:
    """Loss of each anchor and gradients of their mean at the very float inputs, from the closed form."""
    import mpmath as mp

    with mp.workdps(60):

        def rows(x: Tensor) -> list[Any]:
            return [mp.matrix([mp.mpf(e) for e in row]) for row in x.double().tolist()]

        def dot(a: Any, b: Any) -> Any:
            return sum(x * y for x, y in zip(a, b, strict=True))

        us, vs = rows(u), rows(v)
        un, vn = [mp.norm(x) for x in us], [mp.norm(x) for x in vs]
        ud, vd = [x / n for x, n in zip(us, un, strict=True)], [x / n for x, n in zip(vs, vn, strict=True)]
        n, losses = len(us), []
        du, dv = [mp.zeros(u.shape[1], 1) for _ in us], [mp.zeros(u.shape[1], 1) for _ in vs]
        for i, p in enumerate(positive):
            chord = mp.norm(ud[i] - vd[p]) / 2
            theta = 2 * mp.asin(chord) if chord < 0.7 else mp.pi - 2 * mp.asin(mp.norm(ud[i] + vd[p]) / 2)
            logits = [dot(ud[i], x) / tau for x in vd]
            logits[p] = (mp.cos(theta + m1) - m2) / tau
            total = mp.log(sum(mp.e**x for x in logits))
            losses.append(float(total - logits[p]))
            share = [mp.e ** (x - total) for x in logits]
            rest = sum(s for j, s in enumerate(share) if j != p)
            for j, x in enumerate(vd):
                if j != p:
                    g = share[j] / tau
                else:
                    pole = chord < 1e-15 or chord > 1 - mp.mpf(10) ** -40
                    g = mp.mpf(0) if pole else -rest * mp.sin(theta + m1) / mp.sin(theta) / tau
                c = dot(ud[i], x)
                du[i] += g / n * (x - c * ud[i]) / un[i]
                dv[j] += g / n * (ud[i] - c * x) / vn[j]

        def tensor(x: list[Any]) -> Tensor:
            return torch.tensor([[float(e) for e in row] for row in x], dtype=torch.float64)

        return losses, tensor(du), tensor(dv)


def at_angle(u: Tensor, theta: float) -> Tensor:
    """Rows at the angle ``theta`` from those of ``u``, of their length."""
    side = torch.randn_like(u)
    length = u.norm(dim=1, keepdim=True)
    side -= (side * u).sum(1, keepdim=True) / length**2 * u
    return (
        torch.cos(torch.tensor(theta)) * u
        + torch.sin(torch.tensor(theta)) * side / side.norm(dim=1, keepdim=True) * length
    )


def row_error(got: Tensor, expected: Tensor) -> float:
    """Largest error of a row, relative to that row's own length."""
    return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("theta", [0.0, 5e-8, 3e-4, 0.5, pi - 3e-4, pi - 0.1, pi])
@pytest.mark.parametrize("m1", [0.3, -0.2, 0.0])
def test_poles(theta: float, m1: float) -> None:
    """0, pi and their surroundings; with m1 = 0.3, pi - 0.1 lies beyond pi - m1."""
    u = torch.randn(5, 6, dtype=torch.float64)
    v = torch.cat([at_angle(u, theta), torch.randn(4, 6, dtype=torch.float64)])
    if theta in {0.0, pi}:
        v[:5] = u if theta == 0 else -u
    positive = list(range(5))
    losses, du, dv = exact_gradient(u, v, positive, 0.2, m1, 0.1)
    hyper = {"m1": m1, "m2": 0.1, "tau": 0.2}
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        a, b = leaf(u.to(dtype)), leaf(v.to(dtype))
        pairs = contrast(a, b, torch.tensor(positive), own=None, temperature=0.2, chunk=None)
        loss = per_anchor(pairs, hyper)
        loss.mean().backward()
        assert a.grad is not None and b.grad is not None
        assert a.grad.isfinite().all() and b.grad.isfinite().all()
        torch.testing.assert_close(loss.double().tolist(), losses, rtol=tolerance, atol=tolerance)
        assert (pairs.theta.double() - theta).abs().max() < tolerance
        if dtype == torch.float64:
            assert row_error(a.grad, du) < 1e-6 and row_error(b.grad, dv) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-4)])
@pytest.mark.parametrize("m1", [0.0, 0.1])
def test_saturated_rows_of_very_different_length(dtype: torch.dtype, tolerance: float, m1: float) -> None:
    """1 - P near 1e-8 and norms 1e7 apart: every gradient row is right relative to its own size."""
    length = torch.logspace(-3, 4, 8, dtype=dtype)[:, None]
    u = torch.eye(8, 24, dtype=dtype) + 0.02 * torch.randn(8, 24, dtype=dtype)
    v = u + 0.03 * torch.randn(8, 24, dtype=dtype)
    u, v = leaf(u * length), leaf(v * length.flip(0))
    losses, du, dv = exact_gradient(u.detach(), v.detach(), list(range(8)), 0.05, m1, 0.0)
    pairs = contrast(u, v, torch.arange(8), own=None, temperature=0.05, chunk=None)
    per_anchor(pairs, {"m1": m1, "m2": 0.0, "tau": 0.05}).mean().backward()
    assert u.grad is not None and v.grad is not None
    assert max(losses) < 1e-6 and du.norm(dim=1).min() < 1e-11
    assert row_error(u.grad, du) < tolerance and row_error(v.grad, dv) < tolerance


WITH_MARGIN = Margin(angular=0.1, subtractive=0.1)
SUMS = torch.tensor([3.0, 2.5], dtype=torch.float64)
Loss = Callable[[Pairs], Tensor]


def with_margin(beta: float, detached: bool) -> tuple[Loss, Loss]:
    """A loss with a margin and its derivative by the logsumexp of the negatives."""
    options: dict[str, Any] = {"margin": WITH_MARGIN, "temperature": 0.1, "beta": beta}
    return partial(margin_loss, **options, detached=detached), partial(margin_push, **options)


def with_effects(beta: float, **effects: Any) -> tuple[Loss, Loss]:
    """The same of selected effects."""
    options: dict[str, Any] = {
        "margin": WITH_MARGIN,
        "effects": Isolated(**effects),
        "temperature": 0.1,
        "beta": beta,
    }
    return partial(isolated_loss, **options, sums=SUMS), partial(isolated_push, **options)


def with_macl() -> tuple[Loss, Loss]:
    """The same of MACL."""
    options: dict[str, Any] = {"temperature": torch.tensor(0.1, dtype=torch.float64), "eps": 1e-8}
    return lambda pairs: macl_loss(pairs, **options)[0], partial(macl_push, **options)


@pytest.mark.parametrize(
    "loss",
    [
        with_margin(1.0, detached=False),
        with_margin(0.3, detached=True),
        with_margin(0.0, detached=False),
        with_effects(0.3, logit="positive", angle=True),
        with_effects(1.0, logit="negative"),
        with_effects(1.0, logit="both", emphasis="batch", value_preserving=False),
        with_macl(),
    ],
)
def test_chunks_change_nothing(loss: tuple[Loss, Loss]) -> None:
    """Whether candidates have a gradient or are a queue."""
    u, v = torch.randn(11, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    queue = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    results = []
    for size in (None, 4, 100):
        a, b = leaf(u), leaf(v)
        options: dict[str, Any] = {
            "temperature": 0.1,
            "chunk": None if size is None else Chunk(size, loss[1]),
        }
        among = contrast(a, b, torch.arange(11), own=torch.arange(11) + 3, **options)
        queued = contrast_queue(b, v + 1, queue, **options)
        losses = [loss[0](pairs) for pairs in (among, queued)]
        (losses[0].mean() + 3 * losses[1].mean()).backward()
        results.append((*(x.detach() for x in losses), a.grad, b.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-13)


def test_chunks_refuse_a_temperature_that_learns() -> None:
    """Its gradient would be lost."""
    z, temperature = torch.randn(4, 3), torch.tensor(0.1, requires_grad=True)
    chunk = Chunk(2, with_margin(1.0, detached=False)[1])
    with pytest.raises(AssertionError, match="no gradient"):
        contrast(z, z, torch.arange(4), own=None, temperature=temperature, chunk=chunk)


def test_without_any_pull_the_angle_effect_is_none() -> None:
    """Beyond pi - m1 ``clamp`` has no slope: with all positives there, E1 and B are 0, and E2 scales by 1."""
    u = leaf(torch.randn(6, 5, dtype=torch.float64))
    pairs = contrast(u, -u.detach() + 0.01, torch.arange(6), own=None, temperature=0.2, chunk=None)
    margin = Margin(angular=1.5, subtractive=0.0, wide_angle="clamp")
    sums = pull_sums(pairs.theta, margin)
    assert sums[0] == 0 < sums[1]

    def gradient(**effects: Any) -> Tensor:
        options: dict[str, Any] = {"temperature": 0.2, "beta": 1.0, "sums": sums}
        loss = isolated_loss(pairs, margin, Isolated(**effects), **options).mean()
        return torch.autograd.grad(loss, u, retain_graph=True)[0]

    plain = margin_loss(pairs, NO_MARGIN, temperature=0.2, beta=1.0, detached=False).mean()
    (expected,) = torch.autograd.grad(plain, u, retain_graph=True)
    torch.testing.assert_close(gradient(angle=True), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(angle=True, emphasis=2.0), gradient(emphasis=2.0))
    torch.testing.assert_close(gradient(angle=True, emphasis="batch"), gradient(emphasis="batch"))


# -- identities -------------------------------------------------------------------------------


def pairs_and_leaves(base: str) -> tuple[Pairs, list[Tensor]]:
    """Fresh embeddings of one base framework, with those that get a gradient."""
    u, v = leaf(torch.randn(9, 7, dtype=torch.float64)), leaf(torch.randn(9, 7, dtype=torch.float64))
    if base == "simclr":
        return two_views(u, v, 0.2), [u, v]
    if base == "mocov2":
        bank = torch.nn.functional.normalize(torch.randn(13, 7, dtype=torch.float64), dim=1)
        return contrast_queue(u, v, bank, temperature=0.2, chunk=None), [u]
    if base == "mocov3":
        return contrast(u, v.detach(), torch.arange(9), own=None, temperature=0.2, chunk=None), [u]
    return attract(u, v), [u]


@pytest.mark.parametrize("base", ["simclr", "mocov2", "mocov3", "byol"])
def test_all_effects_make_the_margin(base: str) -> None:
    pairs, leaves = pairs_and_leaves(base)
    for wide_angle, beta in product(("exact", "arcface", "clamp", "easy"), (1.0, 0.4, 0.0)):
        hyper = {"m1": 0.7, "m2": 0.1, "tau": 0.2, "beta": beta, "wide_angle": wide_angle}
        true = torch.autograd.grad(per_anchor(pairs, hyper).mean(), leaves, retain_graph=True)
        plain = torch.autograd.grad(
            per_anchor(pairs, hyper | {"m1": 0.0, "m2": 0.0}).mean(), leaves, retain_graph=True
        )
        whole = isolated(pairs, hyper, **EFFECTS["all"]).mean()
        for a, b, c in zip(true, torch.autograd.grad(whole, leaves, retain_graph=True), plain, strict=True):
            assert (a - b).norm() <= 1e-9 * a.norm()
            assert (a - c).norm() > 1e-3 * a.norm()


def test_the_logit_effect_is_a_subtractive_margin_per_sample() -> None:
    pairs, leaves = pairs_and_leaves("simclr")
    hyper = {"m1": 0.3, "m2": 0.1, "tau": 0.2}
    alone = torch.autograd.grad(isolated(pairs, hyper, logit="both").mean(), leaves, retain_graph=True)
    equal = 0.2 * factors_of(pairs, hyper).delta
    assert pairs.negatives is not None
    loss = -torch.nn.functional.logsigmoid((pairs.cosine - equal) / 0.2 - pairs.negatives)
    torch.testing.assert_close(alone, torch.autograd.grad(loss.mean(), leaves), rtol=1e-9, atol=1e-13)


def test_detached_is_the_logit_effect_alone() -> None:
    pairs, leaves = pairs_and_leaves("mocov3")
    hyper = {"m1": 0.3, "m2": 0.1, "tau": 0.2}
    loss = margin_loss(pairs, margin_of(hyper), temperature=0.2, beta=1.0, detached=True)
    torch.testing.assert_close(loss, per_anchor(pairs, hyper))
    got = torch.autograd.grad(loss.mean(), leaves, retain_graph=True)
    alone = torch.autograd.grad(isolated(pairs, hyper, logit="both").mean(), leaves)
    torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_logit_splits_into_positive_and_negative(beta: float) -> None:
    """The changes that the two halves make to the gradient add up to the whole change."""
    pairs, leaves = pairs_and_leaves("simclr")
    hyper = {"m1": 0.3, "m2": 0.1, "tau": 0.2, "beta": beta}

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat(torch.autograd.grad(loss.mean(), leaves, retain_graph=True))

    base = gradient(per_anchor(pairs, hyper | {"m1": 0.0, "m2": 0.0}))
    halves = [gradient(isolated(pairs, hyper, logit=on)) - base for on in ("positive", "negative")]
    whole = gradient(isolated(pairs, hyper, logit="both")) - base
    torch.testing.assert_close(sum(halves), whole, rtol=1e-10, atol=1e-13)
    assert all(h.norm() > 1e-3 for h in halves)


def test_value_preserving_or_gradient_true() -> None:
    pairs, leaves = pairs_and_leaves("simclr")
    hyper = {"m1": 0.3, "m2": 0.1, "tau": 0.2}
    kept = isolated(pairs, hyper, logit="both")
    plain = per_anchor(pairs, hyper | {"m1": 0.0, "m2": 0.0})
    scaled = isolated(pairs, hyper, logit="both", value_preserving=False)
    torch.testing.assert_close(kept, plain)
    torch.testing.assert_close(scaled, factors_of(pairs, hyper).logit * plain)
    one = torch.autograd.grad(kept.mean(), leaves, retain_graph=True)
    torch.testing.assert_close(one, torch.autograd.grad(scaled.mean(), leaves))


def test_constant_emphasis_replaces_the_batch_ratio() -> None:
    pairs, leaves = pairs_and_leaves("mocov3")
    hyper = {"m1": 0.3, "m2": 0.0, "tau": 0.2}
    e1 = float(factors_of(pairs, hyper).emphasis)
    for effects in (EFFECTS["E1"], EFFECTS["E1E2"], EFFECTS["all"]):
        own = torch.autograd.grad(isolated(pairs, hyper, **effects).mean(), leaves, retain_graph=True)
        constant = isolated(pairs, hyper, **(effects | {"emphasis": e1})).mean()
        torch.testing.assert_close(torch.autograd.grad(constant, leaves, retain_graph=True), own)
        double = isolated(pairs, hyper, **(effects | {"emphasis": 2 * e1})).mean()
        assert not torch.allclose(torch.autograd.grad(double, leaves, retain_graph=True)[0], own[0])


def test_eqco_weights_the_negatives() -> None:
    """m2 = tau ln(alpha / K) equals multiplying every negative's exponential by alpha / K."""
    pairs, _ = pairs_and_leaves("mocov2")
    assert pairs.negatives is not None
    ratio = torch.tensor(65536 / 13, dtype=torch.float64)
    loss = per_anchor(pairs, {"m1": 0.0, "m2": 0.2 * float(ratio.log()), "tau": 0.2})
    weighted = torch.nn.functional.softplus(pairs.negatives + ratio.log() - pairs.cosine / 0.2, threshold=100)
    torch.testing.assert_close(loss, weighted, rtol=1e-12, atol=1e-14)


def test_the_factor_of_a_positive_keeps_its_range() -> None:
    """Beyond it the factor is the limit."""
    pairs, leaves = pairs_and_leaves("mocov3")
    hyper = {"m1": 0.3, "m2": 0.0, "tau": 0.2}
    limited = isolated(pairs, hyper, emphasis=7.0, factor_range=(0.0, 3.0))
    at_the_limit = isolated(pairs, hyper, emphasis=3.0)
    torch.testing.assert_close(
        torch.autograd.grad(limited.mean(), leaves, retain_graph=True),
        torch.autograd.grad(at_the_limit.mean(), leaves),
    )


def test_no_margin_leaves_every_bit() -> None:
    pairs, leaves = pairs_and_leaves("simclr")
    hyper = {"m1": 0.0, "m2": 0.0, "tau": 0.2}
    base = margin_loss(pairs, NO_MARGIN, temperature=0.2, beta=1.0, detached=False)
    assert torch.equal(per_anchor(pairs, hyper), base)
    grads = torch.autograd.grad(base.mean(), leaves, retain_graph=True)
    for effects in EFFECTS.values():
        loss = isolated(pairs, hyper, **effects)
        assert torch.equal(loss, base)
        got = torch.autograd.grad(loss.mean(), leaves, retain_graph=True)
        torch.testing.assert_close(got, grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_sphereface_falls_monotonically_and_its_slope_is_its_derivative(m: int) -> None:
    margin = Margin(angular=0.0, subtractive=0.0, multiplier=m)
    theta = leaf(torch.linspace(0.01, pi - 0.01, 200, dtype=torch.float64))
    psi = margin.cosine(theta, theta.cos())
    assert (psi.diff() < 0).all() and psi[0] > 0.99 and psi[-1] < 1.01 - 2 * m
    (slope,) = torch.autograd.grad(psi.sum(), theta)
    torch.testing.assert_close(margin.pull(theta.detach()), -slope)
    torch.testing.assert_close(margin.slope_factor(theta.detach()), -slope / theta.detach().sin())


@pytest.mark.parametrize("wide_angle", ["exact", "arcface", "clamp", "easy"])
@pytest.mark.parametrize("m1", [0.4, -0.4])
def test_pull_and_drop_agree_with_psi(wide_angle: WideAngle, m1: float) -> None:
    margin = Margin(angular=m1, subtractive=0.2, wide_angle=wide_angle)
    theta = leaf(torch.linspace(0.01, pi - 0.01, 101, dtype=torch.float64))
    psi = margin.cosine(theta, theta.cos())
    (slope,) = torch.autograd.grad(psi.sum(), theta)
    torch.testing.assert_close(margin.pull(theta.detach()), -slope)
    torch.testing.assert_close(margin.drop(theta.detach()), (theta.cos() - psi + 0.2).detach())


# -- the method ---------------------------------------------------------------------------------

PREDICTOR = HeadConfig(widths=(6, 5))
BASES: dict[str, BaseConfig] = {
    "simclr": SimCLRConfig(temperature=0.2),
    "mocov2": MoCoV2Config(temperature=0.2, momentum_start=0.9, queue_size=20),
    "mocov3": MoCoV3Config(temperature=0.2, momentum_start=0.9, predictor=PREDICTOR),
    "byol": BYOLConfig(momentum_start=0.9, predictor=PREDICTOR),
    "simsiam": SimSiamConfig(predictor=PREDICTOR),
}
CONSTANT, WHOLE = Constant(), Whole()
PLAN: dict[str, Any] = {"dataset_size": 48, "global_batch_size": 12, "max_epochs": 5}
OPTIM = SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0)


def margin_on(base: str, schedule: Schedule = CONSTANT) -> Combined:
    subtractive = 0.05 if BASES[base].beta else 0.0
    return Combined(angular_margin="20deg", subtractive_margin=subtractive, schedule=schedule)


def tiny(
    base: str,
    family: Family | None = None,
    effects: Effects = WHOLE,
    *,
    world: int = 1,
    sync: bool = False,
    **changes: Any,
) -> MarginContrast:
    """A method on a tiny encoder; ``changes`` are those of its base."""
    torch.manual_seed(3)
    backbone = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    cfg = MarginConfig(
        name="margin",
        base=replace(BASES[base], **changes),
        family=family or margin_on(base),
        effects=effects,
        projector=HeadConfig(widths=(7, 5)),
    )
    method = MarginContrast(cfg, backbone, 8)
    method.prepare(TrainingPlan(**PLAN, world_size=world), OPTIM, 0)
    method = method.double()
    return cast(MarginContrast, to_sync(method)) if sync else method


def tiny_batch(rank: int = 0, world: int = 1, locals_: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [
        torch.randn(12, 6, dtype=torch.float64, generator=generator) * (1 + i) for i in range(2 + locals_)
    ]
    n = 12 // world
    rows = slice(rank * n, (rank + 1) * n)
    views = [v[rows] for v in views]
    return Batch(tuple(views[:2]), tuple(views[2:]), torch.arange(12)[rows])


def gradients_of(method: MarginContrast, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = method.loss(batch)
    loss.backward()
    return loss.detach(), [p.grad for p in method.parameters() if p.grad is not None]


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("locals_", [0, 2])
def test_every_base_recomposes(base: str, locals_: int) -> None:
    """All effects through the isolated path give the gradient of the margin loss, and the loss of the base."""
    batch = tiny_batch(locals_=locals_)
    all_effects = Isolated(
        emphasis="batch", angle=True, logit="both" if BASES[base].beta else None, factor_range=BOUNDLESS
    )
    loss, true = gradients_of(tiny(base), batch)
    value, apart = gradients_of(tiny(base, effects=all_effects), batch)
    plain, _ = gradients_of(tiny(base, NoMargin()), batch)
    torch.testing.assert_close(apart, true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value, plain)
    assert abs(loss - plain) > 1e-3


@pytest.mark.parametrize("base", list(BASES))
def test_without_a_margin_the_base_is_untouched(base: str) -> None:
    loss, gradients = gradients_of(tiny(base, NoMargin()), tiny_batch())
    for family in (
        Combined(angular_margin=0.0, subtractive_margin=0.0),
        CosFace(subtractive_margin=0.0),
        ArcFace(angular_margin=0.0),
    ):
        other, theirs = gradients_of(tiny(base, family), tiny_batch())
        assert torch.equal(other, loss)
        assert all(torch.equal(a, b) for a, b in zip(theirs, gradients, strict=True))


def test_families_that_are_special_cases_of_combined() -> None:
    pairs: list[tuple[Family, Family]] = [
        (CosFace(subtractive_margin=0.1), Combined(angular_margin=0.0, subtractive_margin=0.1)),
        (
            ArcFace(angular_margin=2.0),
            Combined(angular_margin=2.0, subtractive_margin=0.0, wide_angle="arcface"),
        ),
        (EqCo(alpha=100.0), CosFace(subtractive_margin=0.2 * log(100 / 20))),
    ]
    for one, same in pairs:
        torch.testing.assert_close(
            gradients_of(tiny("mocov2", one), tiny_batch()), gradients_of(tiny("mocov2", same), tiny_batch())
        )


@pytest.mark.parametrize("base", ["mocov3", "byol", "simsiam"])
def test_without_a_margin_the_loss_is_that_of_the_papers(base: str) -> None:
    method, batch = tiny(base, NoMargin()), tiny_batch()
    views = batch.global_views
    loss = method.loss(batch)
    z = [method.projector(method.backbone(view)) for view in views]
    p = [normalize(method.predictor(x)) for x in z]
    k = [normalize(x) for x in (z if method.target is None else map(method.target, views))]
    if base == "mocov3":
        positive = torch.arange(12)
        expected = 0.4 * sum(F.cross_entropy(p[i] @ k[1 - i].T / 0.2, positive) for i in (0, 1))
    else:
        cosines = torch.stack([(p[i] * k[1 - i]).sum(1).mean() for i in (0, 1)])
        expected = (2 - 2 * cosines).sum() if base == "byol" else -cosines.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_scale_of_mocov3_can_be_set() -> None:
    scaled, plain = (tiny("mocov3", loss_scale=scale).loss(tiny_batch()) for scale in (3.0, None))
    torch.testing.assert_close(scaled / plain, torch.tensor(3 / 0.4, dtype=torch.float64))


def test_the_base_is_the_simclr_plug_in() -> None:
    method = tiny("simclr", NoMargin())
    batch = tiny_batch()
    z = [normalize(method.projector(method.backbone(v))) for v in batch.global_views]
    torch.testing.assert_close(
        method.loss(batch), nt_xent(z, z, offset=0, temperature=0.2), rtol=1e-12, atol=0
    )


def test_schedule_is_a_function_of_the_step() -> None:
    method = tiny("simclr", margin_on("simclr", Ramp(name="cosine", epochs=2.0)))  # 4 steps an epoch
    ramp = []
    for step in range(10):
        method.optimizer_steps = step
        ramp.append(method.margin_ramp())
    expected = [(1 - cos(pi * min(t, 8) / 8)) / 2 for t in range(10)]
    assert ramp == pytest.approx(expected, abs=1e-15)
    method = tiny("simclr", margin_on("simclr", Ramp(name="linear", epochs=1.0)))
    method.optimizer_steps = 1
    method.loss(tiny_batch())
    assert method.settings["method/angular_margin"] == pytest.approx(pi / 9 / 4)


def test_momentum_and_queue_move_once_a_step() -> None:
    method = tiny("mocov2")
    assert method.queue is not None and method.target is not None
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.target.parameters()]
    rows = method.queue.features.clone()
    method.loss(tiny_batch())
    method.loss(tiny_batch())  # a second micro-batch of the same step
    assert torch.equal(method.queue.features, rows)
    method.after_step(0)
    assert int(method.queue.position) == 48 % 20  # two micro-batches of two views of 12
    first = next(iter(method.backbone.parameters()))
    torch.testing.assert_close(next(method.target.parameters()), 0.9 * before[0] + 0.1 * first)


def test_keys_of_a_skipped_step_are_dropped() -> None:
    method = tiny("mocov2")
    assert method.queue is not None
    method.loss(tiny_batch())
    method.finish_step(skipped=True)
    method.loss(tiny_batch())
    method.finish_step()
    assert int(method.queue.position) == 24 % 20


@pytest.mark.parametrize("base", list(BASES))
def test_bfloat16_autocast_stays_close(base: str) -> None:
    method, batch = tiny(base).float(), tiny_batch()
    batch = Batch(tuple(v.float() for v in batch.global_views), (), batch.sample_id)
    exact = method.loss(batch)
    angle = method.recorded["method/theta_degrees"]
    method.recorded.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * abs(exact)
    assert abs(method.recorded["method/theta_degrees"] - angle) < 1.0
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_bfloat16_leaves_the_angles_of_given_embeddings() -> None:
    u = torch.randn(64, 32)
    v = at_angle(u, 0.05)
    angles = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            pairs = contrast(u, v, torch.arange(64), own=None, temperature=0.2, chunk=None)
        angles.append(torch.rad2deg(pairs.theta))
    assert (angles[0] - angles[1]).abs().max() < 0.1


def test_local_crops_only_query_and_are_reported_apart() -> None:
    method = tiny("mocov3")
    method.loss(tiny_batch(locals_=2))
    assert {"method/theta_degrees", "method/theta_degrees_local"} <= set(method.recorded)
    assert method.recorded["method/theta_degrees"] != method.recorded["method/theta_degrees_local"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("locals_", [0, 1])
def test_a_third_global_view_is_no_local_crop(symmetric: bool, locals_: int) -> None:
    """MoCo v2 with the second view alone as key: views one and three are global queries."""
    method, batch = tiny("mocov2", symmetric=symmetric), tiny_batch(locals_=1 + locals_)
    method.loss(Batch((*batch.global_views, batch.local_views[0]), batch.local_views[1:], batch.sample_id))
    assert ("method/theta_degrees_local" in method.recorded) == bool(locals_)


# -- recipes ------------------------------------------------------------------------------------

RECIPES = [name for name in recipes() if name.startswith("margin_")]
CARD = Path(__file__).parents[2] / "methods/sslzoo_methods/margin/README.md"


def margin_config(recipe: str, *overrides: str) -> MarginConfig:
    method = load_recipe(f"margin_{recipe}_cifar10", overrides).recipe.method
    assert isinstance(method, MarginConfig)
    return method


REFUSED = """\
simclr method.base=moco -> method.base: must be one of simclr, mocov2, mocov3, byol, simsiam; got 'moco'
simclr method.base.beta=2 -> method.base.beta: must lie in [0, 1], got 2.0
simclr method.base.temperature=0 -> method.base.temperature: must be positive, got 0.0
simclr method.base.queue_size=5 -> method.base.queue_size: not a key of method.base simclr, but of mocov2
byol method.base.temperature=0.2 -> method.base.temperature: not a key of method.base byol, but of simclr
mocov2 method.base.momentum_start=0.9995 -> method.base.momentum_start: must lie in [0, momentum_end=0.999], got 0.9995
mocov2 trainer.sync_batchnorm=true -> method.base.momentum_batchnorm: must be same with trainer.sync_batchnorm=true
mocov3 method.base.predictor.widths=[8] -> method.base.predictor.widths: must end in the width of method.projector, 256
simclr views.0.count=1 -> views: must have at least two global views, got 1
simclr method.family.angular_margin=20 -> method.family.angular_margin: must lie in (-pi, pi) radians, got 20.0
simclr method.family.angular_margin=20° -> method.family.angular_margin: must be radians or text such as 10deg
simclr method.family.angular_margin=1..5deg -> method.family.angular_margin: must be radians or text such as 10deg
simclr 'method.family={name: cosface, subtractive_margin: 0, wide_angle: clamp}' -> family.wide_angle: not a key of
simclr 'method.family={name: sphereface, schedule: constant}' -> method.family.schedule: not a key of
simclr 'method.family={name: macl, alpha: 1}' -> method.family.alpha: must keep the temperature above 0, got 1.0
simclr 'method.family={name: macl, alignment: -1.5}' -> method.family.alignment: must be a cosine, in [-1, 1], got -1.5
mocov3 method.family=macl -> method.family: macl is only defined for SimCLR: set method.base.name=simclr
byol method.family.subtractive_margin=0.1 -> method.family: must not subtract from the cosine without negatives
mocov2 method.family=eqco method.base.beta=0 -> method.family: must not subtract from the cosine without negatives
simclr method.family=none method.effects=detached -> method.effects: must be whole for family none, which has no margin
simclr method.family.angular_margin=0 method.effects=detached -> method.effects: must not be detached without an angular
byol method.effects=detached -> method.effects: must not be detached without negatives
simclr method.effects=isolated -> method.effects.name: isolated needs one of emphasis, angle and logit
simclr 'method.effects={name: isolated, emphasis: 0}' -> method.effects.emphasis: must be positive, got 0.0
byol 'method.effects={name: isolated, logit: both}' -> method.effects.logit: must be null without negatives
simclr method.family=eqco 'method.effects={name: isolated, emphasis: batch}' -> effects.emphasis: must not be batch
simclr method.family=eqco 'method.effects={name: isolated, angle: true}' -> method.effects.angle: must be false without
simclr method.family.angular_margin=0 'method.effects={name: isolated, logit: both}' -> effects.logit: must be null
simclr 'method.effects={name: isolated, logit: positive, value_preserving: false}' -> value_preserving: can only be
simclr 'method.effects={name: isolated, angle: true, factor_range: [2, 3]}' -> factor_range: must contain 1
simclr 'method.effects={name: isolated, logit: both, factor_range: [0, 3]}' -> factor_range: has no effect
simclr method.eqco_alpha=3 -> method.eqco_alpha: renamed: use method.family.alpha
"""


@pytest.mark.parametrize("case", REFUSED.splitlines())
def test_what_is_refused(case: str) -> None:
    command, _, message = case.partition(" -> ")
    with pytest.raises(RecipeError) as caught:
        margin_config(*shlex.split(command))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"method.family.angular_margin={m1}"] for m1 in ("0", "-5deg", ".5e1deg", "20deg")),
        *([f"method.family.subtractive_margin={m2}"] for m2 in (0, 0.05, 0.2)),
        *([f"method.family.wide_angle={rule}"] for rule in ("exact", "arcface", "clamp", "easy")),
        *([f"method.base.beta={beta}"] for beta in (0, 0.5, 1)),
        *([f"method.effects={{name: isolated, emphasis: {e1}}}"] for e1 in ("batch", 0.5, 1, 4)),
        *([f"method.effects={{name: isolated, logit: {on}}}"] for on in ("both", "positive", "negative")),
        ["method.effects={name: isolated, emphasis: batch, angle: true, logit: both}"],
        ["method.effects=detached"],
        ["method.family=eqco", "method.effects={name: isolated, logit: both}"],
        ["method.family={name: sphereface, multiplier: 2}", "method.effects=detached"],
        ["method.family={name: arcface, angular_margin: 20deg, schedule: {name: linear, epochs: 10}}"],
    ],
)
def test_sweeps_load(overrides: list[str]) -> None:
    margin_config("simclr", *overrides)


@pytest.mark.parametrize(("alpha", "alignment"), [(0.99, 0.0), (-0.5, 0.5), (-0.99, 0.0)])
def test_macl_at_its_limits_has_a_temperature(alpha: float, alignment: float) -> None:
    macl = MACL(alpha=alpha, alignment=alignment)
    extremes = torch.tensor([-1.0, 1.0])
    assert macl_temperature(extremes, temperature=0.2, alpha=macl.alpha, initial=macl.alignment).min() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angular": 10.0}, "must lie in .* radians, got 10.0"),
        ({"angular": -pi}, "radians"),
        ({"angular": float("nan")}, "got nan"),
        ({"subtractive": float("nan")}, "subtractive margin m2 must be finite, got nan"),
        ({"subtractive": float("-inf")}, "got -inf"),
    ],
)
def test_no_margin_of_impossible_size(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NO_MARGIN, **changes)


@pytest.mark.parametrize("base", ["mocov2", "simsiam"])
def test_weak_colour_jitter_where_the_base_has_it(base: str) -> None:
    (view,) = load_recipe(f"margin_{base}_cifar10").recipe.views
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (view.jitter_p, view.grayscale_p, view.blur_p, view.solarize_p) == (0.8, 0.2, 0.5, 0.0)


def test_sgd_decays_biases_and_norms_too_as_solo_learn() -> None:
    for name in RECIPES:
        optim = load_recipe(name).recipe.optim
        assert not isinstance(optim, SGDConfig) or optim.decay_1d, name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_the_margin_itself(name: str) -> None:
    """And the override that the card has for it takes it away."""
    assert "`method.family=none`" in CARD.read_text()
    recipe = load_recipe(name).recipe
    assert isinstance(recipe.method, MarginConfig) and isinstance(recipe.method.family, Combined)
    assert recipe.method.family.radians > 0 and recipe.method.effects == Whole()
    MarginContrast(recipe.method, torch.nn.Linear(2, 2), 2)
    load_recipe(name, ["method.family=none"])


def test_the_cards_questions_load() -> None:
    table = CARD.read_text().partition("Questions, as overrides")[2].partition("## On")[0]
    commands = re.findall(r"`('?(?:method|data|probe)\.[^`]*)`", table)
    assert len(commands) == 10
    for recipe in ("margin_simclr_cifar10", "margin_mocov2_cifar10", "margin_mocov3_cifar10"):
        for command in commands:
            load_recipe(recipe, shlex.split(command))
