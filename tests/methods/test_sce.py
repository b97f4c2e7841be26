"""SCE: parity with the reference numbers, the loss's identities, and the method's state."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslzoo.nn.batchnorm import SplitBatchNorm
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.numerics import normalize
from sslzoo.nn.queue import FeatureQueue
from sslzoo.optim.optimizers import LARS, build_optimizer, set_learning_rate
from sslzoo.optim.schedules import Shape, ema_momentum, interpolate, warmup_cosine
from sslzoo.recipe.sections import LARSConfig, SGDConfig
from sslzoo.testing.golden import DTYPES, GoldenCase
from sslzoo_methods.sce import loss as loss_module
from sslzoo_methods.sce.loss import (
    RESSL,
    Pair,
    SCEDense,
    SCEOutput,
    TermWeights,
    crop_pairs,
    sce_loss,
    sce_multicrop_loss,
)

Arrays = dict[str, Any]


# -- parity with the authors' code --------------------------------------------------------------

SPEC = {
    "lambda": 0.5,
    "tau": 0.1,
    "tau_m": 0.07,
    "use_keys": False,
    "num_global_crops": 2,
    "num_local_crops": 0,
    "symmetric": True,
    "momentum_schedule": "cosine",
    "sgd_momentum": 0.9,
    "eps": 1e-5,
    "momentum": 0.1,
}


def lean(online: Tensor, target: Tensor, weight: float, **options: Any) -> SCEOutput:
    """The multi-crop form on a single pair."""
    keys = options.pop("keys")
    return sce_multicrop_loss(
        [online],
        [target],
        [Pair(0, 0, 1.0)],
        keys=None if keys is None else [keys],
        weights=TermWeights.sce(weight),
        **options,
    )


def both_forms(
    q_raw: Tensor, k: Tensor, weight: float, **options: Any
) -> tuple[SCEDense, SCEOutput, list[Tensor]]:
    """Dense result, lean result, and the gradient of each with respect to ``q_raw``."""
    q_raw = q_raw.clone().requires_grad_()
    dense = sce_loss(normalize(q_raw), k, contrastive_weight=weight, **options)
    lean_out = lean(normalize(q_raw), k, weight, **options)
    grads = [torch.autograd.grad(x.terms.loss, q_raw)[0] for x in (dense, lean_out)]
    return dense, lean_out, grads


def golden_loss_queue(case: GoldenCase, precision: str) -> list[Arrays]:
    x = case.tensors(precision)
    dense_out, lean_out = {}, {}
    for combo in case.hyper["combos"]:
        prefix = f"c{combo['index']}_"
        for variant in ("zero_logit", "masked"):
            dense, fast, grads = both_forms(
                x["q_raw"],
                normalize(x["k_raw"]),
                combo["lambda"],
                keys=None,
                first_row=0,
                queue=x["queue"].T,
                temperature=combo["tau"],
                target_temperature=combo["tau_m"],
                target_positive=variant,
            )
            for form, terms, grad in (
                (dense_out, dense.terms, grads[0]),
                (lean_out, fast.terms, grads[1]),
            ):
                form |= {
                    prefix + f"target_{variant}": dense.target,
                    prefix + "log_pred": dense.log_prediction,
                    prefix + f"loss_{variant}": terms.loss,
                    prefix + f"grad_q_raw_{variant}": grad,
                    prefix + "term_infonce": terms.contrastive,
                    prefix + "term_ressl": terms.relational,
                    prefix + "term_ceil": terms.ceil,
                }
    return [dense_out, lean_out]


def golden_loss_keys(case: GoldenCase, precision: str) -> list[Arrays]:
    x, h = case.tensors(precision), case.hyper
    k = normalize(x["k_raw"])
    dense_out, lean_out = {}, {}
    for prefix, queue in (("with_queue_", x["queue"].T), ("no_queue_", None)):
        dense, fast, grads = both_forms(
            x["q_raw"],
            k,
            h["lambda"],
            keys=k,
            first_row=0,
            queue=queue,
            temperature=h["tau"],
            target_temperature=h["tau_m"],
            target_positive="masked",
        )
        for out, terms, grad in ((dense_out, dense.terms, grads[0]), (lean_out, fast.terms, grads[1])):
            out |= {
                prefix + "target": dense.target,
                prefix + "log_pred": dense.log_prediction,
                prefix + "loss": terms.loss,
                prefix + "grad_q_raw": grad,
                prefix + "term_infonce": terms.contrastive,
                prefix + "term_ressl": terms.relational,
                prefix + "term_ceil": terms.ceil,
            }
    return [dense_out, lean_out]


def pairwise_mean(online: list[Tensor], target: list[Tensor], pairs: Any, **options: Any) -> Tensor:
    """The readable form of the multi-crop loss: the flat mean of the dense definition."""
    keys = options.pop("keys")
    losses = [
        sce_loss(online[j], target[i], keys=None if keys is None else keys[i], **options).terms.loss
        for i, j, _ in pairs
    ]
    return torch.stack(losses).mean()


def step_loss(
    online: list[Tensor],
    keys: list[Tensor],
    pairs: Any,
    *,
    dense: bool,
    first_row: int,
    rows: int,
    hyper: Any,
) -> Callable[..., Tensor]:
    """The loss of one rank with all ranks' ``keys``, from the hyper-parameters of a case."""
    options: dict[str, Any] = {
        "keys": keys if hyper["use_keys"] else None,
        "first_row": first_row,
        "temperature": hyper["tau"],
        "target_temperature": hyper["tau_m"],
        "target_positive": "masked" if hyper["use_keys"] else hyper.get("target_positive", "zero_logit"),
    }
    target, weight = [key[first_row : first_row + rows] for key in keys], hyper["lambda"]

    def compute(queue: Tensor) -> Tensor:
        if dense:
            return pairwise_mean(online, target, pairs, queue=queue, contrastive_weight=weight, **options)
        return sce_multicrop_loss(
            online, target, pairs, queue=queue, weights=TermWeights.sce(weight), **options
        ).terms.loss

    return compute


def new_queue(stored: Tensor) -> FeatureQueue:
    queue = FeatureQueue(stored.shape[1], stored.shape[0]).to(stored.dtype)
    queue.features.copy_(stored.T)
    return queue


def golden_stateful(case: GoldenCase, precision: str) -> list[Arrays]:
    return [_stateful(case, precision, dense=dense) for dense in (True, False)]


def _stateful(case: GoldenCase, precision: str, *, dense: bool) -> Arrays:
    """Every rank of the case in turn; collectives are covered by the tests with real processes."""
    x, h = case.tensors(precision), case.hyper
    crops, symmetric = h["num_global_crops"] + h["num_local_crops"], h["symmetric"]
    views = h["num_global_crops"] if symmetric else 1
    pairs = crop_pairs(views, crops, symmetric=symmetric, weighting="flat")
    queue, out = new_queue(x["queue0"]), {}
    for step in range(h["steps"]):
        raw = [x[f"s{step}_crop{c}_raw"] for c in range(crops)]  # (world, b, D)
        world, b = raw[0].shape[:2]
        keys = [normalize(raw[c].flatten(0, 1)) for c in range(views)]
        losses, grads = [], [torch.zeros_like(r) for r in raw]
        for r in range(world):
            leaves = [c[r].clone().requires_grad_() for c in raw]
            online = [normalize(leaf) for leaf in (leaves if symmetric else leaves[1:])]
            compute = step_loss(online, keys, pairs, dense=dense, first_row=r * b, rows=b, hyper=h)
            loss = compute(queue.features)
            loss.backward()
            losses.append(loss.detach())
            for c, leaf in enumerate(leaves):
                if leaf.grad is not None:
                    grads[c][r] = leaf.grad
        queue.push(torch.cat(keys))
        out |= {
            f"s{step}_loss": torch.stack(losses),
            f"s{step}_queue": queue.features.T.clone(),
            f"s{step}_ptr": queue.position.clone(),
        }
        out |= {f"s{step}_grad_crop{c}": g for c, g in enumerate(grads)}
    return out


def network(description: str, bn: dict[str, Any]) -> nn.Sequential:
    """``Linear(5,7,no bias)-BN-ReLU-...`` as modules named ``layers.N``."""
    layers: list[nn.Module] = []
    for part in re.findall(r"[A-Za-z]+(?:\([^)]*\))?", description):
        name, _, inside = part.partition("(")
        words = inside.rstrip(")")
        if name == "Linear":
            fan_in, fan_out = (int(n) for n in words.split(",")[:2])
            layers.append(nn.Linear(fan_in, fan_out, bias="no bias" not in words))
        elif name == "BN":
            width = next(m for m in reversed(layers) if isinstance(m, nn.Linear)).out_features
            layers.append(nn.BatchNorm1d(width, **bn, affine="no affine" not in words))
        else:
            assert part == "ReLU", part
            layers.append(nn.ReLU())
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))


def golden_train_loop(case: GoldenCase, precision: str) -> list[Arrays]:
    return [_train_loop(case, precision, dense=dense) for dense in (True, False)]


def _train_loop(case: GoldenCase, precision: str, *, dense: bool) -> Arrays:
    x, h = case.tensors(precision), case.hyper
    dtype = DTYPES[precision]
    names = [n for n in ("trunk", "projector", "predictor") if h["architecture"].get(n)]
    nets = {n: network(h["architecture"][n], h["architecture"]["bn"]).to(dtype) for n in names}
    momentum = MomentumEncoder(nets["trunk"], nets["projector"])
    everything = nets | {"momentum_trunk": momentum.layers[0], "momentum_projector": momentum.layers[1]}
    for name, net in everything.items():
        prefix = f"init/{name}."
        net.load_state_dict({k.removeprefix(prefix): v for k, v in x.items() if k.startswith(prefix)})
    named = [(f"{n}.{p}", w) for n, net in nets.items() for p, w in net.named_parameters()]
    common: dict[str, Any] = {"lr_scaling": "none", "warmup_epochs": 0.0, "momentum": h["sgd_momentum"]}
    common |= {name: h[name] for name in ("lr", "weight_decay")}
    optim = (
        SGDConfig(**common, decay_1d=h["weight_decay"] > 0)
        if h["optimizer"] == "sgd"
        else LARSConfig(**common, trust_coefficient=h.get("trust_coefficient", 0.001))
    )
    optimizer = build_optimizer([{"named": named}], optim, fused=True)
    crops, symmetric = h["num_global_crops"] + h["num_local_crops"], h["symmetric"]
    views = h["num_global_crops"] if symmetric else 1
    pairs = crop_pairs(views, crops, symmetric=symmetric, weighting="flat")
    queue, out, total = new_queue(x["queue0"]), {}, h["total_steps"]
    for step in range(h["steps"]):
        batch = [x[f"s{step}_crop{c}"] for c in range(crops)]
        keys = [normalize(momentum(view)) for view in batch[:views]]
        online = []
        for view in batch if symmetric else batch[1:]:
            for net in nets.values():
                view = net(view)  # noqa: PLW2901
            online.append(normalize(view))
        compute = step_loss(online, keys, pairs, dense=dense, first_row=0, rows=len(keys[0]), hyper=h)
        loss = compute(queue.features)
        optimizer.zero_grad()
        loss.backward()
        out |= {f"s{step}_grad/{n}": p.grad.clone() for n, p in named if p.grad is not None}
        lr = warmup_cosine(step, total_steps=total, warmup_steps=h["warmup_steps"], peak=h["lr"])
        set_learning_rate(optimizer, lr)
        optimizer.step()
        queue.push(torch.cat(keys))
        coefficient = ema_momentum(
            step, total_steps=total, start=h["base_momentum"], schedule=h["momentum_schedule"]
        )
        momentum.update(nets["trunk"], nets["projector"], coefficient=coefficient)
        out |= {
            f"s{step}_loss": loss,
            f"s{step}_lr": lr,
            f"s{step}_momentum": coefficient,
            f"s{step}_queue": queue.features.T.clone(),
            f"s{step}_ptr": queue.position.clone(),
        }
        for name, net in everything.items():
            out |= {f"s{step}_after/{name}.{k}": v.clone() for k, v in net.state_dict().items()}
    return out


def golden_lars_and_schedules(case: GoldenCase, precision: str) -> list[Arrays]:
    x, h = case.tensors(precision), case.hyper
    params = {n.removeprefix("init/"): nn.Parameter(v.clone()) for n, v in x.items() if n.startswith("init/")}
    options = dict(h["lars"])
    lars = LARS(list(params.values()), options.pop("lr"), **options)
    out: Arrays = {}
    steps = sorted({int(n[1 : n.index("_")]) for n in x if re.match(r"s\d+_grad/", n)})
    for step in steps:
        for name, p in params.items():
            p.grad = x[f"s{step}_grad/{name}"].clone()
        lars.step()
        for name, p in params.items():
            out[f"s{step}_param/{name}"] = p.detach().clone()
            out[f"s{step}_buf/{name}"] = lars.state[p]["momentum_buffer"].clone()
    lr, ema = h["lr_schedule"], h["ema"]
    out["lr_per_step"] = torch.tensor(
        [
            warmup_cosine(
                s,
                total_steps=lr["total_steps"],
                warmup_steps=lr["warmup_steps"],
                peak=lr["base_lr"],
                start=lr["start_lr"],
                end=lr["min_lr"],
            )
            for s in range(lr["total_steps"])
        ],
        dtype=torch.float64,
    )
    out["ema_momentum_per_step"] = torch.tensor(
        [
            ema_momentum(s, total_steps=ema["total_steps"], start=ema["base"], schedule="cosine")
            for s in range(ema["total_steps"])
        ],
        dtype=torch.float64,
    )
    warmups: list[tuple[str, str, Shape]] = [
        ("tau_m_cosine_warmup_per_step", "tau_m_warmup", "cosine"),
        ("lambda_linear_warmup_per_step", "lambda_warmup", "linear"),
    ]
    for name, key, shape in warmups:
        if key in h:
            n = h[key]["epochs"] * h[key]["steps_per_epoch"]
            values = [interpolate(s, n, h[key]["start"], h[key]["end"], shape) for s in range(n + 1)]
            out[name] = torch.tensor(values, dtype=torch.float64)
    return [out]


def golden_split_batchnorm(case: GoldenCase, precision: str) -> list[Arrays]:
    x, h = case.tensors(precision), case.hyper
    bn = SplitBatchNorm(h["C"], splits=h["num_splits"], eps=h["eps"], momentum=h["momentum"])
    bn = bn.to(x["x"].dtype)
    with torch.no_grad():
        bn.weight.copy_(x["weight"])
        bn.bias.copy_(x["bias"])
    images = x["x"].requires_grad_()
    y = bn(images)
    (y * x["upstream"]).sum().backward()
    return [
        {
            "y_train": y,
            "grad_x": images.grad,
            "running_mean": bn.running_mean,
            "running_var": bn.running_var,
            "y_eval": bn.eval()(images),
        }
    ]


GOLDEN = {
    "loss_queue": golden_loss_queue,
    "loss_keys": golden_loss_keys,
    "stateful": golden_stateful,
    "train_loop": golden_train_loop,
    "lars_and_schedules": golden_lars_and_schedules,
    "split_batchnorm": golden_split_batchnorm,
}


def test_golden(golden_case: GoldenCase, precision: str) -> None:
    """Both forms of the loss, wherever a case computes one."""
    assert golden_case.kind in GOLDEN, f"{golden_case.name}: unknown kind {golden_case.kind!r}"
    for got in GOLDEN[golden_case.kind](golden_case, precision):
        golden_case.check(got, precision)


# -- identities of the loss ---------------------------------------------------------------------

VARIANTS = ["queue-zero_logit", "queue-masked", "keys+queue-masked", "keys-masked"]


def candidates(variant: str, views: int = 1, n: int = 5, dim: int = 7, size: int = 40) -> dict[str, Any]:
    """Online and momentum features of a rank whose rows start at 3 of 11, and the rest of the options."""
    torch.manual_seed(1)
    every = [normalize(torch.randn(11, dim, dtype=torch.float64)) for _ in range(views)]
    kind, positive = variant.split("-")
    queue = normalize(torch.randn(size, dim, dtype=torch.float64))
    return {
        "target": [key[3 : 3 + n] for key in every],
        "keys": every if "keys" in kind else None,
        "queue": queue if "queue" in kind else None,
        "first_row": 3,
        "temperature": 0.2,
        "target_temperature": 0.1,
        "target_positive": positive,
    }


def features_of(n: int = 5, dim: int = 7, crops: int = 1) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(n, dim, dtype=torch.float64, requires_grad=True) for _ in range(crops)]


@pytest.mark.parametrize("weighting", ["flat", "per_online_crop"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_multicrop_form_equals_the_dense_one(variant: str, symmetric: bool, weighting: Any) -> None:
    views, crops = (2, 4) if symmetric else (1, 3)
    options = candidates(variant, views)
    raw = features_of(crops=crops if symmetric else crops - 1)
    pairs = crop_pairs(views, crops, symmetric=symmetric, weighting=weighting)
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)
    online = [normalize(r) for r in raw]
    fast = sce_multicrop_loss(online, pairs=pairs, weights=TermWeights.sce(0.3), **options)
    keys, target = options.pop("keys"), options.pop("target")
    dense = [
        sce_loss(
            online[j], target[i], keys=None if keys is None else keys[i], contrastive_weight=0.3, **options
        ).terms
        for i, j, _ in pairs
    ]
    for field in fast.terms._fields:
        expected = sum(p.weight * getattr(d, field) for p, d in zip(pairs, dense, strict=True))
        torch.testing.assert_close(getattr(fast.terms, field), expected, rtol=1e-12, atol=1e-12)
    slow = torch.stack([p.weight * d.loss for p, d in zip(pairs, dense, strict=True)]).sum()
    got = torch.autograd.grad(fast.terms.loss, raw, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(slow, raw), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_queue_longer_than_a_tile(variant: str, shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one shorter, with the positive's column in any of them, and with exponentials relative to
    a maximum as at small temperatures."""
    options = candidates(variant, n=8, size=200)
    raw = features_of(n=8)
    whole = _loss_and_grad(raw, options)
    calls = []
    original = loss_module._mask_column
    monkeypatch.setattr(loss_module, "TILE", {"cpu": 16 * 3})
    monkeypatch.setattr(loss_module, "MIN_WIDTH", 3)
    monkeypatch.setattr("sslzoo.nn.streaming.UNSHIFTED", 0.0 if shifted else 100.0)
    monkeypatch.setattr(loss_module, "_mask_column", lambda *a: (calls.append(1), original(*a))[1])
    torch.testing.assert_close(_loss_and_grad(raw, options), whole, rtol=1e-12, atol=1e-13)
    assert len(calls) > 1 or options["keys"] is None


def _loss_and_grad(raw: list[Tensor], options: dict[str, Any], weight: float = 0.3) -> list[Tensor]:
    out = sce_multicrop_loss(
        [normalize(r) for r in raw],
        pairs=[Pair(0, j, 1 / len(raw)) for j in range(len(raw))],
        weights=TermWeights.sce(weight),
        **options,
    )
    return [out.terms.loss.detach(), out.target_top1, *torch.autograd.grad(out.terms.loss, raw)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_numerical_one(variant: str) -> None:
    options = candidates(variant, n=3)

    def f(q: Tensor) -> Tensor:
        return sce_multicrop_loss(
            [normalize(q)],
            pairs=[Pair(0, 0, 1.0)],
            weights=TermWeights(0.4, 0.5, 0.2),
            **options,
        ).terms.loss

    options["target_positive"] = "masked"
    assert torch.autograd.gradcheck(f, features_of(n=3))


def test_gradient_reaches_the_online_branch_only() -> None:
    options = candidates("keys+queue-masked")
    leaves = [options["target"][0], options["keys"][0], options["queue"]]
    for leaf in leaves:
        leaf.requires_grad_()
    out = sce_multicrop_loss(
        features_of(),
        pairs=[Pair(0, 0, 1.0)],
        weights=TermWeights.sce(0.5),
        **options,
    )
    out.terms.loss.backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert not any(value.requires_grad for value in out.health().values())


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    """Memory for backward: O(N D), not O(N K)."""
    options = candidates("queue-zero_logit", size=5000)
    sizes: list[int] = []

    def note(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _loss_and_grad(features_of(), options)
    assert sizes
    assert max(sizes) <= 2 * 5 * 7


def test_terms_add_up_and_weight_one_is_infonce() -> None:
    raw, options = features_of()[0], candidates("queue-masked")
    q, k, queue = normalize(raw), options["target"][0], options["queue"]
    options = options | {"target": k}
    for weight in (0.0, 0.25, 1.0):
        t = sce_loss(q, contrastive_weight=weight, **options).terms
        total = weight * t.contrastive + (1 - weight) * (t.relational + t.ceil)
        torch.testing.assert_close(t.loss, total, rtol=1e-13, atol=1e-13)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / options["temperature"]
    infonce = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
    torch.testing.assert_close(t.loss, infonce, rtol=1e-13, atol=1e-13)


def test_ressl_has_the_positive_on_neither_side() -> None:
    raw, options = features_of(), candidates("queue-masked")
    q, k, queue = normalize(raw[0]), options["target"][0], options["queue"]
    out = sce_multicrop_loss(
        [q],
        pairs=[Pair(0, 0, 1.0)],
        weights=RESSL,
        **options,
    )
    target = (k @ queue.T / options["target_temperature"]).softmax(1)
    expected = F.cross_entropy(q @ queue.T / options["temperature"], target)
    torch.testing.assert_close(out.terms.loss, expected, rtol=1e-13, atol=1e-13)
    got, want = (torch.autograd.grad(x, raw, retain_graph=True)[0] for x in (out.terms.loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_zero_logit_differs_from_masked_by_the_mass_on_the_positive() -> None:
    options = candidates("queue-masked", size=40)
    k, queue = options["target"][0], options["queue"]
    got = [
        sce_loss(
            normalize(features_of()[0]),
            contrastive_weight=0.5,
            **(options | {"target": k, "target_positive": p}),
        ).target
        for p in ("masked", "zero_logit")
    ]
    mass = 1 / (1 + (k @ queue.T / options["target_temperature"]).exp().sum(1))
    torch.testing.assert_close((got[1] - got[0])[:, 0], 0.5 * mass, rtol=1e-12, atol=1e-14)
    assert torch.allclose(got[1].sum(1), torch.ones(5, dtype=torch.float64))


def test_health_is_that_of_the_target_distribution() -> None:
    options = candidates("keys+queue-masked")
    out = sce_multicrop_loss(
        [normalize(x) for x in features_of()],
        pairs=[Pair(0, 0, 1.0)],
        weights=TermWeights.sce(0.5),
        **options,
    )
    dense = sce_loss(
        normalize(features_of()[0]),
        contrastive_weight=0.0,
        **(options | {"target": options["target"][0], "keys": options["keys"][0]}),
    )
    entropy = torch.special.entr(dense.target).sum(1)
    torch.testing.assert_close(out.target_entropy, entropy.mean())
    torch.testing.assert_close(out.target_count, entropy.exp().mean())
    torch.testing.assert_close(out.target_top1, dense.target.amax(1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("corner", ["collapsed", "duplicates", "sharp", "one_negative", "zero_row"])
def test_corner_inputs_in_float32(variant: str, corner: str) -> None:
    """Finite, and as near to the float64 dense form as rounding of the similarities allows."""
    options, raw = candidates(variant), features_of()[0].detach()
    if corner == "collapsed":
        for name in ("target", "keys"):
            if options[name]:
                options[name] = [torch.ones_like(options[name][0]) / 7**0.5]
        raw = torch.ones_like(raw)
    elif corner == "duplicates":
        raw = options["target"][0].clone()
    elif corner == "sharp":
        options |= {"temperature": 0.02, "target_temperature": 0.01}
        raw = options["target"][0] + 0.01 * raw
    elif corner == "zero_row":
        raw[1] = 0.0
    elif options["queue"] is not None:
        options["queue"] = options["queue"][:1]
        if options["keys"] is not None:  # a single image: all its negatives are queued
            options |= {"keys": [options["target"][0][:1]], "first_row": 0}
            options["target"], raw = [options["target"][0][:1]], raw[:1]
    else:
        options |= {"keys": [options["keys"][0][:2]], "first_row": 0}
        options["target"], raw = [options["keys"][0][:2]], raw[:2]
    exact = raw.clone().requires_grad_()
    keys, target = options["keys"], options["target"][0]
    dense = sce_loss(
        normalize(exact),
        contrastive_weight=0.3,
        **(options | {"target": target, "keys": keys[0] if keys else None}),
    ).terms.loss
    dense.backward()
    single = {
        name: [v.float() for v in value]
        if isinstance(value, list)
        else value.float()
        if isinstance(value, Tensor)
        else value
        for name, value in options.items()
    }
    loss, _, grad = _loss_and_grad([raw.float().requires_grad_()], single)
    torch.testing.assert_close(loss.double(), dense.detach(), rtol=2e-5, atol=2e-6)
    assert torch.isfinite(grad).all()
    assert exact.grad is not None
    scale = exact.grad.abs().amax(1, keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(grad.double() / scale, exact.grad / scale, rtol=2e-4, atol=2e-5)


def test_backward_inside_autocast_loses_nothing() -> None:
    """No matrix product is left for the backward pass, which autocast would run in half precision."""
    options = candidates("keys+queue-masked")
    single = {k: [x.float() for x in v] if isinstance(v, list) else v for k, v in options.items()}
    single["queue"] = options["queue"].float()
    raw = [x.detach().float().requires_grad_() for x in features_of()]
    outside = _loss_and_grad(raw, single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _loss_and_grad(raw, single)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_loss_refuses_what_has_no_meaning() -> None:
    options: dict[str, Any] = candidates("queue-masked", n=1) | {"contrastive_weight": 0.5}
    q, k = features_of(1)[0], options.pop("target")[0]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"queue": None}, "needs negatives"),
        ({"queue": None, "keys": k}, "needs negatives"),
        ({"keys": k, "target_positive": "zero_logit"}, "zero_logit is only defined"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            sce_loss(q, k, **(options | changes))


def test_pairs_and_their_weights() -> None:
    assert crop_pairs(1, 3, symmetric=False, weighting="flat") == [(0, 0, 0.5), (0, 1, 0.5)]
    for weighting, share in (("flat", 8 / 10), ("per_online_crop", 4 / 6)):
        pairs = crop_pairs(2, 6, symmetric=True, weighting=weighting)  # type: ignore[arg-type]
        assert len(pairs) == 10
        assert not any(pair.target == pair.online for pair in pairs)
        assert sum(pair.weight for pair in pairs if pair.online > 1) == pytest.approx(share)
