"""What a recipe says is done: a changed leaf changes what a run does, or is refused.

One recipe stands for each structural class: method, solver or base, optimiser, schedule. Each of its leaves takes
another value, and what a tiny run then *does* is compared: drawn views, arguments and rates of the optimiser, losses
and weights after a few steps, what evaluation finds, files. That the stored recipe differs does not count. A leaf
that may change nothing stands in :data:`IDLE`, with the reason.
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from sslzoo.data.sources import fake_source
from sslzoo.evaluate import logistic, sgd_probe
from sslzoo.evaluate.final import final_evaluation
from sslzoo.optim.schedules import learning_rate
from sslzoo.recipe.load import RecipeError, leaves, load_recipe
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.run.build import BuiltRun, build_run
from sslzoo.run.evaluate import evaluate_at_end

SMALL = (
    "views.0.size=12", "views.0.blur_kernel=5", "data.global_batch_size=8", "eval.size=12", "eval.knn_k=8",
    "eval.every_epochs=1", "eval.baselines=false", "trainer.max_epochs=2", "logging.every_steps=1",
)  # fmt: skip
IMAGES = 16  # two steps an epoch
TINY = "backbone.name=tests.tiny:TinyEncoder"

# What may change nothing, by the end of its key.
IDLE = {
    "name": "a variant's tag or the run's name: other variants are other cases here",
    "data.dataset": "the images here are generated",
    "data.root": "the images here are generated",
    "data.split": "the images here are generated",
    "data.classes": "the images here are generated",
    "data.workers": "processes: speed alone",
    "data.augment_on": "where views are made: the same but for rounding; a test of the data compares them",
    "data.timeout": "how long the data may fail to come; here it comes",
    "data.max_bad_fraction": "counts images that cannot be read; there are none here",
    "eval.batch_size": "of evaluation, whose features do not depend on their neighbours",
    "eval.stop_on_collapse": "ends runs that collapse; tests/callbacks/test_health.py has one",
    "eval.test_split": "the images here are generated",
    "logging.checkpoint_every_steps": "only the newest checkpoint stays; tests of resuming count on it",
    "probe.layers": "the method's; a layer that it does not publish is refused",
    "probe.data": "another data set, which is not generated here",
    "logging.lines": "how progress is written on the screen",
    "logging.tensorboard": "one more place for the same numbers",
    "logging.wandb": "one more place for the same numbers",
    "trainer.accelerator": "where it runs",
    "backbone.options": "arguments of somebody's constructor",
    "method.gather": "one process has nobody to gather from",
    "gather_grad": "one process has nobody to gather from",
    "sync_virtual_step": "one process has nobody to synchronise with",
    "momentum_batchnorm": "one process has nobody to shuffle with; splitting has a test of its own",
    "chunk_size": "memory alone",
    "trainer.devices": "where it runs: results do not depend on the number of devices",
}
# Values to try where a rule of thumb finds none that shows.
VALUES = {
    "backbone.weights": ["none.pt"],
    "eval.knn_temperature": ["10.0", "0.001"],
    "eval.after": ["[logistic]"],
    "logging.keep_epochs": ["[1]"],
    "method.C": ["0.01"],
    "method.solver.max_iter": ["1"],
    "method.solver.tol": ["10.0", "1e-9"],
    "speed.compile": ["eager"],
    "method.loss.u_floor": ["100.0"],
    "temperature_rule.tau_min": ["0.199"],
    "temperature_rule.tau_max": ["0.201"],
    "effects.emphasis": ["2.0"],
    "effects.factor_range": ["[0.999, 1.001]"],
    "family.angular_margin": ["2.0"],
}


@dataclass(frozen=True)
class Case:
    """A recipe, what is changed in it first, and which of its leaves are looked at."""

    recipe: str
    overrides: tuple[str, ...]
    section: str

    @cached_property
    def loaded(self) -> Recipe:
        """With its own overrides."""
        return self.changed()

    def changed(self, *overrides: str) -> Recipe:
        """With further overrides. Raises ``RecipeError`` where they are refused."""
        return load_recipe(self.recipe, [*SMALL, *self.overrides, *overrides]).recipe


def optim(name: str, *more: str) -> str:
    """The override that trains with the optimiser ``name``."""
    keys = [f"name: {name}", "lr: 0.1, lr_scaling: linear, weight_decay: 0.01, warmup_epochs: 1", *more]
    return f"optim={{{', '.join(keys)}}}"


def method(name: str, *overrides: str) -> Case:
    """A case whose leaves under ``method`` are looked at."""
    return Case(f"{name}_fashion_mnist", (TINY, "method.projector.widths=[16, 16]", *overrides), "method")


PGD = "{name: pgd, max_iter: 20, tol: 0.5}"
COSINE = "{name: cosine, min: 0.3, decay_epochs: 2, interval: step}"
INDIVIDUAL = "{name: individual, rho: 0.3, eta: 0.01, beta: 0.5, tau_min: 0.05, tau_max: 0.7}"
LEARNABLE = "{name: global_learnable, rho: 20.0, tau_min: 0.05, lr_factor: 0.5}"
GENERATOR = "method.generator.hidden=[16, 16]"
HEAD = "{widths: [16, 16]}"
MOMENTUM = "momentum_start: 0.9"
ISOLATED = "{name: isolated, emphasis: batch, angle: true, logit: both}"
ANGLE = "{name: combined, angular_margin: 3.1, subtractive_margin: 0.1, schedule: {name: linear, epochs: 1}}"

CASES = {
    "seed": Case("simclr_fashion_mnist", (TINY,), "seed"),
    "backbone": Case("simclr_fashion_mnist", ("backbone={name: resnet18, in_channels: 1}",), "backbone"),
    "data": Case("simclr_fashion_mnist", (TINY,), "data"),
    "views, grey": Case("simclr_fashion_mnist", (TINY,), "views"),
    "views, colour": Case(
        "simclr_cifar10",
        (TINY, "backbone.stem=imagenet", "trainer.precision=32-true", "views.0.blur_p=0.5"),
        "views",
    ),
    "views, padded": Case(
        "simclr_fashion_mnist",
        (TINY, "views=[{size: 12, count: 2, padding: 2, flip_p: 0.5, blur_p: 0.5}]"),
        "views",
    ),
    "lars, cosine": Case(
        "simclr_fashion_mnist",
        (
            TINY,
            optim("lars"),
        ),
        "optim",
    ),
    "sgd, step": Case(
        "simclr_fashion_mnist",
        (
            TINY,
            optim("sgd", "schedule: {name: step, milestones: [1]}"),
        ),
        "optim",
    ),
    "adamw, constant": Case(
        "simclr_fashion_mnist",
        (
            TINY,
            optim("adamw", "schedule: constant"),
        ),
        "optim",
    ),
    "probe": Case("simclr_fashion_mnist", (TINY, "probe.online=true", "probe.lrs=[0.1, 0.3]"), "probe"),
    "eval": Case("simclr_fashion_mnist", (TINY,), "eval"),
    "logging": Case("simclr_fashion_mnist", (TINY,), "logging"),
    "speed": Case("simclr_fashion_mnist", ("backbone={name: resnet18, in_channels: 1}",), "speed"),
    "trainer": Case("simclr_fashion_mnist", (TINY,), "trainer"),
    "simclr": method("simclr"),
    "sce": method(
        "sce",
        "method.target_temperature=1.0",
        "method.target_temperature_warmup={start: 0.5, epochs: 4}",
        "method.loss={name: sce, contrastive_weight: 0.5, contrastive_weight_warmup: {start: 0.9, epochs: 4}}",
        "method.predictor={widths: [16, 16]}",
        "method.queue_size=16",
    ),
    "sce, batch": method(
        "sce",
        "method.queue_size=null",
        "method.batch_negatives=true",
        "method.loss={name: three_terms, contrastive_weight: 0.5, relational_weight: 0.4, ceil_weight: 0.3}",
    ),
    "sce, ressl": method("sce", "method.loss=ressl", "method.queue_size=16"),
    "mmcl, inv": method("mmcl", "method.solver=inv"),
    "mmcl, pgd": method("mmcl", f"method.solver={PGD}"),
    "mmcl, adaptive": method("mmcl", "method.solver={name: pgd_adaptive, max_iter: 20}"),
    "mmcl, exact": method("mmcl", "method.solver=exact", "method.kernel=linear"),
    "sogclr": method("sogclr"),
    "sogclr, cosine": method(
        "sogclr", f"method.loss.gamma={COSINE}", f"method.loss.temperature_rule={INDIVIDUAL}"
    ),
    "sogclr, bimodal": method(
        "sogclr", f"method.loss={{name: gcl_bimodal, gamma: 0.7, temperature_rule: {LEARNABLE}}}"
    ),
    "sogclr, ntxent": method("sogclr", "method.loss=ntxent"),
    "metaug": method("metaug", GENERATOR),
    "metaug, bank": method(
        "metaug",
        GENERATOR,
        "method.keys={name: bank, negatives: 8}",
        "method.circle={m: 0.25}",
        "method.meta.optimizer={name: sgd, lr: 0.01, weight_decay: 0.01}",
    ),
    "margin, simclr": method("margin", f"method.family={ANGLE}"),
    "margin, isolated": method("margin", f"method.family={ANGLE}", f"method.effects={ISOLATED}"),
    "margin, mocov2": method(
        "margin",
        f"method.base={{name: mocov2, temperature: 0.2, queue_size: 16, {MOMENTUM}}}",
        "method.family={name: eqco, alpha: 64.0}",
    ),
    "margin, mocov3": method(
        "margin",
        f"method.base={{name: mocov3, temperature: 0.2, predictor: {HEAD}, {MOMENTUM}}}",
        "method.family={name: cosface, subtractive_margin: 0.1}",
    ),
    "margin, byol": method(
        "margin",
        f"method.base={{name: byol, predictor: {HEAD}, {MOMENTUM}}}",
        "method.family={name: arcface, angular_margin: 0.3}",
    ),
    "margin, simsiam": method(
        "margin",
        f"method.base={{name: simsiam, predictor: {HEAD}}}",
        "method.family={name: sphereface, multiplier: 3}",
    ),
    "margin, macl": method("margin", "method.family={name: macl, alpha: 0.5}"),
}


# -- what is done --------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Of numbers and of the bytes of tensors."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(
            value.detach().contiguous().cpu().numpy().tobytes()
            if isinstance(value, torch.Tensor)
            else repr(value).encode()
        )
    return sha.hexdigest()


def built(recipe: Recipe, folder: Path, *, labelled: bool = False) -> BuiltRun:
    """Its run on generated images."""
    channels = len(recipe.data.mean)
    source = fake_source(IMAGES, channels, 14, 4 if labelled else 0)
    return build_run(recipe, Run(folder, "leaves"), source=source)


def views_drawn(recipe: Recipe, folder: Path) -> Any:
    """The first batches as the method gets them."""
    run = built(recipe, folder)
    batch = run.data.example_batch(8)
    return run.plan, digest(*batch.global_views), digest(*batch.local_views)


def optimisation(recipe: Recipe, folder: Path) -> Any:
    """What torch's optimiser gets, and the rate of every step."""
    run = built(recipe, folder)
    optimizer = run.method.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = [
        {k: len(v) if k == "params" else v for k, v in group.items()} for group in optimizer.param_groups
    ]
    rates = [learning_rate(step, recipe.optim, run.plan) for step in range(run.plan.total_steps)]
    return type(optimizer), groups, rates


def trained(recipe: Recipe, folder: Path) -> Any:
    """All state after training."""
    run = built(recipe, folder)
    for callback in (run.callbacks.checkpoint, run.callbacks.pictures, run.callbacks.page):  # they cost time
        cast(Any, run.trainer).callbacks.remove(callback)
    run.trainer.fit(run.method, datamodule=run.data)
    state = run.method.state_dict()
    losses = [row["train/loss"] for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    return list(state), digest(*state.values()), losses


def computed(recipe: Recipe, folder: Path) -> Any:
    """The layout of the encoder's weights, whether it is compiled, and how often its layers compute in a step."""
    run = built(recipe, folder)
    calls: list[nn.Module] = []
    backbone = run.method.backbone
    for layer in backbone.modules():
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    run.method.loss(run.data.example_batch(8)).backward()
    return [p.stride() for p in backbone.parameters()], backbone._compiled_call_impl is None, len(calls)


def whole_run(recipe: Recipe, folder: Path) -> Any:
    """Curves, evaluation, and the files that remain."""
    run = built(recipe, folder, labelled=True)
    run.trainer.fit(run.method, datamodule=run.data)
    found = final_evaluation(
        run.method, run.data, recipe, last=run.last_measured, initial=run.initial_backbone,
        folder=run.run.evaluation, seconds=0.0,
    )  # fmt: skip
    found = evaluate_at_end(
        run.method,
        run.data,
        recipe,
        run.run.evaluation,
        device=torch.device("cpu"),
        summary=found,
        brief=True,
    )
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    probe = run.callbacks.online_probe.state_dict() if run.callbacks.online_probe is not None else {}
    return (folder / "metrics.csv").read_bytes(), files, repr(found), repr(probe)


OBSERVED: dict[str, Callable[[Recipe, Path], Any]] = {
    "seed": trained,
    "backbone": trained,
    "method": trained,
    "data": views_drawn,
    "views": views_drawn,
    "optim": optimisation,
    "probe": whole_run,
    "eval": whole_run,
    "logging": whole_run,
    "speed": computed,
    "trainer": whole_run,
}


def done(recipe: Recipe, section: str) -> Any:
    """What a run of ``recipe`` does, as far as ``section`` has a say in it."""
    with tempfile.TemporaryDirectory() as folder:
        return OBSERVED[section](recipe, Path(folder))


# -- other values ---------------------------------------------------------------------------------


def hint_of(recipe: Any, key: str) -> Any:
    """The annotation of the leaf ``key``."""
    hint: Any = Any
    for name in key.split("."):
        if is_dataclass(recipe):
            hint, recipe = get_type_hints(type(recipe))[name], getattr(recipe, name)
        elif isinstance(recipe, dict):
            hint, recipe = Any, recipe[name]
        else:
            recipe = recipe[int(name)]
    return hint


def others(key: str, value: Any, hint: Any) -> list[str]:
    """Values to try in place of ``value``, as overrides spell them."""
    known = next((v for k, v in VALUES.items() if key.endswith(k)), None)
    if known is not None:
        return known
    if isinstance(value, bool):
        return [str(not value).lower()]
    kinds = get_args(hint) if get_origin(hint) not in (None, Literal, tuple) else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if isinstance(value, int):
        return [str(v) for v in (value + 1, value * 2, value // 2, value - 1) if v != value]
    if isinstance(value, float):
        return [
            f"{v:g}" for v in (value * 0.5, value * 2, value + 0.25, value + 0.01, value - 0.25) if v != value
        ]
    if isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
        return [
            str([v * 2 for v in value]),
            str([v / 2 for v in value]),
            str([v + 1 for v in value]),
            str([*value, value[-1]]),
            str(value[:-1]),
        ]
    if value is None:
        numbers = [text for kind, text in ((int, "2"), (float, "0.5")) if kind in kinds]
        return [*map(str, words), *numbers, *(["5"] if int in kinds else [])]
    return [str(word) for word in words if word != value]


def idle(key: str) -> bool:
    """Whether the leaf may change nothing."""
    return any(key == k or key.endswith("." + k) or key.startswith(k + ".") for k in IDLE)


def looked_at(case: Case) -> Iterator[tuple[str, Any]]:
    """The leaves of the case's section."""
    for key, value in leaves(case.loaded):
        if key.split(".")[0] == case.section and not idle(key):
            yield key, value


@cache
def base(case: Case) -> Any:
    """What the unchanged recipe does."""
    return done(case.loaded, case.section)


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_acts_or_is_refused(name, monkeypatch):
    monkeypatch.setattr(sgd_probe, "EPOCHS", 2)
    monkeypatch.setattr(sgd_probe, "STEPS", 10)
    monkeypatch.setattr(logistic, "QUICK", logistic.QUICK._replace(iterations=3))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    case = CASES[name]
    without_effect, untried = [], []
    for key, value in looked_at(case):
        tried = []
        values = others(key, value, hint_of(case.loaded, key))
        for other in values:
            try:
                recipe = case.changed(f"{key}={other}")
                acts = done(recipe, case.section) != base(case)
            except (RecipeError, ValueError):
                continue
            if acts:
                break
            tried.append(other)
        else:
            if tried:
                without_effect.append(f"{key}={value}: nothing changes with {', '.join(tried)}")
            elif value is not None and not values:
                untried.append(f"{key}={value}")
    assert not without_effect, "\n".join(without_effect)
    assert not untried, untried
