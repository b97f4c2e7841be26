"""Each protocol is its authors': weights after every epoch equal a transcription of its description, in float64.

The descriptions are written out here once more, and gradients and optimisers in formulas, so that a number that slips
in a protocol's package shows. First on given features, over the protocol's full length and batch size, then on images,
through the DataModule, with an encoder that has batch norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import cos, pi
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sslzoo.data.crops import crop_batch, evaluation_crop
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import ImageSource, fake_source
from sslzoo.data.views import apply_view, draw_boxes, draw_uniforms, draw_view
from sslzoo.protocols.classifiers import Classifiers, Length
from sslzoo.protocols.dinov2 import DINOV2_GRID
from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.protocols.run import evaluate_linear
from sslzoo.randomness import epoch_order, is_holdout
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.registry import method_class
from sslzoo.recipe.sections import PlainView, Recipe, ViewConfig
from sslzoo_methods.margin.protocols import MARGIN
from sslzoo_methods.metaug.protocols import METAUG
from sslzoo_methods.mmcl.protocols import MMCL, MMCL_CIFAR
from sslzoo_methods.sce.protocols import SCE, SCE_CIFAR
from sslzoo_methods.sogclr.protocols import SOGCLR, SOGCLR_CIFAR, SOGCLR_TF
from tests.tiny import TinyEncoder

# Learning rate after s of T steps, in epoch e of E, relative to the first.
Rate = Callable[[int, int, int, int], float]


def by_step(s: int, T: int, e: int, E: int) -> float:
    """Half a cosine."""
    return (1 + cos(pi * s / T)) / 2


def by_epoch(s: int, T: int, e: int, E: int) -> float:
    """Half a cosine, constant in each epoch."""
    return (1 + cos(pi * e / E)) / 2


def falling(s: int, T: int, e: int, E: int) -> float:
    """A line to 0."""
    return 1 - s / T


def dropping(factor: float, *at: int) -> Rate:
    """Times ``factor`` at each of the epochs."""
    return lambda s, T, e, E: factor ** len([epoch for epoch in at if e >= epoch])


def level(s: int, T: int, e: int, E: int) -> float:
    """Constant."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Described:
    """A protocol as described by its paper or code."""

    lr: Callable[[int], tuple[float, ...]]  # of the batch size
    batch: int
    epochs: int
    rate: Rate
    view: dict[str, Any]
    test: dict[str, Any]
    drop_last: bool
    start: str
    adam: bool = False
    nesterov: bool = False
    decay: float = 0.0
    train_mode: bool = False
    looks: int | None = None  # epochs between tests; None: one at the end
    held_out: bool = False
    best: bool = False
    steps: dict[str, int] = field(default_factory=dict)


def linear(*base: float) -> Callable[[int], tuple[float, ...]]:
    """lr * batch / 256."""
    return lambda batch: tuple(lr * batch / 256 for lr in base)


IMAGENET = {"size": 224, "scale": (0.08, 1.0), "flip_p": 0.5}
BICUBIC = IMAGENET | {"interpolation": "bicubic"}
LARGE = {"size": 224, "resize": 256}
CONTRASTIVE = {
    "size": 32, "scale": (0.08, 1.0), "flip_p": 0.5, "jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.4, "hue": 0.1, "grayscale_p": 0.2, "blur_p": 0.5, "blur_kernel": 3, "blur_sigma": (0.1, 2.0),
}  # fmt: skip
GRID = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

PROTOCOLS: dict[str, tuple[ViewProtocol, Described]] = {
    "sce": (SCE, Described(
        lr=linear(0.1), batch=1024, epochs=90, rate=by_step, drop_last=True, start="normal", looks=1, best=True,
        view=IMAGENET, test=LARGE,
    )),
    "sce_cifar": (SCE_CIFAR, Described(
        lr=lambda _: (30.0,), batch=256, epochs=100, rate=dropping(0.1, 60, 80), drop_last=True, start="normal",
        looks=1, best=True, view={"size": 32, "padding": 4, "flip_p": 0.5}, test={"size": 32},
    )),
    "sogclr": (SOGCLR, Described(
        lr=linear(0.1), batch=1024, epochs=90, rate=by_epoch, drop_last=False, start="normal", looks=1, best=True,
        view=IMAGENET, test=LARGE,
    )),
    "sogclr_cifar": (SOGCLR_CIFAR, Described(
        lr=linear(0.1), batch=1024, epochs=90, rate=by_epoch, drop_last=False, start="normal", looks=1, best=True,
        view=IMAGENET | {"size": 32}, test={"size": 32},
    )),
    "sogclr_tf": (SOGCLR_TF, Described(
        lr=linear(0.1), batch=4096, epochs=90, rate=by_step, nesterov=True, drop_last=True, start="zeros",
        view=BICUBIC, test={"size": 224, "proportion": 0.875, "interpolation": "bicubic"},
    )),
    "mmcl": (MMCL, Described(
        lr=lambda batch: (1.6 * batch / 4096,), batch=4096, epochs=90, rate=falling, drop_last=False, start="zeros",
        view=BICUBIC, test={"size": 224, "proportion": 0.875, "square": False, "interpolation": "bicubic"},
        steps={"imagenet1k": 28_080, "imagenet100": 3_902},
    )),
    "mmcl_cifar": (MMCL_CIFAR, Described(
        lr=lambda _: (1e-3,), batch=512, epochs=100, rate=level, adam=True, decay=1e-6, train_mode=True,
        drop_last=False, start="default", looks=5, best=True, view=CONTRASTIVE, test={"size": 32},
    )),
    "metaug": (METAUG, Described(
        lr=lambda _: (0.1,), batch=256, epochs=60, rate=dropping(0.2, 30, 40, 50), drop_last=False, start="normal",
        looks=1, best=True, view=IMAGENET | {"scale": (0.2, 1.0)}, test=LARGE,
    )),
    "margin": (MARGIN, Described(
        lr=lambda _: (0.1, 0.3, 1.0, 3.0), batch=256, epochs=100, rate=dropping(0.1, 60, 80), drop_last=False,
        start="default", held_out=True, view=IMAGENET, test=LARGE,
    )),
    "dinov2_grid": (DINOV2_GRID, Described(
        lr=linear(*GRID), batch=1024, epochs=10, rate=by_step, drop_last=True, start="normal", held_out=True,
        best=True, view=BICUBIC, test=LARGE | {"interpolation": "bicubic"},
    )),
}  # fmt: skip

Batch = tuple[dict[str, Tensor], Tensor]  # features by kind, and labels


class Transcribed:
    """One softmax classifier by the formulas of the optimisers, in float64."""

    def __init__(self, described: Described, weight: Tensor, bias: Tensor, lr: float) -> None:
        self.described, self.lr, self.t = described, lr, 0
        self.w = torch.cat([weight, bias[:, None]], dim=1).detach().clone()  # (C, F+1)
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step on features (N, F) and labels (N,)."""
        d, z = self.described, torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        error = torch.softmax(z @ self.w.T, dim=1)
        error[torch.arange(len(y)), y] -= 1
        g, lr = error.T @ z / len(y) + d.decay * self.w, self.lr * factor
        self.t += 1
        if d.adam:
            self.m = 0.9 * self.m + 0.1 * g
            self.v = 0.999 * self.v + 0.001 * g * g
            m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            self.w = self.w - lr * m / (v.sqrt() + 1e-8)
        else:
            self.m = 0.9 * self.m + g
            self.w = self.w - lr * (g + 0.9 * self.m if d.nesterov else self.m)


def transcribe(
    described: Described,
    start: Classifiers,
    batch_size: int,
    epochs: Iterable[Iterable[Batch]],
    *,
    steps: int,
    rounds: int,
) -> Iterator[list[Transcribed]]:
    """The classifiers after each epoch, of which there are ``rounds`` with ``steps`` steps in all."""
    lrs = described.lr(batch_size)
    assert len(start.linear) == len(lrs) * len(set(start.layers))
    parts = [
        Transcribed(described, cast(nn.Linear, part).weight, cast(nn.Linear, part).bias, lrs[i % len(lrs)])
        for i, part in enumerate(start.linear)
    ]
    s = 0
    for e, batches in enumerate(epochs):
        for features, y in batches:
            for part, layer in zip(parts, start.layers, strict=True):
                part.step(features[layer], y, described.rate(s, steps, e, rounds))
            s += 1
        yield parts


def cut(n: int, described: Described, batch: int, order: Tensor) -> list[Tensor]:
    """An epoch's batches, with or without the last partial one."""
    whole = [order[i : i + batch] for i in range(0, n, batch)]
    return [rows for rows in whole if len(rows) == batch or not described.drop_last]


def difference(classifiers: Classifiers, parts: list[Transcribed]) -> float:
    """The largest of all weights, relative to the largest weight of its classifier."""
    worst = 0.0
    for module, part in zip(classifiers.linear, parts, strict=True):
        made = cast(nn.Linear, module)
        ours = torch.cat([made.weight, made.bias[:, None]], dim=1).detach()
        worst = max(worst, float((ours - part.w).abs().max() / part.w.abs().max()))
    return worst


@pytest.mark.parametrize("name", PROTOCOLS)
def test_weights_on_given_features(name: str) -> None:
    """Over the full length, with the protocol's own batch size and a partial batch."""
    protocol, described = PROTOCOLS[name]
    batch, epochs, width, classes = described.batch, described.epochs, 3, 4
    n = batch + 5
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(classes, (n,), generator=generator)
    # Small, so that a rate of 30 does not amplify rounding.
    x = 0.1 * (torch.randn(n, width, generator=generator, dtype=torch.float64) + y[:, None])
    kinds = {"1 layer": x, "4 layers": torch.cat([x, x * x], dim=1)} if name == "dinov2_grid" else {"": x}
    assert (protocol.batch_size, protocol.epochs) == (batch, epochs)
    per_epoch = 1 if described.drop_last else 2
    length = Length(per_epoch, per_epoch * epochs)

    def fresh() -> Classifiers:
        widths = {kind: features.shape[1] for kind, features in kinds.items()}
        return Classifiers(
            protocol, widths, classes, length, seed=5, device=torch.device("cpu"), dtype=torch.float64
        )

    def epoch(e: int) -> Iterator[Batch]:
        for rows in cut(n, described, batch, epoch_order(5, e, n)):
            yield {kind: features[rows] for kind, features in kinds.items()}, y[rows]

    ours, worst, step = fresh(), 0.0, 0
    rounds = transcribe(
        described, fresh(), batch, map(epoch, range(epochs)), steps=length.total, rounds=epochs
    )
    for e, parts in enumerate(rounds):
        for features, label in epoch(e):
            half = len(label) // 2  # in two parts, as for an encoder that takes no more at a time
            ours.add({kind: part[:half] for kind, part in features.items()}, label[:half])
            ours.add({kind: part[half:] for kind, part in features.items()}, label[half:])
            ours.step(step)
            step += 1
        worst = max(worst, difference(ours, parts))
    assert step == length.total
    assert worst < 1e-12


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_beginning(name: str) -> None:
    protocol, described = PROTOCOLS[name]
    made = Classifiers(protocol, {"": 2000}, 10, Length(1, 1), seed=1, device=torch.device("cpu"))
    first = cast(nn.Linear, made.linear[0])
    spread = {"normal": 0.01, "zeros": 0.0, "default": (1 / 2000 / 3) ** 0.5}[described.start]
    assert float(first.weight.detach().std()) == pytest.approx(spread, rel=0.02)
    assert bool(first.bias.any()) == (described.start == "default")
    assert protocol.iterations == described.steps


N, SIZE, CLASSES = 40, 32, 4  # of the images


@dataclass
class Fixture:
    """Images, a recipe for the protocol's size, the protocol for three epochs of small batches, and an encoder."""

    protocol: ViewProtocol
    described: Described
    recipe: Recipe
    data: SSLDataModule
    encoder: nn.Module

    @staticmethod
    def of(name: str) -> Fixture:
        protocol, described = PROTOCOLS[name]
        short: dict[str, Any] = {"batch_size": 16, "epochs": 3}
        if protocol.milestones:
            short["milestones"], described = (1, 2), replace(described, rate=dropping(protocol.gamma, 1, 2))
        if described.steps:
            short["iterations"] = {"cifar10": 7}
        looks = described.looks and 1
        if described.view["size"] == 224:  # an eighth of everything, which is faster
            view, test = described.view | {"size": 28}, described.test | {"size": 28}
            test |= {"resize": 32} if "resize" in test else {}
            described = replace(described, view=view, test=test)
        size = described.view["size"]
        sizes = [f"eval.size={size}", f"eval.resize={size}", "eval.batch_size=5", "eval.knn_k=1"]
        recipe = load_recipe("simclr_cifar10", [*sizes, "probe.holdout=0.3"]).recipe
        plan = TrainingPlan(dataset_size=N, global_batch_size=2, max_epochs=1)
        source = fake_source(N, 3, SIZE, CLASSES)
        encoder = TinyEncoder(3).double().eval()
        for buffer in encoder.buffers():
            buffer.add_(1)  # running statistics that are not the initial ones
        return Fixture(
            replace(protocol, test_epochs=looks, **short),
            replace(described, looks=looks),
            recipe,
            SSLDataModule(
                recipe.data, recipe.views, recipe.eval, recipe.probe, plan, recipe.seed, source=source
            ),
            encoder,
        )

    def kind(self) -> str:
        return "1 layer" if self.protocol.layers else ""

    def views(self, e: int, rows: Tensor) -> Tensor:
        """The augmented images of an epoch, normalised."""
        view, images = ViewConfig(**self.described.view), self.images(self.data.train_source, rows)
        u = draw_uniforms(self.recipe.seed, e, 0, rows)
        boxes = draw_boxes(view, u, *torch.full((2, len(rows)), SIZE))
        crops = crop_batch(
            images, boxes, view.size, view.interpolation, self.described.view.get("padding", 0)
        )
        return self.normalized(apply_view(view, crops, draw_view([view], [u], 3, boxes)))

    def plain(self, source: ImageSource, rows: Tensor) -> Tensor:
        """The plain images, normalised."""
        shown = evaluation_crop(self.images(source, rows), PlainView(**self.described.test))
        return self.normalized(shown.float() / 255)

    def images(self, source: ImageSource, rows: Tensor) -> Tensor:
        return torch.stack([source.read(i) for i in rows.tolist()])

    def normalized(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.recipe.data.mean, self.recipe.data.std))
        return ((x - mean) / std).double()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_weights_and_figures_on_images(name: str) -> None:
    fixture = Fixture.of(name)
    protocol, described, seed = fixture.protocol, fixture.described, fixture.recipe.seed
    before = copy.deepcopy(fixture.encoder.state_dict())
    recorded: list[Classifiers] = []
    method = None
    if protocol.encoder is not None:
        cfg = load_recipe("metaug_cifar10").recipe.method
        method = method_class("metaug")(cfg, fixture.encoder, TinyEncoder.num_features)
    found = evaluate_linear(
        protocol, fixture.encoder, fixture.recipe, fixture.data, device=torch.device("cpu"), method=method,
        after_epoch=lambda epoch, classifiers: recorded.append(copy.deepcopy(classifiers)),
    )["data"]  # fmt: skip
    after = fixture.encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the encoder itself has changed"

    held_out = is_holdout(torch.arange(N), 0.3, seed) & described.held_out
    learned = int((~held_out).sum())
    steps = 7 if described.steps else 3 * (learned // 16 if described.drop_last else -(-learned // 16))
    net = copy.deepcopy(fixture.encoder)
    train, test = fixture.data.eval_sets()

    def features(image: Tensor, *, training: bool = False) -> Tensor:
        net.train(training)
        with torch.no_grad():
            return net(image)

    def epoch(e: int) -> Iterator[Batch]:
        order = epoch_order(seed, e, N)
        order = order[~held_out[order]]
        for rows in cut(learned, described, 16, order)[: steps - e * -(-steps // 3)]:
            x = features(fixture.views(e, rows), training=described.train_mode)
            yield {fixture.kind(): x}, rows % CLASSES

    def correct(parts: list[Transcribed], source: ImageSource, rows: Tensor) -> list[float]:
        x = features(fixture.plain(source, rows))
        return [
            float(((x @ part.w[:, :-1].T + part.w[:, -1]).argmax(1) == rows % CLASSES).double().mean())
            for part in parts
        ]

    widths, length = {fixture.kind(): TinyEncoder.num_features}, Length(1, 1)
    start = Classifiers(
        protocol, widths, CLASSES, length, seed=seed, device=torch.device("cpu"), dtype=torch.float64
    )
    worst, looks, last = 0.0, [], []
    rounds = transcribe(described, start, 16, map(epoch, range(3)), steps=steps, rounds=3)
    for e, parts in enumerate(rounds):
        if e < len(recorded):
            worst = max(worst, difference(recorded[e], parts))
        if described.looks or e == 2:
            looks.append(correct(parts, test.source, test.sample_id))
        last = parts
    assert len(recorded) == steps // -(-steps // 3)
    assert worst < 1e-12

    chosen = 0
    if described.held_out:
        by = correct(last, train.source, held_out.nonzero()[:, 0])
        chosen = by.index(max(by))
        assert found.held_out_top1 == pytest.approx(max(by))
    assert found.top1 == pytest.approx(looks[-1][chosen])
    assert (found.n_train, found.n_held_out, found.n_test) == (learned, N - learned, N)
    assert (found.best is not None) == described.best
    if found.best is not None:
        best = max(max(look) for look in looks)
        first = next(i for i, look in enumerate(looks) if max(look) == best)
        assert found.best.top1 == pytest.approx(best)
        assert found.best.epoch == (first + 1 if described.looks else 3)
