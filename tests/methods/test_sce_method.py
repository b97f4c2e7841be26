"""SCE's method: the state it carries, many processes against one, accumulation, schedules, refusals."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.distributed import all_reduce_mean
from sslzoo.nn.backbones import build_backbone
from sslzoo.nn.batchnorm import SplitBatchNorm
from sslzoo.nn.measurements import reported
from sslzoo.nn.numerics import normalize
from sslzoo.optim.schedules import learning_rate
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import method_class, recipes
from sslzoo.recipe.sections import HeadConfig, LARSConfig, SGDConfig
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.sce.config import ReSSLLoss, SCEConfig, SCELoss, ThreeTermLoss, Warmup
from sslzoo_methods.sce.method import SCE

OPTIM = LARSConfig(lr=0.5, lr_scaling="none", weight_decay=1e-4, warmup_epochs=1.0)
BASE = SCEConfig(
    name="sce",
    temperature=0.1,
    target_temperature=0.07,
    loss=SCELoss(contrastive_weight=0.5),
    queue_size=48,
    momentum=0.9,
    momentum_schedule="cosine",
    symmetric=True,
    projector=HeadConfig(widths=(8, 6), output_norm="batch_no_affine", output_bias=False),
    predictor=HeadConfig(widths=(8, 6), output_bias=False),
)
MASKED = SCELoss(contrastive_weight=0.5, target_positive="masked")
CONFIGS = {
    "symmetric": BASE,
    "asymmetric": replace(BASE, symmetric=False, predictor=None, momentum_schedule="constant"),
    "keys+queue": replace(BASE, batch_negatives=True, loss=MASKED, queue_size=30),
    "keys": replace(BASE, batch_negatives=True, loss=MASKED, queue_size=None),
    "joint": replace(BASE, crop_batching="joint", pair_weighting="per_online_crop"),
}
N = 12  # global batch


def backbone(*, norm: bool = True) -> nn.Module:
    layers = [
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers)


def make(
    cfg: SCEConfig,
    *,
    norm: bool = True,
    world: int = 1,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    **plan: int,
) -> SCE:
    torch.manual_seed(3)
    if not norm:
        plain = HeadConfig(widths=(8, 6), hidden_norm=False)
        cfg = replace(cfg, projector=plain, predictor=cfg.predictor and plain)
    method = SCE(cfg, backbone(norm=norm), 6).to(dtype)
    numbers = {"dataset_size": 5 * N, "global_batch_size": N, "max_epochs": 2} | plan
    method.prepare(TrainingPlan(**numbers, world_size=world, accumulate=accumulate), OPTIM, 11)
    return method


def batch_of(step: int, rows: slice = slice(None), dtype: torch.dtype = torch.float64) -> Batch:
    """Rows of the global batch of a step: two global views and a smaller local one."""
    g = torch.Generator().manual_seed(100 + step)
    views = [torch.randn(N, 3, s, s, generator=g, dtype=torch.float64).to(dtype)[rows] for s in (4, 4, 3)]
    return Batch(tuple(views[:2]), tuple(views[2:]), torch.arange(N)[rows])


def train(
    method: SCE, steps: range, rank: int = 0, world: int = 1, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], list[Tensor]]:
    """Optimiser steps as Lightning and DDP take them; mean losses, and gradients of the first step."""
    optimizer = method.configure_optimizers() if optimizer is None else optimizer
    accumulate = method.plan.accumulate
    b = N // (world * accumulate)
    losses, first = [], []
    for step in steps:
        optimizer.zero_grad()
        total = 0.0
        for m in range(accumulate):
            start = m * b * world + rank * b
            loss = method.loss(batch_of(step, slice(start, start + b))) / accumulate
            loss.backward()
            total += float(all_reduce_mean(loss.detach()))
        trained = [p for p in method.parameters() if p.requires_grad]
        for p in trained:
            assert p.grad is not None
            p.grad = all_reduce_mean(p.grad)
        losses.append(total)
        first = first or [p.grad.clone() for p in trained if p.grad is not None]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(method.step, OPTIM, method.plan) * group["lr_factor"]
        optimizer.step()
        method.finish_step()
    return losses, first


# -- several processes --------------------------------------------------------------------------


def _shuffled_keys(rank: int, world: int, cfg: SCEConfig, norm: bool) -> list[Tensor]:
    method = make(cfg, world=world, norm=norm)
    b = N // world
    return method._keys(batch_of(0, slice(rank * b, rank * b + b)).global_views)


def test_shufflebn_changes_batch_statistics_and_nothing_else() -> None:
    """Keys come back in the order of the images; without batch norm they are the very same."""
    shuffled, same = replace(BASE, momentum_batchnorm="shuffle"), BASE
    plain = run_ranks(2, _shuffled_keys, same, False)
    mixed = run_ranks(2, _shuffled_keys, shuffled, False)
    torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed[0], mixed[1], rtol=0, atol=0)
    normed = run_ranks(2, _shuffled_keys, shuffled, True)
    assert not torch.allclose(normed[0][0], run_ranks(2, _shuffled_keys, same, True)[0][0])
    torch.testing.assert_close(normed[0], normed[1], rtol=0, atol=0)


# -- one process --------------------------------------------------------------------------------


def test_accumulation_updates_once_and_queues_in_order() -> None:
    """One EMA and one push per optimiser step; keys view by view, as without accumulation."""
    method = make(BASE, norm=False, accumulate=3)
    twin = copy.deepcopy(method.momentum_encoder)
    train(method, range(1))
    b = N // 3
    expected = [
        normalize(twin(batch_of(0, slice(m * b, m * b + b)).global_views[v]))
        for v in range(2)
        for m in range(3)
    ]
    assert method.queue is not None
    torch.testing.assert_close(method.queue.features[: 2 * N], torch.cat(expected))
    assert int(method.queue.position) == 2 * N
    assert method.optimizer_steps == 1
    assert not method.pending


@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
def test_accumulation_equals_the_large_batch_with_the_queue_alone(name: str) -> None:
    """Where no batch keys are candidates and no batch norm couples the rows."""
    whole, parts = make(CONFIGS[name], norm=False), make(CONFIGS[name], norm=False, accumulate=3)
    losses, grads = train(whole, range(1))
    got_losses, got_grads = train(parts, range(1))
    torch.testing.assert_close(got_losses, losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got_grads, grads, rtol=1e-11, atol=1e-13)


def test_a_skipped_step_queues_nothing_and_leaves_the_momentum_encoder() -> None:
    method = make(BASE)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    for p in method.backbone.parameters():
        p.data.add_(1.0)
    method.loss(batch_of(0))
    method.finish_step(skipped=True)
    assert method.optimizer_steps == 1
    assert all(map(torch.equal, method.momentum_encoder.parameters(), before))
    method.loss(batch_of(1))
    method.finish_step()
    assert method.queue is not None
    assert int(method.queue.position) == 2 * N
    assert not all(map(torch.equal, method.momentum_encoder.parameters(), before))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "cosine_epoch"])
def test_momentum_schedule(schedule: Any) -> None:
    method = make(replace(BASE, momentum_schedule=schedule))
    seen = []
    for step in range(10):  # 2 epochs of 5 steps
        method.loss(batch_of(step))
        method.finish_step()
        seen.append(method.settings["method/momentum"])
    assert seen[0] == pytest.approx(0.9, abs=1e-15)
    assert seen == sorted(seen)
    assert seen[-1] == (0.9 if schedule == "constant" else 1.0)
    assert len(set(seen)) == {"constant": 1, "cosine": 10, "cosine_epoch": 2}[schedule]


def test_warmups_start_at_their_start_and_end_at_the_option() -> None:
    warm = replace(
        BASE,
        target_temperature_warmup=Warmup(start=0.04, epochs=1.0, shape="cosine"),
        loss=SCELoss(contrastive_weight=0.5, contrastive_weight_warmup=Warmup(start=1.0, epochs=1.0)),
    )
    at_start = make(replace(BASE, target_temperature=0.04, loss=SCELoss(contrastive_weight=1.0)))
    method = make(warm)
    torch.testing.assert_close(method.loss(batch_of(0)), at_start.loss(batch_of(0)), rtol=0, atol=0)
    method, plain = make(warm), make(BASE)
    assert method.loss(batch_of(0)) != plain.loss(batch_of(0))
    method, plain = make(warm), make(BASE)
    method.optimizer_steps = plain.optimizer_steps = 4  # the last of the first epoch
    torch.testing.assert_close(method.loss(batch_of(0)), plain.loss(batch_of(0)), rtol=0, atol=0)


def test_asymmetric_first_view_never_passes_online() -> None:
    method = make(CONFIGS["asymmetric"])
    batch = batch_of(0)
    method.loss(batch)
    torch.testing.assert_close(method.published["backbone"], make(BASE).backbone(batch.global_views[1]))
    method.after_step(0)
    assert method.queue is not None
    assert int(method.queue.position) == N  # crop 0's keys alone


def test_what_is_published_and_recorded() -> None:
    method = make(BASE)
    loss = method.loss(batch_of(0))
    assert method.published["backbone"].shape == (N, 6)
    assert not method.published["backbone"].requires_grad
    method.finish_step()
    values = {k: reported(v) for k, v in method.recorded.items()}
    assert method.settings.keys() == {"method/momentum"}
    assert values.keys() == {
        "method/contrastive",
        "method/relational",
        "method/ceil",
        "method/positive_similarity",
        "method/target_entropy",
        "method/target_count",
        "method/target_top1",
        "method/online_std",
    }
    # The masked decomposition, near enough for zero_logit with 48 keys.
    total = 0.5 * (values["method/contrastive"] + values["method/relational"] + values["method/ceil"])
    assert total == pytest.approx(float(loss.detach()), rel=0.05)
    assert 1 <= values["method/target_count"] <= 48
    assert 1 / 48 <= values["method/target_top1"] <= 1
    assert 0 < values["method/online_std"] <= 1.01
    assert method.features(batch_of(0).global_views[0])["projector"].shape == (N, 6)


def test_split_batchnorm_is_in_the_momentum_backbone_only() -> None:
    method = make(replace(BASE, momentum_batchnorm="split"))
    split = [name for name, m in method.named_modules() if isinstance(m, SplitBatchNorm)]
    assert split == ["momentum_encoder.layers.0.1"]
    with pytest.raises(ValueError, match="divisible by 8, got 12"):
        method.loss(batch_of(0))


def test_momentum_encoder_starts_as_a_copy_without_gradient() -> None:
    method = make(BASE)
    pairs = zip(
        method.momentum_encoder.parameters(),
        [*method.backbone.parameters(), *method.projector.parameters()],
        strict=True,
    )
    for target, online in pairs:
        assert torch.equal(target, online)
        assert target.data_ptr() != online.data_ptr()
        assert not target.requires_grad
    assert not any("momentum" in n for g in method.parameter_groups() for n, _ in g["named"])


def test_warns_of_a_queue_that_spans_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sslzoo"):
        make(replace(BASE, queue_size=10 * N - 1)).loss(batch_of(0))
        assert not caplog.records
        make(replace(BASE, queue_size=10 * N)).loss(batch_of(0))
    assert "spans an epoch (120 keys)" in caplog.text


def test_a_single_image_without_queue_is_refused() -> None:
    method = make(CONFIGS["keys"], norm=False)
    with pytest.raises(ValueError, match="needs negatives"):
        method.loss(batch_of(0, slice(0, 1)))


# -- config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("method.temperature=0", "method.temperature: must be positive, got 0.0"),
        ("method.target_temperature=-0.1", "method.target_temperature: must be positive, got -0.1"),
        ("method.momentum=1.1", "method.momentum: must lie in [0, 1], got 1.1"),
        ("method.queue_size=0", "method.queue_size: must be positive, or null for no queue; got 0"),
        (
            "method.queue_size=null",
            "method.queue_size: must be a number unless method.batch_negatives=true: otherwise there are no negatives",
        ),
        ("method.loss.contrastive_weight=1.5", "method.loss.contrastive_weight: must lie in [0, 1], got 1.5"),
        (
            "method.batch_negatives=true",
            "method.loss.target_positive: must be masked with method.batch_negatives=true: "
            "zero_logit is only defined for the queue",
        ),
        (
            "method.loss={name: ressl, contrastive_weight: 0.5}",
            "method.loss.contrastive_weight: not a key of method.loss ressl, but of sce, three_terms",
        ),
        (
            "method.loss={name: three_terms, contrastive_weight: 0.5, relational_weight: -1, ceil_weight: 0}",
            "method.loss.relational_weight: must not be negative, got -1.0",
        ),
        (
            "method.loss.contrastive_weight_warmup={start: 2, epochs: 1}",
            "method.loss.contrastive_weight_warmup.start: must lie in [0, 1], got 2.0",
        ),
        (
            "method.target_temperature_warmup={start: 0, epochs: 1}",
            "method.target_temperature_warmup.start: must be positive, got 0.0",
        ),
        (
            "method.target_temperature_warmup={start: 1, epochs: 0}",
            "method.target_temperature_warmup.epochs: must be positive, got 0.0",
        ),
        (
            "method.momentum_batchnorm=split; trainer.sync_batchnorm=true",
            "method.momentum_batchnorm: must be same with trainer.sync_batchnorm=true, which cancels split",
        ),
        (
            "views.0.count=1",
            "views: must have at least two views, one of them global; got 1, 1 of them global",
        ),
        (
            "views.0.role=local",
            "views: must have at least two views, one of them global; got 2, 0 of them global",
        ),
        (
            "method.symmetric=false; method.crop_batching=joint",
            "method.crop_batching: must be per_crop with two views and method.symmetric=false, "
            "because each branch sees one view",
        ),
        (
            "method.pair_weighting=per_online_crop",
            "method.pair_weighting: must be flat unless method.symmetric=true with two global views and local views: "
            "otherwise all pairs have equal weights anyway",
        ),
        (
            "method.contrastive_weight=0.5",
            "method.contrastive_weight: renamed: use method.loss.contrastive_weight",
        ),
        ("method.ressl=true", "method.ressl: renamed: use method.loss=ressl"),
    ],
)
def test_refusals(overrides: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("sce_fashion_mnist", overrides.split("; "))
    assert said in str(caught.value)


def test_losses_of_a_recipe() -> None:
    """By the loss of two steps: ReSSL and the three terms differ from SCE as their weights say."""
    three = ThreeTermLoss(contrastive_weight=0.5, relational_weight=0.5, ceil_weight=0.5)
    losses = {
        name: float(make(replace(BASE, loss=loss)).loss(batch_of(0)).detach())
        for name, loss in {
            "masked": MASKED,
            "three": three,
            "ressl": ReSSLLoss(),
            "relational": replace(three, contrastive_weight=0.0, relational_weight=1.0, ceil_weight=0.0),
            "other": replace(three, ceil_weight=0.1),
        }.items()
    }
    assert losses["masked"] == losses["three"] != losses["other"]
    assert losses["ressl"] == losses["relational"]


def test_recipes_that_suit_the_method() -> None:
    load_recipe("sce_fashion_mnist", ["trainer.sync_batchnorm=true"])
    load_recipe(
        "sce_fashion_mnist", ["method.loss=ressl", "method.batch_negatives=true", "method.queue_size=null"]
    )
    more = "views=[{size: 20, scale: [0.2, 1], count: 2}, {size: 12, scale: [0.1, 0.2], role: local}]"
    load_recipe("sce_fashion_mnist", [more, "method.pair_weighting=per_online_crop"])
    load_recipe("sce_fashion_mnist", [more, "method.symmetric=false", "method.crop_batching=joint"])


def test_no_process_group_is_left_behind() -> None:
    assert not dist.is_initialized()


# -- recipes: epochs, global batch, peak rate, decay, queue, momentum, schedule, tau_m, BN, crops ------

ROWS = {
    "sce_in1k_100ep": (100, 4096, 9.6, 1e-6, 65536, 0.99, "cosine", 0.07, "same", 2),
    "sce_in1k": (200, 4096, 4.8, 1e-6, 65536, 0.99, "cosine", 0.07, "same", 2),
    "sce_in1k_300ep": (300, 4096, 4.8, 1e-6, 65536, 0.99, "cosine", 0.07, "same", 2),
    "sce_in1k_1000ep": (1000, 4096, 4.8, 1.5e-6, 65536, 0.99, "cosine", 0.07, "same", 2),
    "sce_in1k_multicrop": (200, 4096, 4.8, 1e-6, 65536, 0.99, "cosine", 0.07, "same", 6),
    "sce_cifar10": (200, 256, 0.06, 5e-4, 4096, 0.99, "constant", 0.05, "split", 2),
    "sce_stl10": (200, 256, 0.06, 5e-4, 16384, 0.996, "constant", 0.05, "split", 2),
    "sce_tiny_imagenet": (200, 256, 0.06, 5e-4, 16384, 0.996, "constant", 0.05, "split", 2),
    "sce_in100": (200, 512, 0.06, 1e-4, 65536, 0.999, "constant", 0.05, "shuffle", 2),
}


@pytest.mark.parametrize("name", ROWS)
def test_recipes_hold_the_published_numbers(name: str) -> None:
    r = load_recipe(name).recipe
    cfg = r.method
    assert isinstance(cfg, SCEConfig)
    plan = TrainingPlan(
        dataset_size=10**6, global_batch_size=r.data.global_batch_size, max_epochs=r.trainer["max_epochs"]
    )
    assert (
        plan.max_epochs,
        plan.global_batch_size,
        pytest.approx(plan.scaled_lr(r.optim)),
        r.optim.weight_decay,
        cfg.queue_size,
        cfg.momentum,
        cfg.momentum_schedule,
        cfg.target_temperature,
        cfg.momentum_batchnorm,
        sum(v.count for v in r.views),
    ) == ROWS[name]
    assert (cfg.temperature, cfg.loss) == (0.1, SCELoss(contrastive_weight=0.5))
    imagenet = name.startswith("sce_in1k")
    assert cfg.symmetric == imagenet == bool(cfg.predictor) == r.trainer.get("sync_batchnorm", False)
    decays_all = isinstance(r.optim, SGDConfig) and r.optim.decay_1d
    assert isinstance(r.optim, LARSConfig) if imagenet else decays_all
    assert r.optim.warmup_epochs == (10 if imagenet else 5)


def test_every_recipe_of_the_method_is_in_the_table() -> None:
    own = {name for name in recipes() if name.startswith("sce_")}
    assert own == {*ROWS, "sce_fashion_mnist", "sce_in1k_vit_s16"}
    assert isinstance(load_recipe("quickstart").recipe.method, SCEConfig)


@pytest.mark.parametrize("name", ["quickstart", "sce_cifar10", "sce_in1k"])
def test_recipes_build(name: str) -> None:
    r = load_recipe(name).recipe
    net, width = build_backbone(r.backbone)
    method = method_class("sce")(r.method, net, width)
    assert isinstance(method, SCE)
    assert method.queue is not None
    assert method.queue.features.shape == (r.method.queue_size, r.method.projector.widths[-1])  # type: ignore[attr-defined]
