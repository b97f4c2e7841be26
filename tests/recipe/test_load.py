"""Recipes: what is accepted, what is refused and with which words, and where values come from."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

from sslzoo.checks import ConfigError
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS
from sslzoo.recipe.load import RecipeError, leaves, load_carried, load_recipe
from sslzoo.recipe.sections import MethodConfig, ViewConfig
from sslzoo.recipe.trainer_keys import OWNED, trainer_arguments

BASE = """\
seed: 1
backbone: {name: resnet18}
method:
  name: alpha
  temperature: 0.5
  widths: [8, 4]
data:
  dataset: cifar10
  global_batch_size: 64
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
views:
  - size: 32
    scale: [0.2, 1.0]
  - {size: 16, scale: [0.1, 0.2], role: local, count: 4}
optim:
  name: sgd
  lr: 0.1
  lr_scaling: linear
  weight_decay: 1e-6
  warmup_epochs: 1
probe: {holdout: 0.2}
eval: {every_epochs: 1, size: 32, knn_k: 20, knn_temperature: 0.07}
trainer: {max_epochs: 3}
"""


EVAL_SECTION = "eval: {every_epochs: 1, size: 32, knn_k: 20, knn_temperature: 0.07}\n"


@dataclass(frozen=True, kw_only=True)
class Ramp:
    start: float
    steps: int = 5


@dataclass(frozen=True, kw_only=True)
class Alpha(MethodConfig):
    temperature: float
    widths: tuple[int, ...]
    clip: float | None = None
    ramp: float | Ramp = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError("temperature", f"must be positive, got {self.temperature}; raise it")
        if self.clip == 0:
            raise ValueError("nothing is left of a gradient clipped to 0")


@dataclass(frozen=True, kw_only=True)
class Beta(MethodConfig):
    queue_size: int


@pytest.fixture(autouse=True)
def _two_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods ``alpha`` and ``beta``, registered as any package would register its own."""
    points, configs = {}, {}
    for name, config in (("alpha", Alpha), ("beta", Beta)):
        package = ModuleType(f"a_strangers_{name}")
        package.Config = config  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.__name__, package)
        value = f"a_strangers_{name}.method:Method"
        points[name] = registry.EntryPoint(name=name, value=value, group=registry.GROUP)
        value = f"{package.__name__}:Config"
        configs[name] = registry.EntryPoint(name=name, value=value, group=registry.CONFIGS)
    monkeypatch.setattr(registry, "methods", lambda: points)
    monkeypatch.setattr(registry, "configs", lambda: configs)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str = BASE) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_values_come_typed(write) -> None:
    recipe = load_recipe(write()).recipe
    assert recipe.method == Alpha(name="alpha", temperature=0.5, widths=(8, 4))
    assert recipe.views[0] == ViewConfig(size=32, scale=(0.2, 1.0))
    assert recipe.views[1].count == 4
    assert recipe.optim.weight_decay == 1e-6
    assert isinstance(recipe.optim.warmup_epochs, float)
    assert recipe.trainer == {"max_epochs": 3}
    assert recipe.name == "mine"
    assert recipe.logging.wandb is None


def test_null_switches_wandb_off(write) -> None:
    path = Path(write())
    path.write_text(path.read_text() + "\nlogging: {wandb: {project: x}}\n")
    assert load_recipe(str(path)).recipe.logging.wandb is not None
    assert load_recipe(str(path), ["logging.wandb=null"]).recipe.logging.wandb is None


def test_origins(write) -> None:
    origins = load_recipe(write(), ["optim.lr=1", "views.0.flip_p=0.5", "optim.momentum=0.5"]).origins
    assert origins["optim.lr"] == origins["views.0.flip_p"] == origins["optim.momentum"] == "override"
    assert origins["seed"] == origins["views.1.count"] == origins["trainer.max_epochs"] == "recipe"
    assert origins["views.0.count"] == origins["optim.nesterov"] == origins["logging.wandb"] == "default"
    assert origins["name"] == "derived"
    assert set(origins) == {key for key, _ in leaves(load_recipe(write()).recipe)}


@pytest.mark.parametrize("origins", [False, True])
def test_what_is_written_loads_again(write, tmp_path: Path, origins: bool) -> None:
    more = [
        "logging.wandb.project=x",
        "probe.data=[{dataset: stl10, split: train}]",
        f"data.root=/{'deep/' * 20}",
    ]
    loaded = load_recipe(write(), more)
    again = tmp_path / "again.yaml"
    again.write_text(loaded.to_yaml(origins=origins))
    assert load_recipe(str(again)).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("name: alpha", "name: mine:Method", "method.name"),
        ("resnet18}", 'resnet18, options: {a: "x:y"}}', ""),  # an argument is no code
        ("dataset: cifar10", "dataset: mine:scans", "data.dataset"),
        ("seed: 1", "seed: 1\nanalyses: [{name: mine:Spread}]", "analyses.0.name"),
        ("temperature: 0.07}", "temperature: 0.07, after: ['mine:PROTOCOL']}", "eval.after.0"),
        (
            "name: alpha\n  temperature: 0.5",
            "name: mine${method.temperature}\n  temperature: ':Method'",
            "method.name",
        ),
    ],
)
def test_a_recipe_in_a_checkpoint_names_no_code(
    write, tmp_path: Path, before: str, after: str, key: str
) -> None:
    text = Path(write()).read_text()
    carrier = tmp_path / "left.ckpt"
    assert load_carried(text, carrier).recipe == replace(load_recipe(write()).recipe, name="left")
    assert before in text
    text = text.replace(before, after, 1)
    if not key:
        assert load_carried(text, carrier).recipe.backbone.options == {"a": "x:y"}
        return
    with pytest.raises(RecipeError, match=rf"left\.ckpt:\d+: {key}: mine:\w+ is code .* by --recipe$"):
        load_carried(text, carrier)


def test_every_written_value_carries_its_origin(write) -> None:
    loaded = load_recipe(write(), ["optim.lr=1"])
    lines = loaded.to_yaml(origins=True).splitlines()
    assert [line.split() for line in lines if line.strip().startswith("lr:")] == [
        ["lr:", "1.0", "#", "override"]
    ]
    assert sum(not line.startswith("#") and "#" in line for line in lines) == len(loaded.origins)


@pytest.mark.parametrize(
    ("overrides", "place", "origin"),
    [
        ((), "device", "derived"),  # in memory
        (("data.dataset=folder", "trainer.accelerator=cpu"), "worker", "derived"),
        (("data.dataset=folder", "trainer.accelerator=gpu"), "device", "derived"),
        (("data.dataset=folder", "trainer.accelerator=auto"), None, "default"),
        (("data.dataset=folder", "trainer.accelerator=cpu", "data.augment_on=device"), "device", "override"),
    ],
)
def test_where_views_are_made(write, overrides: Sequence[str], place: str | None, origin: str) -> None:
    loaded = load_recipe(write(), ["data.root=photos", "data.split=train", *overrides])
    assert (loaded.recipe.data.augment_on, loaded.origins["data.augment_on"]) == (place, origin)
    assert load_recipe(write(loaded.to_yaml())).recipe == loaded.recipe


def test_images_in_memory_need_no_workers(write) -> None:
    with pytest.raises(
        RecipeError, match=r"data\.augment_on: must be device or left out: cifar10 is in memory"
    ):
        load_recipe(write(), ["data.augment_on=worker"])


def test_derived_values(write) -> None:
    loaded = load_recipe(write(), ["trainer.devices=2", "trainer.accumulate_grad_batches=4"])
    lengths = {"nominal_steps_per_epoch": 50_000 // 64, "nominal_total_steps": 3 * (50_000 // 64)}
    assert loaded.derived == {"peak_lr": 0.1 * 64 / 256, "micro_batch_size": 8} | lengths
    folder = load_recipe(write(), ["data.dataset=folder", "data.root=photos", "data.split=train"]).derived
    assert not lengths.keys() & folder.keys()
    long = load_recipe(write(), ["trainer.max_epochs=10000", "trainer.devices=2"])
    assert "# derived: nominal_total_steps = 7810000\n" in long.to_yaml(origins=True)
    assert "micro_batch_size" not in load_recipe(write(), ["trainer.devices=auto"]).derived


def test_environment_and_references(write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE.replace("size: 32, knn_k", "size: '${views.0.size}', knn_k")
    text = text.replace(
        "dataset: cifar10", "dataset: cifar10\n  root: ${oc.env:PLACE,here}/cifar\n  workers: ${oc.env:N,3}"
    )
    monkeypatch.delenv("PLACE", raising=False)
    recipe = load_recipe(write(text)).recipe
    assert (recipe.data.root, recipe.data.workers, recipe.eval.size) == ("here/cifar", 3, 32)
    monkeypatch.setenv("PLACE", "/there")
    monkeypatch.setenv("N", "7")
    recipe = load_recipe(write(text), ["views.0.size=48"]).recipe
    assert (recipe.data.root, recipe.data.workers, recipe.eval.size) == ("/there/cifar", 7, 48)


def test_overrides_reach_lists_and_sections_that_are_not_there(write) -> None:
    overrides = [
        "views.1.size=24",
        "logging.wandb.mode=offline",
        "method.ramp={start: 2}",
        "trainer.devices=[0,1]",
    ]
    recipe = load_recipe(write(), overrides).recipe
    assert recipe.views[1].size == 24
    assert recipe.logging.wandb is not None and recipe.logging.wandb.mode == "offline"
    assert isinstance(recipe.method, Alpha) and recipe.method.ramp == Ramp(start=2.0)
    assert recipe.trainer["devices"] == [0, 1]


# (what stands in BASE, what stands there instead, line, key, what is said)
FAULTS = {
    "typo": ("  lr: 0.1", "  lrr: 0.1", 18, "optim.lrr", "unknown key; did you mean optim.lr?"),
    "typo in a section's name": ("probe:", "prob:", 22, "prob", "unknown key; did you mean probe?"),
    "typo in a view": (
        "role: local",
        "rôle: local",
        15,
        "views.1.rôle",
        "unknown key; did you mean views.1.role?",
    ),
    "wrong section": (
        "dataset: cifar10",
        "dataset: cifar10\n  knn_k: 3",
        9,
        "data.knn_k",
        "unknown key; did you mean eval.knn_k?",
    ),
    "a method's key elsewhere": (
        "  lr: 0.1",
        "  lr: 0.1\n  widths: [3]",
        19,
        "optim.widths",
        "unknown key; did you mean method.widths, a key of alpha?",
    ),
    "another method's key": (
        "  temperature: 0.5",
        "  temperature: 0.5\n  queue_size: 3",
        6,
        "method.queue_size",
        "not a key of method alpha, but of beta",
    ),
    "a stranger": ("seed: 1", "seed: 1\nzzz: 3", 2, "zzz", "unknown key (known: seed, backbone, method"),
    "text for a number": ("  lr: 0.1", "  lr: fast", 18, "optim.lr", "expected a number, got 'fast'"),
    "a fraction for a count": ("seed: 1", "seed: 1.5", 1, "seed", "expected a whole number, got 1.5"),
    "true for a number": ("seed: 1", "seed: true", 1, "seed", "expected a whole number, got True"),
    "nothing for a number": ("  lr: 0.1", "  lr:", 18, "optim.lr", "expected a number, got null"),
    "a number for a list": ("[0.2, 1.0]", "0.2", 14, "views.0.scale", "expected a list, got 0.2"),
    "a list too short": ("[0.2, 1.0]", "[0.2]", 14, "views.0.scale", "expected a list of 2, got [0.2]"),
    "a list for a section": (
        "probe: {holdout: 0.2}",
        "probe: [1]",
        22,
        "probe",
        "expected a section with the keys",
    ),
    "missing": ("  lr: 0.1\n", "", 16, "optim.lr", "missing key; optim sgd needs it"),
    "missing section": (EVAL_SECTION, "", 1, "eval", "missing key; every recipe must set it"),
    "missing in the method": ("  temperature: 0.5\n", "", 3, "method.temperature", "missing key"),
    "missing name of the method": ("  name: alpha\n", "", 3, "method.name", "missing key; name a registered"),
    "range": ("  lr: 0.1", "  lr: -1", 18, "optim.lr", "must be positive, got -1.0"),
    "range in a view": (
        "[0.2, 1.0]",
        "[0.2, 1.5]",
        14,
        "views.0.scale",
        "must satisfy 0 < low <= high <= 1, got (0.2, 1.5)",
    ),
    "choice": (
        "name: sgd",
        "name: sdg",
        17,
        "optim.name",
        "must be one of lars, sgd, adam, adamw; got 'sdg'; did you mean sgd?",
    ),
    "range in the method": (
        "temperature: 0.5",
        "temperature: 0",
        5,
        "method.temperature",
        "must be positive, got 0.0; raise it",
    ),
    "a stranger's own words": (
        "temperature: 0.5",
        "temperature: 0.5\n  clip: 0",
        3,
        "method",
        "nothing is left of a gradient clipped to 0",
    ),
    "unknown method": ("alpha", "alpah", 4, "method.name", "unknown method 'alpah'; did you mean alpha?"),
    "unknown data set": ("cifar10", "cifar11", 8, "data.dataset", "did you mean cifar10"),
    "unknown split": (
        "dataset: cifar10",
        "dataset: cifar10\n  split: tset",
        9,
        "data.split",
        "cifar10 has no split 'tset'; did you mean test?",
    ),
    "channels": (
        "[0.5, 0.5, 0.5]\n  std: [0.5, 0.5, 0.5]",
        "[0.5]\n  std: [0.5]",
        2,
        "backbone.in_channels",
        "3 channels, but",
    ),
    "broken YAML": ("widths: [8, 4]", "widths: [8, 4", 7, "", "not YAML: "),
    "a circle": ("seed: 1", "seed: &a [*a]", 1, "", "one of its values contains itself"),
    "no text": ("seed: 1", "seed: \0", 1, "", "not YAML: "),
    "no method": ("alpha", "os:getcwd", 4, "method.name", "has no attribute 'Config'"),
    "no processes": (
        "max_epochs: 3",
        "max_epochs: 3, num_nodes: 0",
        24,
        "trainer.num_nodes",
        "must be positive, got 0",
    ),
    "a key twice": ("seed: 1\n", "seed: 1\nseed: 2\n", 2, "seed", "written twice, first in line 1; keep one"),
    "a reference to nothing": (
        "  lr: 0.1",
        "  lr: ${nope}",
        18,
        "optim.lr",
        "Interpolation key 'nope' not found",
    ),
    "an unset variable": (
        "cifar10",
        "${oc.env:SSLZOO_NOT_SET}",
        8,
        "data.dataset",
        "\"Environment variable 'SSLZOO_NOT_SET' not found\"; set it, or give a default",
    ),
    "no views": (
        BASE[BASE.index("views:") : BASE.index("optim:")],
        "views: []\n",
        12,
        "views",
        "at least one view",
    ),
    "Lightning's typo": (
        "max_epochs: 3",
        "max_epochs: 3, acumulate_grad_batches: 2",
        24,
        "trainer.acumulate_grad_batches",
        "unknown key; did you mean trainer.accumulate_grad_batches?",
    ),
    "Lightning's type": (
        "max_epochs: 3",
        "max_epochs: 3, sync_batchnorm: 2",
        24,
        "trainer.sync_batchnorm",
        "expected true or false, got 2",
    ),
    "no length": (
        "{max_epochs: 3}",
        "{devices: 1}",
        24,
        "trainer.max_epochs",
        "missing key; every recipe must set it",
    ),
    "an endless run": (
        "max_epochs: 3",
        "max_epochs: -1",
        24,
        "trainer.max_epochs",
        "must be positive, got -1",
    ),
    "a key that is ours": (
        "max_epochs: 3",
        "max_epochs: 3, logger: false",
        24,
        "trainer.logger",
        "cannot be set in a recipe",
    ),
    "a batch that does not divide": (
        "{max_epochs: 3}",
        "{max_epochs: 3, devices: 7}",
        9,
        "data.global_batch_size",
        "make it a multiple of 7",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_line_and_key(write, name: str) -> None:
    old, new, line, key, said = FAULTS[name]
    assert BASE.count(old) >= 1
    path = write(BASE.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{line}: {key}: " if key else f"{path}:{line}: ")
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", "override: optim.lr: an override has the form dotted.key=value, such as optim.lr=0.3"),
        ("=3", "override: =3: an override has the form"),
        ("optim.lrr=3", "override: optim.lrr: unknown key; did you mean optim.lr?"),
        ("optim.lr=-3", "override: optim.lr: must be positive, got -3.0"),
        ("optim.lr=[1", "override: optim.lr: '[1' is not YAML"),
        (
            "views.2.size=3",
            "override: views.2.size: views is a list of 2; use an index from 0, or override the whole list",
        ),
        ("views.a.size=3", "override: views.a.size: views is a list of 2"),
        ("seed.x=3", "override: seed.x: seed is 1, which has no keys"),
        ("method.name=gamma", "override: method.name: unknown method 'gamma'"),
        ("probe.layers=[nope]", "override: probe.layers: no layer nope to probe: alpha publishes backbone"),
    ],
)
def test_faults_of_overrides(write, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(), [override])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list"])
def test_a_file_that_is_no_recipe(write, text: str) -> None:
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys"):
        load_recipe(write(text))


def test_an_unknown_recipe() -> None:
    name = next(iter(registry.recipes()))
    with pytest.raises(RecipeError, match=rf"no recipe '{name}x'.*did you mean {name}\?"):
        load_recipe(name + "x")


def test_trainer_arguments_are_lightnings() -> None:
    import inspect

    from lightning.pytorch import Trainer

    signature = inspect.signature(Trainer.__init__).parameters
    assert set(trainer_arguments()) == set(signature) - {"self"}
    assert set(OWNED) < set(signature)


def test_every_bundled_recipe_is_known() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "sslzoo_recipes"
    assert set(registry.recipes()) == {path.stem for path in folder.glob("*.yaml")}
    assert len(registry.recipes()) >= 7


@pytest.mark.parametrize("name", registry.recipes())
def test_bundled_recipes_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real methods
    monkeypatch.delenv("SSLZOO_DATA_DIR", raising=False)
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert load_recipe(f"{name}.yaml").recipe == loaded.recipe
    header = loaded.source.read_text().partition("seed:")[0]
    for said in ("arXiv:", f"sslzoo fit --recipe {name}", "[GC]PU", "published:", "ours:"):
        assert re.search(said, header), f"the header comment lacks {said!r}"


LEFT_OUT = BASE.replace("  mean: [0.5, 0.5, 0.5]\n  std: [0.5, 0.5, 0.5]\n", "")


def test_mean_and_std_are_the_data_set_s(write) -> None:
    loaded = load_recipe(write(LEFT_OUT))
    assert (loaded.recipe.data.mean, loaded.recipe.data.std) == (
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    )
    assert loaded.origins["data.mean"] == loaded.origins["data.std"] == "dataset"
    assert load_recipe(write(), ["data.mean=null", "data.std=null"]).recipe == loaded.recipe
    assert load_recipe(write(LEFT_OUT), ["data.dataset=stl10"]).recipe.data.std == DATASETS["stl10"].std
    own = load_recipe(write(LEFT_OUT), ["data.mean=[0,0,0]", "data.std=[1,1,1]"])
    assert own.recipe.data.std == (1, 1, 1) and own.origins["data.std"] == "override"


def test_classes_are_a_list_or_the_name_of_one(write) -> None:
    loaded = load_recipe(write(LEFT_OUT), ["data.dataset=imagenet100"])
    assert (loaded.recipe.data.classes, loaded.origins["data.classes"]) == ("imagenet100_cmc", "dataset")
    assert loaded.recipe.data.class_names[0] == "n02869837"
    assert loaded.derived["nominal_steps_per_epoch"] == 126_689 // 64
    first = load_recipe(write(LEFT_OUT), ["data.dataset=imagenet100", "data.classes=imagenet100_first"])
    assert first.recipe.data.class_names == tuple(sorted(first.recipe.data.class_names))
    assert first.derived["nominal_steps_per_epoch"] == 129_395 // 64
    listed = load_recipe(write(LEFT_OUT), ["data.dataset=imagenet1k", "data.classes=[n02869837]"])
    assert listed.recipe.data.class_names == ("n02869837",)
    probe = "probe.data=[{dataset: imagenet100}, {dataset: cifar10}]"
    assert [s.classes for s in load_recipe(write(), [probe]).recipe.probe.data] == ["imagenet100_cmc", ()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.dataset=imagefolder"],
            "data.mean: missing key; imagefolder has no known statistics: set both, such as ImageNet's "
            "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]",
        ),
        (["data.dataset=my.scans:read"], "data.mean: missing key; my.scans:read has no known statistics"),
        (["data.mean=[0,0,0]"], "data.std: missing key; data.mean is set, and both are needed"),
        (
            ["data.dataset=folder", "backbone.in_channels=1"],
            "data.std=[0.229,0.224,0.225] with backbone.in_channels=3, or one number each to read the images in grey",
        ),
        (["data.dataset=cifar11"], "data.dataset: unknown data.dataset 'cifar11'; did you mean cifar10?"),
        (
            ["data.dataset=fashion_mnist"],
            "backbone.in_channels: 3 channels, but fashion_mnist has data.mean=[0.286]; set backbone.in_channels=1",
        ),
        (
            ["data.classes=imagenet100cmc"],
            "unknown class list 'imagenet100cmc'; did you mean imagenet100_cmc?",
        ),
        (["data.classes=[1]"], "data.classes.0: expected text, got 1"),
    ],
)
def test_what_no_data_set_can_give(write, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(LEFT_OUT), overrides)


@pytest.mark.parametrize("name", registry.recipes())
def test_bundled_recipes_leave_to_the_data_set_what_is_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real methods
    loaded = load_recipe(name)
    data, info = loaded.recipe.data, DATASETS[loaded.recipe.data.dataset]
    stated = {key for key, origin in loaded.origins.items() if origin == "recipe"}
    assert ((data.mean, data.std) == (info.mean, info.std)) != ("data.mean" in stated)
    assert isinstance(data.classes, str) or not data.classes, "a list of classes belongs into the catalogue"
