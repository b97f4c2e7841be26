"""Every method, and each of its variants, keeps the contract's promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sslzoo.data.sources import fake_source
from sslzoo.method import SSLMethod
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import method_class, methods, recipes
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import build_experiment
from sslzoo.testing.contract import check, small_recipe
from sslzoo.testing.promises import PROMISES, WORLDS, compare_worlds

HEAD = "{widths: [16, 8]}"
LOCALS = (
    "views=[{size: 8, count: 2, scale: [0.3, 1.0], flip_p: 0.5}, {size: 6, role: local, scale: [0.1, 0.4]}]"
)
PGD = "{name: pgd, max_iter: 20}"
FALLING = "{name: rbf, sigma: 1.0, sigma_schedule: {name: step, milestones: [2]}}"
MEDIAN = "{name: rbf, sigma: 1.0, sigma_rule: median}"
INDIVIDUAL = "{name: individual, rho: 0.3, eta: 0.1, beta: 0.9, tau_min: 0.05, tau_max: 0.7}"
LEARNABLE = "{name: global_learnable, rho: 6.0, tau_min: 0.1, lr_factor: 2.0}"
MOCO = "name: mocov2, temperature: 0.2, queue_size: 40, momentum_start: 0.9"
ISOLATED = "method.effects={name: isolated, %s}"

# What makes each method small and shows its state: a queue of 40 is filled in a step.
METHODS = {
    "simclr": (),
    "sce": ("method.queue_size=40",),
    "mmcl": (),
    "sogclr": (),
    "metaug": ("method.generator.hidden=[16, 16]",),
    "margin": (),
}
# By method, what else it can be; the numbers of several processes are compared for each.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "simclr": {"local crops": (LOCALS,)},
    "sce": {
        "local crops": (LOCALS, f"method.predictor={HEAD}"),
        "asymmetric": (LOCALS, "method.symmetric=false", "method.momentum_schedule=constant"),
        "keys and queue": (LOCALS, "method.batch_negatives=true", "method.loss.target_positive=masked"),
        "keys": (
            LOCALS, "method.batch_negatives=true", "method.queue_size=null", "method.loss.target_positive=masked",
        ),
        "joint": (LOCALS, "method.crop_batching=joint", "method.pair_weighting=per_online_crop"),
    },
    "mmcl": {
        "inv": (LOCALS, "method.solver=inv"),
        "pgd": (
            LOCALS, f"method.solver={PGD}", f"method.kernel={FALLING}", "method.crop_batching=per_crop",
            "method.alpha_normalize=mean",
        ),
        "pgd_adaptive": (
            LOCALS, "method.solver=pgd_adaptive", "method.negatives=both", "method.symmetric=true",
            f"method.kernel={MEDIAN}",
        ),
    },
    "sogclr": {
        "cosine": (LOCALS, "method.loss.gamma={name: cosine, min: 0.3}"),
        "individual": (f"method.loss.temperature_rule={INDIVIDUAL}",),
        "not reduced": ("method.loss.gather_grad=full_noreduce",),
        "bimodal": ("method.loss={name: gcl_bimodal, gamma: 0.8, u_floor: 1.0e-20}",),
        "bimodal, individual": (
            f"method.loss={{name: gcl_bimodal, gamma: 0.8, scale: official, temperature_rule: {INDIVIDUAL}}}",
        ),
        "bimodal, learnable": (
            f"method.loss={{name: gcl_bimodal, gamma: 0.8, temperature_rule: {LEARNABLE}}}",
        ),
        "ntxent": ("method.loss=ntxent",),
    },
    "metaug": {
        "first order": ("method.meta.order=1", "method.margin.thresholds=small"),
        "projector": ("method.meta.virtual_params=projector", "method.generator.shared=true", "method.margin=null"),
        "whole": ("method.meta.virtual_params=all",),
        "unified": ("method.terms=unified", "method.circle={m: 0.25}"),
        "same view": ("method.keys={name: batch, same_view_negatives: true}", "method.margin.steps=generator"),
        "three views": ("views.0.size=8", "views.0.count=3", "method.views={name: crops, count: 3}"),
        "bank": ("method.keys={name: bank, negatives: 8}",),
        "official bank": ("method.keys={name: bank, negatives: 8, updates: official}",),
    },
    "margin": {
        "one effect, in chunks": (LOCALS, ISOLATED % "emphasis: batch", "method.base.chunk_size=5"),
        "macl": ("method.family={name: macl, alpha: 0.5}",),
        "mocov2": (LOCALS, f"method.base={{{MOCO}}}"),
        "mocov2, one order": (
            f"method.base={{{MOCO}, symmetric: false}}",
        ),
        "mocov3": (
            LOCALS, ISOLATED % "angle: true, logit: negative",
            f"method.base={{name: mocov3, temperature: 0.2, momentum_start: 0.9, predictor: {HEAD}}}",
        ),
        "byol": (
            ISOLATED % "angle: true", "method.family={name: combined, angular_margin: 20deg, subtractive_margin: 0.0}",
            f"method.base={{name: byol, momentum_start: 0.9, predictor: {HEAD}}}",
        ),
        "simsiam": (
            LOCALS, ISOLATED % "emphasis: batch",
            "method.family={name: combined, angular_margin: 20deg, subtractive_margin: 0.0}",
            f"method.base={{name: simsiam, predictor: {HEAD}}}",
        ),
    },
}  # fmt: skip
# Those with state of their own, which a kill or a number that is not finite could spoil.
STATEFUL = {
    "sogclr": ("individual", "bimodal, learnable"),
    "metaug": ("bank", "official bank"),
    "margin": ("mocov2",),
}


def recipe_of(method: str, variant: str = "") -> Recipe:
    """The small recipe of a method, or of a variant."""
    changes = VARIANTS[method][variant] if variant else ()
    overrides = [f"method.projector={HEAD}", *METHODS[method], *changes]
    return small_recipe(method, recipe=f"{method}_fashion_mnist", overrides=overrides)


def keeps(promise: str, recipe: Recipe) -> None:
    """Fail with what was found where it does not."""
    result = check(PROMISES[promise], recipe)
    assert result.kept, f"{result.found}; {result.advice}"


def test_every_method_is_here():
    assert METHODS.keys() == VARIANTS.keys() == methods().keys()


@pytest.mark.parametrize("name", methods())
def test_has_a_small_recipe_and_a_frozen_config(name):
    assert f"{name}_fashion_mnist" in recipes()
    cls = method_class(name)
    assert issubclass(cls, SSLMethod)
    assert cls.Config.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("promise", [name for name in PROMISES if name != "world-size"])
@pytest.mark.parametrize("method", METHODS)
def test_keeps_its_promises(method, promise):
    keeps(promise, recipe_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_keeps_its_numbers_on_several_processes(method: str, tmp_path: Path):
    variants = {variant: recipe_of(method, variant) for variant in ("", *VARIANTS[method])}
    # Second derivatives through synchronised batch norms are hundreds of collectives: two processes have to do.
    worlds = (2,) if method_class(method).Config.needs_double_backward else WORLDS
    compare_worlds({f"{method}, {v}": recipe for v, recipe in variants.items()}, tmp_path, worlds)


@pytest.mark.parametrize("promise", ["publishing", "bf16"])
@pytest.mark.parametrize(
    ("method", "variant"), [(m, v) for m, variants in VARIANTS.items() for v in variants]
)
def test_a_variant_keeps_what_a_batch_shows(method, variant, promise):
    keeps(promise, recipe_of(method, variant))


@pytest.mark.parametrize("promise", ["not-finite", "resuming"])
@pytest.mark.parametrize(
    ("method", "variant"), [(m, v) for m, variants in STATEFUL.items() for v in variants]
)
def test_a_variant_keeps_its_state(method, variant, promise):
    keeps(promise, recipe_of(method, variant))


def test_measurements_are_tensors_and_settings_numbers():
    recipe = load_recipe("simclr_fashion_mnist", ["data.global_batch_size=8"]).recipe
    method = build_experiment(recipe, source=fake_source(8, 1, 28, 10)).method
    with pytest.raises(ValueError, match=r"record takes a tensor, got method/tau = 0.1; use setting"):
        method.record("method/tau", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes a scalar, got method/tau of shape \(3,\); record its mean"):
        method.record("method/tau", torch.zeros(3))
    with pytest.raises(ValueError, match=r"got a tensor for method/tau; use record"):
        method.setting("method/tau", torch.tensor(0.1))  # type: ignore[arg-type]
