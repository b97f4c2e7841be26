"""Files and overrides that are no recipes: too large once expanded, too deep, in a circle, or not what YAML says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sslzoo.recipe import registry
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.text import MAX_BYTES, MAX_DEPTH

NAME = "quickstart"
RECIPE = registry.recipes()[NAME].read_text()
LEVELS = range(1, 12)


def tenfold(first: str, level: str, each: str) -> str:
    """Level by level ten times the one before: 10^11 values in the end."""
    return first + "".join(level.format(i=i, ten=", ".join([each.format(i=i - 1)] * 10)) for i in LEVELS)


TOO_MUCH = {
    "aliases": (
        tenfold("a0: &a0 [1, 1]\n", "a{i}: &a{i} [{ten}]\n", "*a{i}"),
        "not a recipe: it holds more than 10,000 values",
    ),
    "merged aliases": (
        tenfold("a0: &a0 {x: 1}\n", "a{i}: &a{i} {{<<: [{ten}]}}\n", "*a{i}"),
        "not a recipe: it holds more than 10,000 values",
    ),
    "references": (
        tenfold("a0: [1, 1]\n", "a{i}: [{ten}]\n", "'${{a{i}}}'"),
        "too large with references: it holds more than 10,000 values",
    ),
    "text that doubles": (
        "a0: xyz\n" + "".join(f"a{i}: '${{a{i - 1}}}${{a{i - 1}}}${{a{i - 1}}}'\n" for i in LEVELS),
        "too large with references: it holds more than 10,000 values",
    ),
    "a long list": ("a: [" + "1, " * 21_000 + "]\n", "not a recipe: it holds more than 10,000 values"),
    "a long file": ("#" * MAX_BYTES + "\n", "not a recipe: it has more than 1,000,000 bytes"),
    "deep lists": ("a: " + "[" * 100_000, f"not a recipe: it is more than {MAX_DEPTH} levels deep"),
    "deep mappings": (
        "".join(" " * i + "a:\n" for i in range(40)),
        f"not a recipe: it is more than {MAX_DEPTH} levels deep",
    ),
    "a chain of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 400)),
        f"not a recipe: it is more than {MAX_DEPTH} levels deep",
    ),
    "a chain of references": (
        "a0: [1]\n" + "".join(f"a{i}: ['${{a{i - 1}}}']\n" for i in range(1, 400)),
        f"too large with references: it is more than {MAX_DEPTH} levels deep",
    ),
    "a circle of aliases": ("a: &a [*a]\n", "not a recipe: one of its values contains itself"),
    "a circle of references": ("a: ['${b}', '${b}']\nb: ['${a}', '${a}']\n", "refers to itself"),
    "a number of 5,000 digits": (
        "a: " + "9" * 5000 + "\n",
        "not a recipe: it has a number of more than 64 bits",
    ),
    "a number of 30 digits": ("a: " + "9" * 30 + "\n", "a: must be a number of at most 64 bits"),
    "a list as a key": ("? [1, 2]\n: 3\n", "not a recipe: it has a key that is not text"),
    "a reference in a reference": ("a: ${seed.${name}}\n", "a: has a reference nested in another"),
    "a resolver": (
        "a: ${oc.create:x}\n",
        "a: ${oc.create:...} is unknown; use ${key} or ${oc.env:NAME,default}",
    ),
    "no reference": ("a: ${\n", "a: bad reference: "),
    "a tag that does not fit": ("a: !!int x\n", "not YAML: invalid literal for int()"),
    "a set": ("a: !!set {x}\n", "a: Value 'set' is not a supported primitive type"),
    "no key": ("null: 3\n", "Incompatible key type 'NoneType'"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_no_recipe_is(name: str, tmp_path: Path) -> None:
    text, said = TOO_MUCH[name]
    path = tmp_path / "mine.yaml"
    path.write_text(text + RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert said in str(caught.value) and re.match(r"\S+/mine\.yaml:\d+: ", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optim=" + "[" * 500,
            "optim: must be a value that a recipe can hold: it is more than 20 levels deep",
        ),
        ("optim=&a [*a]", "optim: must be a value that a recipe can hold: one of its values contains itself"),
        (
            "seed=" + "9" * 5000,
            "seed: must be a value that a recipe can hold: it has a number of more than 64 bits",
        ),
        ("optim={lr: 1, lr: 2}", "optim.lr: written twice; keep one"),
        ("seed=${seed}", "seed: refers to itself"),
        ("seed=!!int x", "seed: '!!int x' is not YAML: invalid literal"),
    ],
)
def test_overrides_that_no_recipe_holds(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(NAME, [override])
    assert str(caught.value).startswith(f"override: {said}")


def test_aliases_and_references_of_a_sane_size_stay(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = RECIPE.replace("  global_batch_size", "  split: &split test\n  global_batch_size")
    text = text.replace("eval: {", "eval: {test_split: *split, ").replace(
        "size: 28", "size: '${..views[0].size}'"
    )
    path.write_text(text)
    recipe = load_recipe(str(path)).recipe
    assert recipe.data.split == recipe.eval.test_split == "test"
    assert recipe.eval.size == recipe.views[0].size == 20


def test_the_command_refuses_a_bomb_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(TOO_MUCH["aliases"][0] + RECIPE)
    command = [sys.executable, "-m", "sslzoo", "validate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{path}:1: not a recipe: it holds more than 10,000 values\n"
