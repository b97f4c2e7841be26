"""SCE: parity with the reference numbers, the loss's identities, and the method's state."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslzoo.batchnorm import SplitBatchNorm
from sslzoo.config import OptimConfig
from sslzoo.momentum import MomentumEncoder
from sslzoo.numerics import normalize
from sslzoo.optim import LARS, build_optimizer, set_learning_rate
from sslzoo.queue import FeatureQueue
from sslzoo.schedules import ema_momentum, interpolate, warmup_cosine
from sslzoo_methods.sce.loss import (
    SCEDense,
    SCEOutput,
    crop_pairs,
    pair_weights,
    sce_loss,
    sce_multicrop_loss,
)
from tests.golden_cases import DTYPES, GoldenCase

Arrays = dict[str, Any]


# -- parity with the authors' code --------------------------------------------------------------


def lean(online: Tensor, target: Tensor, weight: float, **options: Any) -> SCEOutput:
    """The multi-crop form on a single pair."""
    keys = options.pop("keys")
    return sce_multicrop_loss(
        [online],
        [target],
        [(0, 0)],
        [1.0],
        keys=None if keys is None else [keys],
        contrastive_weight=weight,
        relational_weight=1 - weight,
        ceil_weight=1 - weight,
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
        for i, j in pairs
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
        "contrastive_weight": hyper["lambda"],
        "target_positive": "masked" if hyper["use_keys"] else hyper.get("target_positive", "zero_logit"),
    }
    target = [key[first_row : first_row + rows] for key in keys]

    def compute(queue: Tensor) -> Tensor:
        if dense:
            return pairwise_mean(online, target, pairs, queue=queue, **options)
        rest = 1 - hyper["lambda"]
        return sce_multicrop_loss(
            online,
            target,
            pairs,
            pair_weights(pairs, "flat"),
            queue=queue,
            relational_weight=rest,
            ceil_weight=rest,
            **options,
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
    pairs = crop_pairs(views, crops, symmetric=symmetric)
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
    optim = OptimConfig(
        name=h["optimizer"],
        lr=h["lr"],
        lr_scaling="none",
        weight_decay=h["weight_decay"],
        warmup_epochs=0.0,
        momentum=h["sgd_momentum"],
        trust_coefficient=h.get("trust_coefficient", 0.001),
        decay_1d=h["optimizer"] == "sgd",
    )
    optimizer = build_optimizer([{"named": named}], optim)
    crops, symmetric = h["num_global_crops"] + h["num_local_crops"], h["symmetric"]
    views = h["num_global_crops"] if symmetric else 1
    pairs = crop_pairs(views, crops, symmetric=symmetric)
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
    for name, key, shape in (
        ("tau_m_cosine_warmup_per_step", "tau_m_warmup", "cosine"),
        ("lambda_linear_warmup_per_step", "lambda_warmup", "linear"),
    ):
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
