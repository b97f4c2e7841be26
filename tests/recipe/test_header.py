"""What the headers of the bundled recipes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslzoo.recipe.header import Variant, header
from sslzoo.recipe.load import leaves, load_recipe
from sslzoo.recipe.registry import recipes

ALSO = [(name, variant) for name, path in recipes().items() for variant in header(path).also]


@pytest.mark.parametrize(("name", "variant"), ALSO, ids=lambda x: x if isinstance(x, str) else x.description)
def test_variants_are_fine_and_change_something(name: str, variant: Variant) -> None:
    assert variant.description
    bundled, changed = (
        dict(leaves(load_recipe(name, overrides).recipe)) for overrides in ((), variant.overrides)
    )
    for override in variant.overrides:
        key = override.partition("=")[0]
        of_key = [{k: v for k, v in x.items() if f"{k}.".startswith(f"{key}.")} for x in (bundled, changed)]
        assert of_key[0] != of_key[1], f"{key} changes nothing"


def test_a_header_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Mine, on mice. arXiv:1\n#   sslzoo fit --recipe mine\n"
        "# also: optim.lr=2 'probe.data=[{dataset: cifar10}]'   faster\nseed: 1  # also: seed=3   other seed\n"
    )
    read = header(tmp_path / "mine.yaml")
    assert read.title == "Mine, on mice. arXiv:1"
    assert read.also == (
        Variant(overrides=("optim.lr=2", "probe.data=[{dataset: cifar10}]"), description="faster"),
    )
