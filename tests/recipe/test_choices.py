"""Choices by type: a union of dataclasses, told apart by ``name``, as a recipe and its overrides may write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from sslzoo.checks import check_field, closest, did_you_mean
from sslzoo.recipe import registry
from sslzoo.recipe.load import LoadedRecipe, RecipeError, load_recipe
from sslzoo.recipe.sections import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Exact:
    name: Literal["exact"] = "exact"


@dataclass(frozen=True, kw_only=True)
class Descent:
    name: Literal["descent", "momentum"] = "descent"
    step: float
    tol: float = 0.01

    def __post_init__(self) -> None:
        check_field(self.step > 0, "step", f"must be positive, got {self.step}")


@dataclass(frozen=True, kw_only=True)
class Never:
    name: Literal["never"] = "never"


@dataclass(frozen=True, kw_only=True)
class Ramp:
    name: Literal["ramp"] = "ramp"
    epochs: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Chooser(MethodConfig):
    RENAMED: ClassVar[dict[str, str]] = {"tau": "temperature", "pgd.eta": "solver.step"}

    solver: Exact | Descent
    temperature: float | Ramp = 0.5
    warmup: Ramp | Never = Ramp()
    cooldown: Ramp | Never | None = None
    order: Literal[1, 2] = 1
    kind: Literal["same", "other"] = "same"


TEXT = """\
seed: 1
backbone: {name: resnet18}
method:
  name: chooser
  solver:
    name: descent
    step: 0.1
data: {dataset: cifar10, global_batch_size: 64, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
views: [{size: 32, scale: [0.2, 1.0]}]
optim: {name: sgd, lr: 0.1, lr_scaling: linear, weight_decay: 1e-6, warmup_epochs: 1}
probe: {holdout: 0.2}
eval: {every_epochs: 1, size: 32, knn_k: 20, knn_temperature: 0.07}
trainer: {max_epochs: 3}
"""
SHORT = TEXT.replace("solver:\n    name: descent\n    step: 0.1", "solver: exact")


@pytest.fixture(autouse=True)
def _chooser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "methods", lambda: ["chooser"])
    monkeypatch.setattr(registry, "method_config", lambda _: Chooser)


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, text: str = TEXT) -> LoadedRecipe:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_recipe(str(path), overrides)

    return load


def chosen(loaded: LoadedRecipe) -> Chooser:
    assert isinstance(loaded.recipe.method, Chooser)
    return loaded.recipe.method


def test_the_name_picks_the_variant(load) -> None:
    assert chosen(load()).solver == Descent(step=0.1)
    assert chosen(load("method.solver.name=momentum")).solver == Descent(name="momentum", step=0.1)
    assert chosen(load("method.solver={name: exact}")).solver == Exact()
    assert chosen(load("method.order=2")).order == 2
    assert chosen(load("method.order='2'")).order == 2, "as an environment variable has it"


def test_a_name_alone_is_a_variant_that_needs_nothing_more(load) -> None:
    assert chosen(load(text=SHORT)).solver == Exact()
    assert chosen(load("method.solver=exact")).solver == Exact()
    assert chosen(load("method.warmup=never")).warmup == Never()


def test_an_override_below_a_name_alone(load) -> None:
    text = SHORT.replace("solver: exact", "solver: exact\n  warmup: ramp")
    assert chosen(load("method.warmup.epochs=2", text=text)).warmup == Ramp(epochs=2.0)


def test_one_number_of_the_default(load) -> None:
    assert chosen(load()).warmup == Ramp()
    assert chosen(load("method.warmup.epochs=2")).warmup == Ramp(epochs=2.0)


def test_beside_numbers_and_nothing(load) -> None:
    assert chosen(load("method.temperature=0.2")).temperature == 0.2
    assert chosen(load("method.temperature=ramp")).temperature == Ramp()
    assert chosen(load("method.temperature={name: ramp, epochs: 1}")).temperature == Ramp(epochs=1.0)
    assert chosen(load()).cooldown is None
    assert chosen(load("method.cooldown=never")).cooldown == Never()
    assert chosen(load("method.cooldown=null")).cooldown is None


def test_what_is_written_names_the_variant_and_loads_again(load, tmp_path: Path) -> None:
    loaded = load("method.warmup=never", text=SHORT)
    text = loaded.to_yaml(origins=True)
    assert "  solver:\n    name: exact" in text and "  warmup:\n    name: never" in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(str(again)).recipe.method == loaded.recipe.method


def test_origins_of_a_variant(load) -> None:
    origins = load("method.warmup.epochs=2", text=SHORT).origins
    assert origins["method.solver.name"] == "recipe"
    assert (origins["method.warmup.name"], origins["method.warmup.epochs"]) == ("default", "override")
    origins = load("method.solver={name: descent, step: 1}", text=SHORT).origins
    assert (origins["method.solver.step"], origins["method.solver.tol"]) == ("override", "default")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("method.solver.stp=3", "override: method.solver.stp: unknown key; did you mean method.solver.step?"),
        (
            "method.solver.STEP=3",
            "override: method.solver.STEP: unknown key; did you mean method.solver.step?",
        ),
        ("method.solver.step=0", "override: method.solver.step: must be positive, got 0.0"),
        (
            "method.solver.name=descend",
            "override: method.solver.name: must be one of exact, descent, momentum; got 'descend'; "
            "did you mean descent?",
        ),
        (
            "method.solver=Exact",
            "override: method.solver: must be one of exact, descent, momentum; got 'Exact'; did you mean exact?",
        ),
        (
            "method.solver={step: 1}",
            "override: method.solver.name: missing key; one of exact, descent, momentum",
        ),
        ("method.solver=null", "override: method.solver: missing key; one of exact, descent, momentum"),
        ("method.solver=3", "override: method.solver: must be one of exact, descent, momentum; got 3"),
        (
            "method.solver=descent",
            "override: method.solver.step: missing key; method.solver descent needs it",
        ),
        (
            "method.warmup.epochz=2",
            "override: method.warmup.epochz: unknown key; did you mean method.warmup.epochs?",
        ),
        ("method.warmup.step=2", "override: method.warmup.step: unknown key (known: name, epochs)"),
        (
            "method.warmup={name: never, epochs: 2}",
            "override: method.warmup.epochs: not a key of method.warmup never, but of ramp",
        ),
        ("method.temperature=[1]", "override: method.temperature: expected a number, got [1]"),
        ("method.temperature=rump", "override: method.temperature: expected a number, got 'rump'"),
        (
            "method.kind=Samee",
            "override: method.kind: must be one of same, other; got 'Samee'; did you mean same?",
        ),
        ("method.order=3", "override: method.order: must be one of 1, 2; got 3"),
        ("method.order=true", "override: method.order: must be one of 1, 2; got True"),
        ("method.tau=3", "override: method.tau: renamed: use method.temperature"),
        ("method.pgd.eta=3", "override: method.pgd.eta: renamed: use method.solver.step"),
        ("method.name.x=3", "override: method.name: expected text, got {'name': 'chooser', 'x': 3}"),
    ],
)
def test_what_is_refused(load, overrides: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(overrides)
    assert str(caught.value) == said


def test_an_old_name_is_refused_at_its_line(load, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text=TEXT.replace("  solver:", "  pgd:\n    eta: 3\n  solver:"))
    assert str(caught.value) == f"{tmp_path}/mine.yaml:6: method.pgd.eta: renamed: use method.solver.step"


def test_from_one_variant_to_another(load, tmp_path: Path) -> None:
    """Changing the name alone leaves the file's keys: they are refused, and what to do stands there."""
    with pytest.raises(RecipeError) as caught:
        load("method.solver.name=exact")
    assert str(caught.value) == (
        f"{tmp_path}/mine.yaml:7: method.solver.step: not a key of method.solver exact, but of descent, momentum; "
        "overriding method.solver.name keeps the other keys: override all of method.solver, "
        "'method.solver={name: ..., ...}'"
    )
    assert chosen(load("method.solver={name: exact}")).solver == Exact()


def test_the_closest_name() -> None:
    assert closest("LR", ["lr", "lr_scaling"]) == "lr"
    assert closest("resnet5", ["ResNet50", "alexnet"]) == "ResNet50"
    assert closest("zzz", ["lr"]) == "" == did_you_mean("zzz", ["lr"])
    assert did_you_mean("vit_smal", ["vit_small"], prefix="timm/") == "; did you mean timm/vit_small?"
