"""Margin analysis: its scalars, that it leaves training alone, and the pictures of the command."""

from __future__ import annotations

import csv
import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.callbacks.watch import Watch
from sslzoo.cli.main import main
from sslzoo.data.sources import FakeSource
from sslzoo.method import SSLMethod
from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import MethodConfig
from sslzoo.run.build import build_experiment
from sslzoo.run.trainer import build_trainer
from sslzoo.testing.kills import digest
from sslzoo.testing.ranks import run_ranks
from sslzoo_methods.margin.analysis.config import MarginsConfig
from sslzoo_methods.margin.analysis.margins import Margins
from sslzoo_methods.margin.analysis.observe import Seen, margin_statistics, observe, per_sample
from sslzoo_methods.margin.analysis.report import _moments
from sslzoo_methods.margin.analysis.words import WORDS
from sslzoo_methods.margin.factors import Margin
from sslzoo_methods.margin.method import MarginContrast
from sslzoo_methods.sce.method import SCE

# -- the scalars ------------------------------------------------------------------------------


def embeddings(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(n, 6, dtype=torch.float64, generator=generator)
    return u, u + 0.4 * torch.randn(n, 6, dtype=torch.float64, generator=generator)


def test_gradient_lengths_and_factors_against_autograd() -> None:
    """Lengths from the closed form equal those of the gradient of each sample's own loss."""
    u, v = (normalize(x) for x in embeddings())
    u.requires_grad_()
    tau, m1, m2 = 0.3, 0.2, 0.1
    cosines = u @ v.T
    positive = torch.cos(torch.arccos(cosines.diagonal()) + m1) - m2
    logits = cosines.diagonal_scatter(positive) / tau
    loss = (logits.logsumexp(1) - positive / tau).sum()
    (gradient,) = torch.autograd.grad(loss, u)
    u = u.detach()
    tangential = gradient - (gradient * u).sum(1, keepdim=True) * u
    seen = observe(u, v, temperature=tau)
    margin = Margin(angular=m1, subtractive=m2)
    table = per_sample(seen, margin, temperature=tau)
    torch.testing.assert_close(table["total_gradient"], tangential.norm(dim=1))
    share = logits.detach().softmax(1)
    torch.testing.assert_close(table["p"], share.diagonal())
    pull = (1 - share.diagonal()) * torch.sin(seen.theta + m1)
    torch.testing.assert_close(table["positive_gradient"], pull.abs() / tau)
    stats = margin_statistics(seen, margin, temperature=tau)
    angles = torch.arccos((u @ v.T).clamp(-1, 1))
    pushes = share * angles.sin()
    push = pushes.sum() - pushes.diagonal().sum()
    assert stats["pull_to_push"] == pytest.approx(float(pull.sum() / push), rel=1e-9)
    off = ~torch.eye(24, dtype=torch.bool)
    assert stats["negative_cosine_mean"] == pytest.approx(float((u @ v.T)[off].mean()), rel=1e-9)
    assert stats["negative_cosine_max"] == pytest.approx(float((u @ v.T)[off].max()), rel=1e-9)
    spread = torch.exp(-2 * torch.cdist(u, v).square())[off].mean().log()
    assert stats["uniformity"] == pytest.approx(float(spread), rel=1e-6)
    alignment = (u - v).square().sum(1).mean()
    assert stats["alignment"] == pytest.approx(float(alignment), rel=1e-9)


def test_log_budget_adds_up() -> None:
    u, v = embeddings()
    seen = observe(u, v, temperature=0.2)
    stats = margin_statistics(seen, Margin(angular=0.2, subtractive=0.1), temperature=0.2)
    table = per_sample(seen, Margin(angular=0.2, subtractive=0.1), temperature=0.2)
    total = (table["logit_factor"] * table["slope_factor"]).log().mean()
    budget = stats["log_emphasis"] + stats["log_angle"] + stats["log_logit"]
    assert stats["without_log"] == 0 and budget == pytest.approx(float(total), rel=1e-9)


def test_repelled_and_collapsed_samples_are_counted_apart() -> None:
    u, v = embeddings()
    v[0], v[1] = -u[0] + 0.01 * v[0], u[1]
    stats = margin_statistics(
        observe(u, v, temperature=0.2), Margin(angular=0.3, subtractive=0.0), temperature=0.2
    )
    assert stats["without_log"] == 2 and stats["beyond_pi"] == pytest.approx(1 / 24)
    assert all(torch.isfinite(torch.tensor(value)) for value in stats.values())


def part(rank: int, world: int) -> list[Tensor]:
    n = 24 // world
    u, v = (x[rank * n : (rank + 1) * n] for x in embeddings())
    return list(observe(u, v, temperature=0.2))


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_sees_the_whole_batch(world: int) -> None:
    for columns in run_ranks(world, part):
        torch.testing.assert_close(columns, part(0, 1))


# -- training is left alone ---------------------------------------------------------------------


class Strange(SSLMethod[MethodConfig]):
    """Somebody's contrastive method: another head, dropout, no temperature."""

    Config = MethodConfig

    def __init__(self, cfg: MethodConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(feature_dim, 8), nn.BatchNorm1d(8))

    def contrasted(self, batch: Batch) -> Contrast:
        return Contrast.of_views(batch, lambda x: self.head(self.backbone(x)))

    def loss(self, batch: Batch) -> Tensor:
        h = [self.backbone(view) for view in batch.global_views]
        self.publish(backbone=h[0])
        a, b = (F.normalize(self.head(x), dim=1) for x in h)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


SMALL = (
    "views=[{size: 8, scale: [0.3, 1.0], count: 2}]",
    "data.global_batch_size=16",
    "optim={name: sgd, lr: 0.1, lr_scaling: none, weight_decay: 0.0, warmup_epochs: 0}",
    "trainer={max_epochs: 2, accelerator: cpu, devices: 1}",
)
STRANGE = "strange"


def asking(*margins: tuple[float, float], **options: Any) -> Margins:
    """The analysis, of 10 degrees where nothing else is said."""
    return Margins(MarginsConfig(name="margins", margins=margins or ((10.0, 0.0),), **options))


def look(method: SSLMethod[Any], batch: Batch, **options: Any) -> Seen:
    return asking(**options).observe(method, batch)


def train(name: str, folder: Path, watching: bool, epochs: int = 2) -> tuple[str, Watch | None]:
    """Four steps an epoch on generated images, with batch norm and, of the stranger's, dropout. Returns a
    digest of weights, state and the random numbers that come next."""
    recipe = load_recipe(f"{'margin' if name == STRANGE else name}_fashion_mnist", SMALL).recipe
    experiment = build_experiment(recipe, source=FakeSource(64, 1, 8, 4))
    method, data = experiment.method, experiment.data
    if name == STRANGE:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12))
        method = Strange(MethodConfig(name=name), encoder, 12)
        method.prepare(experiment.plan, recipe.optim, 0)
    torch.manual_seed(1)
    given = 0.3 if name == STRANGE else None
    analysis = Watch(asking((10.0, 0.0), (0.0, 0.1), every_steps=3, temperature=given)) if watching else None
    callbacks: list[Callback] = [StepSeeding()]
    callbacks += [] if analysis is None else [analysis]
    options = {**recipe.trainer, "limit_val_batches": 0, "max_epochs": epochs}
    trainer = build_trainer(options, run_dir=folder, callbacks=[*callbacks, Meter(folder, every_steps=2)])
    trainer.fit(method, datamodule=data)
    assert method.optimizer_steps == 4 * epochs
    return digest({"state": dict(method.state_dict()), "random": torch.get_rng_state()}), analysis


METHODS = sorted(name.removesuffix("_fashion_mnist") for name in recipes() if name.endswith("_fashion_mnist"))


@pytest.mark.parametrize("name", [*METHODS, STRANGE])
def test_training_is_bit_identical_with_and_without(name: str, tmp_path: Path) -> None:
    plain, _ = train(name, tmp_path / "a", watching=False)
    watched, analysis = train(name, tmp_path / "b", watching=True)
    assert watched == plain
    assert analysis is not None and [record["step"] for record in analysis.history] == [0, 3, 6]
    for record in analysis.history:
        assert sum(record["histogram"]) == 16 and list(record["margins"]) == [
            "m1=10deg,m2=0",
            "m1=0deg,m2=0.1",
        ]
    assert "margins/theta_mean" in (tmp_path / "b" / "metrics.csv").read_text()


@pytest.mark.parametrize("margin", ["[.nan, 0.0]", "[200.0, 0.0]", "[10.0, .inf]"])
def test_a_recipe_refuses_margins_that_are_none(margin: str) -> None:
    with pytest.raises(RecipeError, match=r"analyses\.0\.margins.*: must be (pairs|finite)"):
        load_recipe("simclr_fashion_mnist", [f"analyses=[{{name: margins, margins: [{margin}]}}]"])


# -- what is compared -----------------------------------------------------------------------------


def built(name: str, *overrides: str) -> tuple[SSLMethod[Any], Batch]:
    """A method in training mode, and a batch of eight images with two local crops."""
    recipe = load_recipe(name, ["data.global_batch_size=8", *overrides]).recipe
    channels, size = len(recipe.data.mean), recipe.views[0].size
    method = build_experiment(recipe, source=FakeSource(64, channels, size, 4)).method.train()
    draw = torch.Generator().manual_seed(0)
    crops = tuple(torch.rand(8, channels, size, size, generator=draw) for _ in range(4))
    count = sum(view.count for view in recipe.views)
    return method, Batch(crops[:count], crops[2:] if count == 2 else (), torch.arange(8))


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("sce", 0.1), ("mmcl", 1.0), ("sogclr", 0.2), ("metaug", 0.125), ("simclr", 0.2), ("margin", 0.2)],
)
def test_every_method_of_the_zoo_has_a_temperature(name: str, temperature: float) -> None:
    method, batch = built(f"{name}_fashion_mnist")
    assert look(method, batch).temperature == pytest.approx(temperature)
    assert look(method, batch, temperature=0.3).temperature == 0.3


@pytest.mark.parametrize(
    "without", ["method.kernel=linear", "method.kernel.sigma_schedule={name: step, milestones: [5]}"]
)
def test_where_the_method_has_no_temperature_one_must_be_given(without: str) -> None:
    method, batch = built("mmcl_fashion_mnist", without)
    with pytest.raises(ValueError, match=r"mmcl has no temperature.* such as temperature: 0.2"):
        look(method, batch)
    assert look(method, batch, temperature=0.2).temperature == 0.2


@pytest.mark.parametrize("base", ["mocov3", "byol"])
def test_anchors_are_predictions_and_positives_the_momentum_encoders(base: str) -> None:
    method, batch = built(f"margin_{base}_cifar10", "views=[{size: 16, scale: [0.3, 1.0], count: 2}]")
    assert isinstance(method, MarginContrast) and method.target is not None
    with torch.no_grad():
        anchors, positives = method.contrasted(batch).pairs["global"]
        wanted = method.predictor(method.projector(method.backbone(batch.global_views[0])))
        torch.testing.assert_close(anchors, wanted)
        torch.testing.assert_close(positives, method.target(batch.global_views[1]))
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    seen = look(method, batch).by_kind["global"]
    torch.testing.assert_close(
        seen.cosine, (normalize(anchors) * normalize(positives)).sum(1), atol=1e-5, rtol=1e-5
    )
    for name, buffer in method.named_buffers():
        assert torch.equal(buffer, before[name]), name


def note(seen: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_sce_anchors_are_the_online_branchs_views(symmetric: bool) -> None:
    overrides = ["backbone={name: conv5}", f"method.symmetric={str(symmetric).lower()}"]
    method, batch = built("sce_cifar10", *overrides)
    assert isinstance(method, SCE)
    online: list[Tensor] = []
    momentum: list[Tensor] = []
    for module, seen in ((method.backbone, online), (method.momentum_encoder.layers[0], momentum)):
        module.register_forward_pre_hook(partial(note, seen))
    batch = batch._replace(local_views=())
    method.loss(batch)
    trained = [views.copy() for views in (online, momentum)]
    online.clear()
    momentum.clear()
    with torch.no_grad():
        assert set(method.contrasted(batch).pairs) == {"global"}
    for looked, used in zip((online, momentum), trained, strict=True):
        assert any(looked[0].equal(view) for view in used)
    assert not symmetric or len(trained[0]) == 2
    assert not online[0].equal(momentum[0])


def test_local_crops_are_reported_apart() -> None:
    method, batch = built("simclr_fashion_mnist")
    analysis = asking()
    found = analysis.describe([analysis.observe(method, batch)])
    with torch.no_grad():
        h = [method.backbone(view) for view in (batch.local_views[0], batch.global_views[1])]
        a, b = (normalize(method.projector(x)) for x in h)  # type: ignore[operator]
    angle = torch.rad2deg(torch.arccos((a * b).sum(1))).mean()
    assert found["local"]["margins"]["m1=10deg,m2=0"]["theta_mean"] == pytest.approx(float(angle), rel=1e-3)
    assert (
        found["margins"]["m1=10deg,m2=0"]["theta_mean"]
        != found["local"]["margins"]["m1=10deg,m2=0"]["theta_mean"]
    )
    assert sum(found["local"]["histogram"]) == 8
    logged = analysis.metrics(found)
    assert logged["margins/theta_mean/local"] != logged["margins/theta_mean"]


def test_three_encoders_of_one_crop_are_compared_with_one_another() -> None:
    method, batch = built("metaug_official_cifar10")
    found = look(method, batch).by_kind
    assert list(found) == ["global"] and len(found["global"].theta) == 8


def test_the_history_is_in_checkpoints(tmp_path: Path) -> None:
    _, analysis = train("margin", tmp_path, watching=True)
    assert analysis is not None
    torch.save(analysis.state_dict(), tmp_path / "x.ckpt")
    other = Watch(asking())
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True))
    assert other.history == analysis.history


def test_the_history_is_drawn_while_it_trains(tmp_path: Path) -> None:
    _, watch = train("margin", tmp_path, watching=True)
    assert watch is not None
    earlier = watch.history[0] | {"temperature": 0.5}  # before the recipe was changed
    drawn = watch.analysis.draw([earlier, *watch.history])
    assert tuple(drawn) == watch.analysis.drawings
    plot, caption = drawn["angles_over_training"]
    assert isinstance(plot, Figure) and "one column per snapshot" in caption
    assert [label.get_text() for label in plot.axes[0].get_xticklabels()] == ["0", "3", "6"]
    assert watch.analysis.draw([]) == {}


# -- the command --------------------------------------------------------------------------------

PICTURES = (
    "angles",
    "angles_over_training",
    "slope_factor",
    "probability_and_logit_factor",
    "factor_surface",
    "positive_gradient",
    "effects_by_epoch",
)


def save_checkpoint(path: Path, history: list[dict[str, Any]], step: int, scale: float = 1.0) -> None:
    recipe = load_recipe("margin_fashion_mnist").recipe
    method = build_experiment(recipe).method
    content = {
        "state_dict": {k: scale * v for k, v in method.state_dict().items()}
        | {"probe.weight": torch.zeros(2)},
        "optimizer_steps": step,
        "epoch": step // 46,
        "callbacks": {Watch(asking()).state_key: {"history": history, "last_step": 0}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def test_analyze_writes_scalars_table_pictures_and_page(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(
        load_recipe("margin_fashion_mnist", ["data.global_batch_size=256"]).to_yaml()
    )
    for step in (46, 92):
        save_checkpoint(tmp_path / "checkpoints" / f"step={step:09d}.ckpt", [], step)
    command = ["analyze", "margins", str(tmp_path), "--samples", "300"]
    assert main([*command, "--margin", "10,0", "--margin=-5,0.1"]) == 0
    out = tmp_path / "margins"
    assert "m1=-5deg,m2=0.1: angle" in capsys.readouterr().out
    summary = json.loads((out / "margins.json").read_text())
    assert summary["samples"] == 512 and summary["seed"] == 42 and summary["temperature"] == 0.2
    assert [look["step"] for look in summary["checkpoints"]] == [46, 92]
    assert summary["recipe"]["method"]["base"]["name"] == "simclr"
    with gzip.open(out / "samples.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1024 and {row["margin"] for row in rows} == {"m1=10deg,m2=0", "m1=-5deg,m2=0.1"}
    assert len({row["sample_id"] for row in rows}) == 512 and {row["pair"] for row in rows} == {"global"}
    mean = summary["checkpoints"][-1]["margins"]["m1=10deg,m2=0"]["theta_mean"]
    assert sum(float(row["theta"]) for row in rows) / 1024 == pytest.approx(mean, rel=1e-5)
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    for value in summary["checkpoints"][-1]["margins"].values():
        assert value.keys() <= WORDS.keys(), "every scalar has words"
    assert "probability P⁰ of the positive, without the margin (%)" in page and ">p0<" not in page
    for name in PICTURES:
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width >= 1000
            assert json.loads(picture.info["Description"])["seed"] == 42


def test_analyze_shows_the_history_of_the_run(tmp_path: Path) -> None:
    _, analysis = train("margin", tmp_path / "run", watching=True)
    assert analysis is not None
    save_checkpoint(tmp_path / "x.ckpt", analysis.history, 8)
    command = ["analyze", "margins", str(tmp_path / "x.ckpt"), "--samples", "256"]
    out = ["--recipe", "margin_fashion_mnist", "--out", str(tmp_path / "out")]
    assert main([*command, *out]) == 0
    summary = json.loads((tmp_path / "out" / "margins.json").read_text())
    assert [record["step"] for record in summary["history"]] == [0, 3, 6]
    # The margin shown in detail, the first of the default, is in the history; the others need not be.
    assert [moment.step for moment in _moments(summary, "m1=10deg,m2=0")] == [0, 3, 6, 8]
    assert [moment.step for moment in _moments(summary, "m1=20deg,m2=0")] == [8]
    assert [moment.step for moment in _moments(summary | {"temperature": 0.5}, "m1=10deg,m2=0")] == [8]
    for record in summary["history"]:
        del record["temperature"]  # as a run of an earlier version left it
    assert [moment.step for moment in _moments(summary, "m1=10deg,m2=0")] == [8]


@pytest.mark.parametrize(
    ("scale", "margin", "temperature", "infinite"),
    [(0.0, "90,1", "0.001", ["emphasis", "negative_multiplier"]), (1.0, "0,-5", "0.03", ["log_logit"])],
)
def test_what_is_not_finite_makes_valid_json(
    tmp_path: Path, capsys: Any, scale: float, margin: str, temperature: str, infinite: list[str]
) -> None:
    recipe = load_recipe("margin_fashion_mnist").recipe
    save_checkpoint(tmp_path / "checkpoints" / "x.ckpt", [], 8, scale=scale)
    (tmp_path / "recipe.yaml").write_text(load_recipe("margin_fashion_mnist").to_yaml())
    command = ["analyze", "margins", str(tmp_path / "checkpoints" / "x.ckpt")]
    assert main([*command, "--samples", "64", "--temperature", temperature, "--margin", margin]) == 0
    assert ("not finite" in capsys.readouterr().out) == ("log_logit" in infinite)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "margins" / "margins.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    (scalars,) = summary["checkpoints"][-1]["margins"].values()
    assert all(scalars[key] is None for key in infinite)
    assert summary["samples"] == recipe.data.global_batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-0.2"], "--temperature TEMPERATURE: must be positive, got -0.2"),
        (["--temperature=warm"], "--temperature TEMPERATURE: expected a number, got 'warm'"),
        (["--margin", "nan,0"], "--margin DEGREES,M2: must be finite, got nan"),
        (["--margin", "190,0"], "--margin DEGREES,M2: must be pairs of an angle in (-180, 180) degrees"),
        (["--margin", "10"], "--margin DEGREES,M2: expected a list of 2, got ['10']"),
        (["--margin", "10,x"], "--margin DEGREES,M2: expected a number, got 'x'"),
        (["--margin", "10,0", "--margin", "10,0"], "--margin DEGREES,M2: must not list a margin twice"),
    ],
)
def test_analyze_refuses_in_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["analyze", "margins", "x.ckpt", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
