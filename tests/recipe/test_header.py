"""What the headers of the bundled recipes say, and how recipes relate to one another."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sslzoo.recipe import registry
from sslzoo.recipe.header import Header, Variant, read_header
from sslzoo.recipe.load import RecipeError, leaves, load_recipe
from sslzoo.recipe.registry import recipes

_spec = importlib.util.spec_from_file_location("update", Path(__file__).parents[2] / "docs/results/update.py")
assert _spec is not None and _spec.loader is not None
update: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(update)

ALSO = [(name, variant) for name, path in recipes().items() for variant in read_header(path).also]

# All that a recipe does not share with the one named: leaves, or whole sections of them.
SMALL_DATA = {"data.dataset", "data.mean", "data.std", "eval.size", "views.size"}
STL10 = {"data.dataset", "data.mean", "data.std", "data.split", "probe.data"}
CLASSES = {"data.classes", "data.dataset", "trainer.devices"}
FAMILIES: dict[str, tuple[str, set[str]]] = {
    "sce_in1k_100ep": ("sce_in1k", {"optim.lr", "trainer.max_epochs"}),
    "sce_in1k_300ep": ("sce_in1k", {"trainer.max_epochs"}),
    "sce_in1k_1000ep": ("sce_in1k", {"optim.weight_decay", "trainer.max_epochs"}),
    "sce_in1k_multicrop": ("sce_in1k", {"views", "method.projector.widths", "trainer.num_nodes"}),
    "sce_tiny_imagenet": (
        "sce_cifar10",
        SMALL_DATA | {"backbone.stem", "method.momentum", "method.queue_size"},
    ),
    "sce_stl10": ("sce_tiny_imagenet", STL10 | {"eval.resize"}),
    "simclr_tiny_imagenet": (
        "simclr_cifar10",
        SMALL_DATA | {"backbone.stem", "trainer.max_epochs", "views.blur_p", "views.blur_kernel"},
    ),
    "simclr_stl10": ("simclr_tiny_imagenet", STL10 | {"eval.resize"}),
    "simclr_in100": (
        "simclr_in1k",
        CLASSES
        | {"data.global_batch_size", "data.workers", "optim.lr", "optim.lr_scaling", "trainer.max_epochs"},
    ),
    "sogclr_tiny_imagenet": ("sogclr_cifar100_r18", SMALL_DATA | {"views.blur_p", "views.blur_kernel"}),
    "sogclr_stl10": ("sogclr_tiny_imagenet", STL10 | {"eval.resize"}),
    "sogclr_in100": ("sogclr_in1k_pt", CLASSES | {"trainer.max_epochs"}),
    "sogclr_in1k_pt": ("sogclr_in1k", {"backbone.options", "method.projector.output_norm", "views"}),
    "mmcl_tiny_imagenet": ("mmcl_cifar100", SMALL_DATA | {"views.blur_kernel"}),
    "mmcl_in100": (
        "mmcl_in1k",
        CLASSES | {"data.global_batch_size", "optim.warmup_epochs", "trainer.max_epochs"},
    ),
    "metaug_in100": (
        "metaug_in1k",
        CLASSES | {"data.global_batch_size", "data.workers", "optim"},
    ),
    "margin_byol_cifar10": (
        "margin_mocov3_cifar10",
        {"method.base", "method.projector", "optim.lr", "optim.weight_decay"},
    ),
    "margin_mocov3_tiny_imagenet": (
        "margin_mocov3_cifar10",
        SMALL_DATA | {"backbone.stem", "trainer.max_epochs"},
    ),
    # The same data, views and optimiser for every method that needs no others.
    "sogclr_fashion_mnist": ("simclr_fashion_mnist", {"method", "optim.warmup_ramp"}),
    "mmcl_fashion_mnist": ("simclr_fashion_mnist", {"method"}),
    "margin_fashion_mnist": ("simclr_fashion_mnist", {"method", "analyses"}),
    "sce_fashion_mnist": ("simclr_fashion_mnist", {"method", "eval.every_epochs", "trainer.max_epochs"}),
    "metaug_fashion_mnist": ("simclr_fashion_mnist", {"method", "eval.every_epochs", "trainer.max_epochs"}),
}


@pytest.mark.parametrize(("name", "other", "apart"), [(n, o, a) for n, (o, a) in FAMILIES.items()])
def test_families_differ_in_nothing_else(name: str, other: str, apart: set[str]) -> None:
    a, b = (dict(leaves(load_recipe(n).recipe)) for n in (name, other))
    absent = object()
    differ = {key for key in a | b if key != "name" and a.get(key, absent) != b.get(key, absent)}
    differ = {re.sub(r"^views\.\d+", "views", key) for key in differ}

    def parts(section: str) -> set[str]:
        return {key for key in differ if f"{key}.".startswith(f"{section}.")}

    assert differ - set().union(*map(parts, apart)) == set(), "they have drifted apart"
    assert [section for section in apart if not parts(section)] == [], "these are the same by now"


@pytest.mark.parametrize(("name", "variant"), ALSO, ids=lambda x: x if isinstance(x, str) else x.description)
def test_variants_are_fine_and_change_something(name: str, variant: Variant) -> None:
    assert variant.description
    assert 1 <= len(variant.split()) <= 3, "a recipe of its own"
    changed = load_recipe(name, variant.split()).recipe
    for override in variant.split():
        others = [other for other in variant.split() if other != override]
        with suppress(RecipeError):  # the others cannot do without it
            assert load_recipe(name, others).recipe != changed, f"{override} changes nothing"


@pytest.mark.parametrize("name", recipes())
def test_figures_are_given_or_said_to_be_missing(name: str) -> None:
    text = recipes()[name].read_text()
    read = read_header(recipes()[name])
    for key, missing, figures in (
        ("published", "not available", read.published),
        ("ours", "not run", read.ours),
    ):
        assert len(re.findall(rf"^# {key}: ", text, re.M)) == 1
        assert bool(figures) != bool(re.search(rf"^# {key}: {missing}", text, re.M))
    assert not read.published or re.search(r"^# published: .*\(", text, re.M), "a figure needs its source"
    if read.published:
        said = re.search(r"^# published: .* protocol not (offered here|stated) \(", text, re.M)
        assert bool(read.protocol) != bool(said), "a figure needs its protocol"
        assert not read.protocol or (read.protocol in registry.protocols() and read.source)


@pytest.mark.parametrize("name", recipes())
def test_figures_of_ours_are_those_of_committed_results(name: str) -> None:
    text = recipes()[name].read_text()
    assert update.with_ours(text, update.ours(name)) == text, "run python docs/results/update.py"


def test_results_are_taken_from_finished_runs_of_bundled_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "FOLDER", tmp_path)
    flat = json.loads(json.dumps(dict(leaves(load_recipe("quickstart", ["seed=7"]).recipe))))
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)

    def write(changes: dict[str, object], **figures: float) -> None:
        manifest = {
            "recipe": flat | changes,
            "exit_code": 0,
            "started": "today",
            "hardware": {"host": "mine"},
        }
        (run / "manifest.json").write_text(json.dumps(manifest))
        (run / "eval/summary.json").write_text(json.dumps(figures))

    write({"optim.lr": 3.0, "data.root": "/else"}, honest_top1=0.5)
    with pytest.raises(ValueError, match=r"differs from the bundled recipe in optim\.lr$"):
        update.take(run)
    assert update.ours("quickstart") == "# ours: not run\n"
    write({}, honest_top1=0.5, raw_pixels_honest_top1=0.25)
    taken = json.loads(update.take(run).read_text())
    assert taken["run"] == {"started": "today"}  # no machine
    write({"seed": 42}, honest_top1=0.75, raw_pixels_honest_top1=0.25)
    update.take(run)
    expected = "# ours: 75.0, 50.0 % linear top-1, protocol honest, seeds 42, 7 (raw pixels 25.0, 25.0)\n"
    assert update.ours("quickstart") == expected
    text = "# title\n# ours: not run\n# still ours\n# published: not available\nseed: 1\n"
    assert update.with_ours(text, expected) == f"# title\n{expected}# published: not available\nseed: 1\n"


def test_a_header_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Mine, on mice. arXiv:1\n#   sslzoo fit --recipe mine\n"
        "# also: optim.lr=2 'probe.data=[{dataset: cifar10}]'   faster\n"
        "# published: 71.0 % linear top-1, protocol fast (README\n# of the code; or so)\n"
        "# ours: 70.5, 70 % linear top-1, seeds 1, 2\n"
        "seed: 1\n# also: seed=3   another seed\n"
    )
    read = read_header(tmp_path / "mine.yaml")
    assert read == Header(
        title="Mine, on mice. arXiv:1",
        also=(Variant(overrides="optim.lr=2 'probe.data=[{dataset: cifar10}]'", description="faster"),),
        published=("71.0",),
        protocol="fast",
        source="README of the code; or so",
        ours=("70.5", "70"),
    )
    assert read.also[0].split() == ["optim.lr=2", "probe.data=[{dataset: cifar10}]"]
    (tmp_path / "mine.yaml").write_text("# published: not available; without a margin 90 % linear top-1\n")
    assert read_header(tmp_path / "mine.yaml").published == ()


def test_recipes_for_several_machines_say_how_to_start_them() -> None:
    several = {name: path for name in recipes() if (path := load_recipe(name)).recipe.nodes > 1}
    assert several
    for name, loaded in several.items():
        header = " ".join(
            line.lstrip("# ") for line in loaded.source.read_text().splitlines() if line[:1] == "#"
        )
        assert f" sslzoo submit --recipe {name} " in header
        recipe = loaded.recipe
        assert f" torchrun --nnodes {recipe.nodes} --nproc-per-node {recipe.devices} --rdzv-" in header
        assert f" -m sslzoo fit --recipe {name} --out DIR --resume auto " in header
