"""MetAug's method: the two steps, many processes against one, resume, precision, colours, refusals, recipes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from sslzoo.batch import Batch
from sslzoo.distributed import all_reduce_mean
from sslzoo.nn.backbones import build_backbone, parameter_count
from sslzoo.nn.batchnorm import to_sync
from sslzoo.nn.measurements import reported
from sslzoo.optim.schedules import learning_rate
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import BackboneConfig, HeadConfig, Recipe, SGDConfig
from sslzoo.run.build import load_weights
from sslzoo.run.trainer import build_trainer
from sslzoo.testing.contract import small_recipe
from sslzoo.testing.course import train as observe
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.metaug.color import Constants, normalized, rgb_to_lab, rgb_to_ycbcr
from sslzoo_methods.metaug.config import (
    SGD,
    Adam,
    BankKeys,
    BatchKeys,
    Circle,
    ColorChannels,
    Crops,
    GeneratorConfig,
    MarginConfig,
    MetaConfig,
    MetAugConfig,
    SeparateTerms,
    UnifiedTerm,
)
from sslzoo_methods.metaug.encoders import ThreeViewBackbone
from sslzoo_methods.metaug.method import MetAug
from sslzoo_methods.metaug.objective import ENCODER

# Rates at which a step on tiny batch norms does not blow rounding up: ten times these, a change of the last bit of
# the images moves the second step by 5e-10.
OPTIM = SGDConfig(lr=0.01, lr_scaling="none", weight_decay=1e-3, warmup_epochs=0.0)
META = MetaConfig(virtual_lr=0.02, optimizer=SGD(lr=0.01, weight_decay=1e-3))
GENERATOR = GeneratorConfig(hidden=(6, 6))
MARGIN = MarginConfig(weight=0.3, positive_weight=0.5)
BASE = MetAugConfig(
    name="metaug",
    projector=HeadConfig(widths=(7, 5)),
    generator=GENERATOR,
    terms=SeparateTerms(generated_weight=0.5),
    margin=MARGIN,
    meta=META,
)
FIRST_ORDER = replace(META, order=1, optimizer=Adam(lr=0.01, weight_decay=1e-3))
BANK = replace(BASE, keys=BankKeys(negatives=6))
CONFIGS = {
    "second order": BASE,
    "first order": replace(BASE, meta=FIRST_ORDER, margin=replace(MARGIN, thresholds="small")),
    "projector": replace(
        BASE,
        meta=replace(META, virtual_params="projector"),
        generator=replace(GENERATOR, shared=True),
        margin=None,
    ),
    "unified": replace(
        BASE, terms=UnifiedTerm(), circle=Circle(m=0.25), margin=replace(MARGIN, detach_thresholds=True)
    ),
    "same view": replace(
        BASE, keys=BatchKeys(same_view_negatives=True), margin=replace(MARGIN, steps="generator")
    ),
    "three views": replace(BASE, views=Crops(count=3), ramp_epochs=1.0),
    "bank": BANK,
    "official": replace(
        BASE,
        views=ColorChannels(),
        projector=HeadConfig(widths=(7, 5), hidden_bias=True),
        keys=BankKeys(negatives=6, updates="official"),
        margin=replace(MARGIN, pairs="official"),
    ),
}
N = 6  # global batch
SIZE = 5 * N  # data set


def backbone(channels: int = 3) -> nn.Module:
    layers = [nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Softplus()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make(cfg: MetAugConfig, *, world: int = 1, dtype: torch.dtype = torch.float64) -> MetAug:
    torch.manual_seed(3)
    method = MetAug(cfg, backbone(), 4)
    plan = TrainingPlan(dataset_size=SIZE, global_batch_size=N, max_epochs=2, world_size=world)
    method.prepare(plan, OPTIM, 11)
    return method.to(dtype)


def batch_of(
    cfg: MetAugConfig, step: int, rows: slice = slice(None), dtype: torch.dtype = torch.float64
) -> Batch:
    """Rows of the global batch of a step; with crops, local ones too. A sample comes twice."""
    g = torch.Generator().manual_seed(100 + step)
    colors = isinstance(cfg.views, ColorChannels)
    crops = 1 if colors else cfg.views.count
    sizes = [4] * crops + [3] * (not colors)
    views = [torch.rand(N, 3, s, s, generator=g, dtype=torch.float64).to(dtype)[rows] for s in sizes]
    ids = torch.randint(SIZE, (N,), generator=g)
    ids[3] = ids[0]
    return Batch(tuple(views[:crops]), tuple(views[crops:]), ids[rows])


def train(
    method: MetAug, steps: range, rank: int = 0, world: int = 1, optimizers: Any = None
) -> list[dict[str, Tensor]]:
    """Steps as Lightning and DDP take them; losses and gradients of each."""
    encoder, generators = optimizers or method.configure_optimizers()
    b, seen = N // world, []
    for step in steps:
        batch = batch_of(method.cfg, step, slice(rank * b, rank * b + b))
        loss = method.loss(batch)
        encoder.zero_grad()
        loss.backward()
        got = {"loss": all_reduce_mean(loss.detach())}
        for name, p in method.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                p.grad = all_reduce_mean(p.grad)
                got[name] = p.grad.clone()
        for group in encoder.param_groups:
            group["lr"] = learning_rate(method.step, OPTIM, method.plan) * group["lr_factor"]
        encoder.step()
        before = [p.clone() for p in method.generators.parameters()]
        assert method.cfg.meta is not None
        method.meta_step(batch, generators, method.cfg.meta)
        moved = zip(method.generators.parameters(), before, strict=True)
        got |= {f"omega{i}": p.detach() - old for i, (p, old) in enumerate(moved)}
        method.finish_step()
        seen.append(got)
    return seen


# -- several processes --------------------------------------------------------------------------


def _rank(rank: int, world: int, cfg: MetAugConfig) -> Any:
    method = to_sync(make(cfg, world=world))
    assert isinstance(method, MetAug)
    return train(method, range(2), rank, world), dict(method.state_dict())


def test_the_generators_step_alike_on_two_processes() -> None:
    """Their steps too, which the contract's tests do not see, and a sample that both processes hold. Through
    synchronised batch norm and its second derivatives, in float64."""
    names = ("second order", "official")
    configs = [CONFIGS[name] for name in names]
    singles = [make(cfg) for cfg in configs]
    expected = [train(single, range(2)) for single in singles]
    for name, single, want, ranks in zip(
        names, singles, expected, zip(*run_ranks(2, _each, configs), strict=True), strict=True
    ):
        for seen, state in ranks:
            torch.testing.assert_close(seen, want, rtol=1e-9, atol=1e-11)
            assert state.keys() == single.state_dict().keys()
            for key, value in single.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-11, msg=f"{name}: {key}")


def _each(rank: int, world: int, configs: list[MetAugConfig]) -> list[Any]:
    return [_rank(rank, world, cfg) for cfg in configs]


def test_a_virtual_step_of_each_rank_is_another_thing() -> None:
    cfg = replace(BASE, meta=replace(META, sync_virtual_step=False))
    (_, together), (_, apart) = (run_ranks(2, _rank, c)[0] for c in (BASE, cfg))
    keys = [key for key in together if key.startswith("generators.") and key.endswith("weight")]
    assert any(not torch.equal(together[key], apart[key]) for key in keys)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*[r[1].values() for r in run_ranks(2, _rank, cfg)], strict=True)
        if a.ndim > 1
    )


# -- the bilevel step ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["second order", "projector", "unified", "same view", "three views", "bank"])
def test_meta_gradient_by_finite_differences(name: str) -> None:
    """Of the outer loss along a random direction of the generators, the virtual step recomputed each time."""
    cfg, meta = CONFIGS[name], CONFIGS[name].meta
    assert meta is not None
    cfg = replace(
        cfg,
        generator=replace(cfg.generator, hidden=(4, 4)),
        margin=cfg.margin and replace(cfg.margin, detach_thresholds=False),
        circle=cfg.circle and replace(cfg.circle, weights=False),
        ramp_epochs=0.0,
    )
    count = cfg.views.count
    method = make(cfg)
    for net in method.generators.nets:  # smooth, so that differences converge
        for i, layer in enumerate(net):  # type: ignore[arg-type]
            if isinstance(layer, nn.ReLU):
                net[i] = nn.Softplus()  # type: ignore[index]
    for i, layer in enumerate(method.projector):  # type: ignore[arg-type]
        if isinstance(layer, nn.ReLU):
            method.projector[i] = nn.Softplus()  # type: ignore[index]
    batch, trained = batch_of(cfg, 0), dict(method.network().named_parameters())
    if meta.virtual_params == "projector":
        trained = {k: p for k, p in trained.items() if k.startswith("projector.")}
    omega = {k: p.detach().clone() for k, p in method.generators.named_parameters()}

    def loss(theta: Mapping[str, Tensor], w: dict[str, Tensor], call: int) -> Tensor:
        z = functional_call(method.network(), dict(theta), (method._views(batch),))[1]
        made = functional_call(method.generators, w, (z[:count],))
        return method._objective(batch, z, made, call).loss

    def value(w: dict[str, Tensor]) -> Tensor:
        h = torch.autograd.grad(loss(trained, w, 1), list(trained.values()))
        moved = {k: p - meta.virtual_lr * g for (k, p), g in zip(trained.items(), h, strict=True)}
        return loss(moved, w, 2).detach()

    direction = {k: torch.randn_like(p) for k, p in omega.items()}
    eps = 1e-5
    ahead, behind = ({k: p + s * eps * direction[k] for k, p in omega.items()} for s in (1, -1))
    slope = (value(ahead) - value(behind)) / (2 * eps)

    steps: dict[int, float] = {}
    for order in (1, 2):
        twin = copy.deepcopy(method)
        before = [p.clone() for p in twin.generators.parameters()]
        sgd = torch.optim.SGD(twin.generators.parameters(), lr=1.0)
        twin.meta_step(batch, sgd, replace(meta, order=order))
        moved = zip(before, twin.generators.parameters(), direction.values(), strict=True)
        steps[order] = float(sum(((a - b) * d).sum() for a, b, d in moved))
    assert steps[2] == pytest.approx(float(slope), rel=2e-6, abs=1e-9)
    assert abs(steps[1] - float(slope)) > 1e-4 * abs(float(slope))


@pytest.mark.parametrize("name", CONFIGS)
def test_meta_step_leaves_the_encoder_and_moves_statistics_once(name: str) -> None:
    method = make(CONFIGS[name])
    batch = batch_of(method.cfg, 0)
    counters = [k for k in method.state_dict() if k.startswith("generators") and "num_batches" in k]
    method.loss(batch).backward()
    state = {k: v.clone() for k, v in method.state_dict().items()}
    assert all(int(state[k]) == 0 for k in counters)
    grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    assert method.cfg.meta is not None
    method.meta_step(batch, method.configure_optimizers()[1], method.cfg.meta)
    after = method.state_dict()
    for key, value in state.items():
        if not key.startswith(("generators.", "banks.")):
            assert torch.equal(after[key], value), key
    per_pass = method.cfg.views.count if method.cfg.generator.shared else 1
    assert all(int(after[k]) == per_pass for k in counters)
    assert any(
        not torch.equal(after[k], state[k]) for k in after if k.startswith("generators") and "weight" in k
    )
    now = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert now.keys() == grads.keys()
    assert all(torch.equal(now[n], g) for n, g in grads.items() if now[n] is not None)
    banks = [k for k in state if k.startswith("banks.")]
    assert all(torch.equal(after[k], state[k]) == (name != "official") for k in banks)


class Products(TorchDispatchMode):
    """Counts the matrix products of a shape."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape, self.count = (rows, columns), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.count += tuple(out.shape[-2:]) == self.shape
        return out


def test_all_terms_come_from_one_product() -> None:
    method = make(replace(BASE, views=Crops(count=3)))
    z = [torch.nn.functional.normalize(torch.randn(N, 5, dtype=torch.float64), dim=1) for _ in range(6)]
    with Products(2 * 3 * N, 3 * N) as products, torch.no_grad():
        method._objective(batch_of(method.cfg, 0), z[:3], z[3:], ENCODER)
    assert products.count == 1


def test_the_ramp_starts_at_zero_and_the_margin_says_where() -> None:
    method = make(CONFIGS["three views"])
    batch = batch_of(method.cfg, 0)
    z = method.network()(method._views(batch))[1]
    made = method.generators(z[:3])
    starts = method._objective(batch, z, made, ENCODER)
    assert torch.equal(starts.loss, starts.terms[0])
    method.optimizer_steps = 5
    full = method._objective(batch, z, made, ENCODER)
    assert full.regulariser is not None
    plain = full.terms[0] + 0.5 * full.terms[1:].sum()
    torch.testing.assert_close(full.loss, plain + 0.3 * full.regulariser.value)
    for margin, weights in ((replace(MARGIN, steps="generator"), (0, 0.3, 0.3)), (None, (0, 0, 0))):
        method.cfg = replace(method.cfg, margin=margin)
        for call, weight in enumerate(weights):
            got = method._objective(batch, z, made, call)
            torch.testing.assert_close(got.loss, plain + weight * full.regulariser.value)


# -- Lightning ----------------------------------------------------------------------------------


def test_generators_take_no_gradient_that_is_not_finite(tmp_path: Path) -> None:
    """Without a loss scaler: the run ends, the encoder is lost, the generators and their optimiser are not."""
    overrides = ["method.projector={widths: [16, 8]}", "method.generator.hidden=[16, 16]"]
    recipe = small_recipe("metaug", overrides=overrides)
    course = observe(recipe, tmp_path, steps=4, spoilt=(2, 0))
    assert course.diverged
    state = course.states[-1]
    assert not all(value.isfinite().all() for name, value in state.items() if name.startswith("projector."))
    kept = [name for name in state if name.startswith(("generators.", "optimizer.1."))]
    assert kept and all(state[name].isfinite().all() for name in kept)


class Batches(torch.utils.data.Dataset[Any]):
    def __init__(self, cfg: MetAugConfig, steps: int) -> None:
        self.cfg, self.steps = cfg, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Batch:
        return batch_of(self.cfg, i, dtype=torch.float32)


def fit(cfg: MetAugConfig, folder: Path, precision: str, steps: int = 2) -> MetAug:
    method = make(cfg, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(Batches(cfg, steps), batch_size=None)
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "precision": precision,
        "limit_val_batches": 0,
    }
    build_trainer(options, run_dir=folder, callbacks=[]).fit(method, loader)
    assert method.optimizer_steps == steps
    assert method.trainer.global_step == steps
    return method


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative to the expected norm."""
    a, b = (torch.cat([x.flatten() for x in tensors]) for tensors in (got, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_finite_and_close(tmp_path: Path, autocast: bool) -> None:
    """The first step's loss, and where it takes the encoder. Later losses are of other weights."""
    cfg = replace(BASE, meta=replace(META, autocast=autocast))
    exact, half = fit(cfg, tmp_path, "32-true", steps=1), fit(cfg, tmp_path, "bf16-mixed", steps=1)
    for name in ("train/loss", "method/contrast"):
        assert float(half.recorded[name]) != float(exact.recorded[name])
        assert float(half.recorded[name]) == pytest.approx(float(exact.recorded[name]), rel=1e-2)
    start = dict(make(cfg, dtype=torch.float32).network().named_parameters())
    moves = [[(p - start[n]).detach() for n, p in m.network().named_parameters()] for m in (half, exact)]
    assert difference(*moves) < 0.1
    longer = fit(cfg, tmp_path, "bf16-mixed")
    for name, p in longer.named_parameters():
        assert p.isfinite().all() and p.dtype == torch.float32, name


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_reaches_the_bilevel_step_only_if_asked(autocast: bool) -> None:
    meta, after = replace(META, autocast=autocast), []
    for enabled in (False, True):
        method = make(BASE, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            method.meta_step(batch_of(BASE, 0, dtype=torch.float32), method.configure_optimizers()[1], meta)
        after.append([p.clone() for p in method.generators.parameters()])
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in after[-1])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True)) is not autocast


def test_weights_alone_start_with_their_own_banks(tmp_path: Path) -> None:
    trained, fresh = make(BANK), make(BANK)
    train(trained, range(2))
    torch.save({"state_dict": trained.state_dict(), "optimizer_steps": 2}, tmp_path / "a.ckpt")
    own = fresh.state_dict()["banks.rows"].clone()
    load_weights(fresh, tmp_path / "a.ckpt")
    taken = fresh.state_dict()
    assert torch.equal(taken["banks.rows"], own)
    for name in ("projector.0.weight", next(n for n in taken if n.startswith("generators."))):
        assert torch.equal(taken[name], trained.state_dict()[name]), name


def test_the_generators_gradients_are_averaged_in_one_collective() -> None:
    single = make(BASE)
    train(single, range(1))
    width = sum(p.numel() for p in single.generators.parameters())
    ranks = run_ranks(2, _meta_scalars)
    for norm, _, sent in ranks:
        assert norm == pytest.approx(float(single.recorded["method/generator_gradient"]), rel=1e-8)
        assert sent.count(width) == 1
    shares = [share for _, share, _ in ranks]
    assert shares[0] != shares[1]
    expected = float(single.recorded["method/second_order_share"])
    assert sum(shares) / 2 == pytest.approx(expected, rel=1e-8)


def _meta_scalars(rank: int, world: int) -> tuple[float, float, list[int]]:
    method = to_sync(make(BASE, world=world))
    assert isinstance(method, MetAug)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
        train(method, range(1), rank, world)
    sent = [call.args[0].numel() for call in collective.call_args_list]
    seen = method.recorded
    return float(seen["method/generator_gradient"]), float(seen["method/second_order_share"]), sent


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_the_generators_step_when_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, due: list[int]
) -> None:
    taken, meta_step = [], MetAug.meta_step

    def noted(method: MetAug, *args: Any) -> None:
        taken.append(method.step)
        meta_step(method, *args)

    monkeypatch.setattr(MetAug, "meta_step", noted)
    start = make(BASE, dtype=torch.float32).generators.state_dict()
    cfg = replace(BASE, meta=every and replace(META, every_steps=every))
    after = fit(cfg, tmp_path, "32-true", steps=5).generators.state_dict()
    assert taken == due
    assert any(not torch.equal(after[k], v) for k, v in start.items()) is bool(due)


def test_generators_stay_out_of_the_encoders_optimiser() -> None:
    method = make(BASE)
    names = [n for group in method.parameter_groups() for n, _ in group["named"]]
    assert names
    assert not any("generators" in n for n in names)
    encoder, generators = method.configure_optimizers()
    assert sum(len(g["params"]) for g in encoder.param_groups) == len(names)
    assert sum(len(g["params"]) for g in generators.param_groups) == len(list(method.generators.parameters()))


def test_what_is_published_and_recorded() -> None:
    for name, widths in (("second order", (4, 5, 9)), ("official", (12, 15, 27))):
        method = make(CONFIGS[name])
        batch = batch_of(method.cfg, 0)
        method.loss(batch)
        method.meta_step(batch, method.configure_optimizers()[1], META)
        plain = method.eval().features(batch.global_views[0])
        for features in (method.published, plain):
            got = [features[k].shape for k in ("backbone", "projector", "backbone+generated")]
            assert got == [(N, width) for width in widths]
        assert not any(v.requires_grad for v in method.published.values())
        assert {z.shape for z in method.contrasted(batch).pairs["global"]} == {(N, 5)}
        values = {k: reported(v) for k, v in method.recorded.items()}
        assert -1 <= values["method/generated_cosine"] <= 1
        assert values["method/second_order_share"] > 0
        assert values["method/sigma_pos"] <= values["method/sigma_neg"]
        assert 0 < values["method/online_std"] <= 1.01


# -- colours and encoders -----------------------------------------------------------------------


def test_known_colours() -> None:
    colours = torch.tensor(
        [[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [0.02, 0.02, 0.02]]
    )
    lab = torch.tensor(
        [
            [100.0, 0, 0],
            [0, 0, 0],
            [53.2406, 80.0923, 67.2028],
            [87.7351, -86.1830, 83.1796],
            [32.2957, 79.1856, -107.8573],
            [53.3890, 0, 0],
            [1.3983, 0, 0],
        ]
    )
    got = rgb_to_lab(colours[:, :, None, None].double(), Constants())[:, :, 0, 0].float()
    torch.testing.assert_close(got, lab, rtol=0, atol=0.02)
    ycbcr = rgb_to_ycbcr(colours[:3, :, None, None], Constants())[:, :, 0, 0]
    expected = torch.tensor([[235.0, 128, 128], [16, 128, 128], [81.481, 90.203, 240]])
    torch.testing.assert_close(ycbcr, expected, rtol=0, atol=1e-3)
    middle = normalized(torch.full((1, 3, 1, 1), 0.466), "lab", Constants())[0, :, 0, 0]
    assert middle[0].abs() < 0.01
    torch.testing.assert_close(
        middle[1:], torch.tensor([-6.025 / 92.208, 6.6895 / 101.1675]), atol=1e-3, rtol=0
    )


def test_three_encoders_see_their_channels() -> None:
    torch.manual_seed(0)
    three = ThreeViewBackbone(backbone(), "lab").eval()
    assert [part[0].in_channels for part in three.parts] == [1, 2, 3]  # type: ignore[index]
    rgb = torch.rand(2, 3, 4, 4)
    x = normalized(rgb, "lab", Constants())
    whole = torch.cat([three.parts[0](x[:, :1]), three.parts[1](x[:, 1:]), three.parts[2](x)], dim=1)
    torch.testing.assert_close(three(rgb), whole)
    with pytest.raises(ValueError, match="begins with a convolution"):
        ThreeViewBackbone(nn.Flatten(), "lab")


OFFICIAL = "sslzoo_methods.metaug.alexnet:HalfAlexNet"


def test_the_official_encoders_have_the_official_size() -> None:
    r = load_recipe("metaug_official_cifar10").recipe
    with torch.device("meta"):
        net, width = build_backbone(r.backbone)
        assert isinstance(r.method, MetAugConfig)
        method = MetAug(r.method, net, width)
    encoder = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert round(encoder / 1e6, 1) == 44.5
    assert round(parameter_count(method.generators) / 3e6, 2) == 4.73
    with pytest.raises(ValueError, match="has its own stem"):
        build_backbone(BackboneConfig(name=OFFICIAL, stem="small"))


# -- config -------------------------------------------------------------------------------------

NOTHING_GENERATED = ["method.margin=null", "method.terms.generated_weight=0", "method.ramp_epochs=0"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.aug_weight=1"], "aug_weight: renamed: use method.terms.generated_weight"),
        (["method.meta_every=0"], "meta_every: renamed: use method.meta.every_steps"),
        (["method.generator_lr=9"], "generator_lr: renamed: use method.meta.optimizer.lr"),
        (["method.gamma=0"], "method.gamma: must be positive"),
        (["method.views.count=1"], "method.views.count: must be at least 2"),
        (["method.views.count=3"], "views: must have 3 global view(s) for method.views crops with count=3, got 2"),
        (["method.views={name: crops, space: lab}"], "method.views.space: not a key of method.views crops"),
        (["method.views={name: color, count: 3}"], "method.views.count: not a key of method.views color"),
        (["method.views=color"], "views: must have 1 global view(s) for method.views color, got 2"),
        (["method.views=color", "views.0.count=1"], "data.mean: must be [0, 0, 0]"),
        (["method.views=color", "views.0.count=1", "views.0.role=local"], "views: must have 1 global view(s)"),
        (["method.keys.negatives=7"], "method.keys.negatives: not a key of method.keys batch, but of bank"),
        (["method.keys={name: bank, momentum: 1}"], "method.keys.momentum: must lie in [0, 1)"),
        (["method.keys={name: bank, same_view_negatives: true}"], "not a key of method.keys bank, but of batch"),
        (["method.keys=bank", "method.terms=unified"], "method.terms: must be separate with method.keys bank"),
        (["method.terms={name: unified, generated_weight: 1}"], "not a key of method.terms unified, but of separ"),
        (["method.terms.generated_weight=-1"], "method.terms.generated_weight: must not be negative"),
        (["method.circle={m: 2}"], "method.circle.m: must lie in [0, 1]"),
        (["method.circle={m: 0.2, weights: false, shift: false}"], "method.circle.weights: and shift are both false"),
        (["method.margin.thresholds=huge"], "method.margin.thresholds: must be one of large, small, mean"),
        (["method.margin.weight=0"], "method.margin.weight: must be positive"),
        (["method.margin.pairs=official"], "method.margin.pairs: official is only defined for method.keys bank"),
        (["method.margin.steps=generator", "method.meta=null"], "method.margin.steps: must be both with method.meta"),
        (["method.generator.hidden=[0]"], "method.generator.hidden: must be positive"),
        (["method.meta.order=3"], "method.meta.order: must be one of 1, 2; got 3"),
        (["method.meta.every_steps=0"], "method.meta.every_steps: must be positive"),
        (["method.meta.optimizer.momentum=0.5"], "momentum: not a key of method.meta.optimizer adam, but of sgd"),
        (["method.meta.optimizer.lr=0"], "method.meta.optimizer.lr: must be positive"),
        (NOTHING_GENERATED, "method.meta: must be null"),
        ([*NOTHING_GENERATED[:2], "method.meta=null"], "method.ramp_epochs: must be 0"),
        (["trainer.accumulate_grad_batches=2"], "accumulate_grad_batches: must be 1"),
        (["trainer.gradient_clip_val=1"], "gradient_clip_val: must be left out"),
        (["trainer.precision=bf16-true"], "trainer.precision: must not be bf16-true"),
        (["method.meta.autocast=true"], "method.meta.autocast: must be false with trainer.precision=32-true"),
        (["method.meta.autocast=true", "trainer.precision=16"], "must be false with trainer.precision=16-mixed"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_say(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("metaug_fashion_mnist", overrides)


def test_what_a_recipe_may_say() -> None:
    for overrides in (
        [*NOTHING_GENERATED, "method.meta=null"],
        ["method.meta.autocast=true", "trainer.precision=bf16"],
        ["method.terms=unified", "method.margin=null", "method.ramp_epochs=0"],
    ):
        load_recipe("metaug_fashion_mnist", overrides)
    r = load_recipe("metaug_official_cifar10").recipe
    with pytest.raises(ValueError, match="views must all be global"):
        replace(r, views=(*r.views, replace(r.views[0], role="local")))


def test_one_sample_without_banks_is_refused() -> None:
    z = [torch.ones(1, 5)] * 2
    with pytest.raises(ValueError, match="has no negatives"):
        make(BASE)._objective(Batch((), (), torch.zeros(1)), z, z, ENCODER)


# -- recipes: data, backbone, batch, epochs, peak rate, decay, views, keys --------------------------

ROWS = {
    "metaug_cifar10": ("resnet18", 256, 300, 0.03, 5e-4, "crops", "batch", 1e-5),
    "metaug_stl10": ("resnet18", 256, 300, 0.03, 5e-4, "crops", "batch", 1e-5),
    "metaug_in100": ("resnet50", 256, 200, 0.03, 1e-4, "crops", "batch", 1e-5),
    "metaug_in1k": ("resnet50", 1024, 200, 1.2, 1e-6, "crops", "batch", 1e-5),
    "metaug_official_cifar10": (OFFICIAL, 64, 300, 0.03, 1e-4, "color", "bank", 1e-5),
    "metaug_fashion_mnist": ("conv5", 128, 12, 2e-3, 1e-4, "crops", "batch", 0.1),
}


def plan_of(r: Recipe) -> TrainingPlan:
    batch, epochs = r.data.global_batch_size, r.trainer["max_epochs"]
    return TrainingPlan(dataset_size=10**6, global_batch_size=batch, max_epochs=epochs)


@pytest.mark.parametrize("name", ROWS)
def test_recipes_hold_the_card_s_numbers(name: str) -> None:
    r = load_recipe(name).recipe
    cfg, plan = r.method, plan_of(r)
    assert isinstance(cfg, MetAugConfig)
    rate = pytest.approx(plan.scaled_lr(r.optim))
    row = (r.backbone.name, plan.global_batch_size, plan.max_epochs, rate, r.optim.weight_decay)
    assert isinstance(cfg.terms, SeparateTerms)
    assert (*row, cfg.views.name, cfg.keys.name, cfg.terms.generated_weight) == ROWS[name]
    assert (cfg.gamma, cfg.scale, cfg.circle) == (16, 16, None)
    assert cfg.margin is not None
    assert cfg.margin.detach_thresholds == (cfg.margin.weight > 1e-3)


def test_every_recipe_of_the_method_is_in_the_table() -> None:
    assert {name for name in recipes() if name.startswith("metaug_")} == set(ROWS)


def test_official_schedule() -> None:
    """0.03, and a tenth of it after epochs 120, 160 and 200."""
    r = load_recipe("metaug_official_cifar10").recipe
    plan = plan_of(r)
    at = [
        learning_rate(epoch * plan.steps_per_epoch, r.optim, plan) for epoch in (0, 119, 120, 160, 200, 299)
    ]
    assert at == pytest.approx([0.03, 0.03, 3e-3, 3e-4, 3e-5, 3e-5])
