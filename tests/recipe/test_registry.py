"""Plug-ins: several methods in one package, and methods, encoders and data sets named as ``module:attribute``."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sslzoo.recipe import registry
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import configs, method_class, method_config, methods
from tests.command import ROOT, fork, write_recipe


@pytest.mark.parametrize("name", methods())
def test_a_registered_config_is_the_one_of_its_method(name: str) -> None:
    assert name in configs(), "a method of ours is checked without torch"
    assert method_config(name) is method_class(name).Config


def test_two_methods_of_one_package_get_each_its_own_config(tmp_path: Path) -> None:
    """The first's config stands in the package, as it often does; one of the two registers none."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "__init__.py").write_text("from two.a import AConfig as Config\n")
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.py").write_text(
            textwrap.dedent(
                f"""
                from dataclasses import dataclass
                from sslzoo.recipe.sections import MethodConfig

                @dataclass(frozen=True, kw_only=True)
                class {name.upper()}Config(MethodConfig):
                    of_{name}: float

                class {name.upper()}:
                    Config = {name.upper()}Config
                """
            )
        )
    info = tmp_path / "two-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: two\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[sslzoo.methods]\na = two.a:A\nb = two.b:B\n[sslzoo.configs]\na = two.a:AConfig\n"
    )
    code = "from sslzoo.recipe.registry import method_config as c; print(c('a').__name__, c('b').__name__)"
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "methods", ROOT / "recipes")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
    )
    assert done.stdout == "AConfig BConfig\n", done.stderr


PLUGINS = """
import numpy as np
from torch import nn

from sslzoo.data.sources import ArraySource


class Encoder(nn.Sequential):
    def __init__(self, in_channels, width=8):
        super().__init__(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = width


def scans(cfg, channels):
    n = {"train": 96, "test": 40}[cfg.split]
    images = np.arange(n * channels * 144, dtype=np.uint8).reshape(n, channels, 12, 12)
    return ArraySource("scans", cfg.split, images, np.arange(n) % 4, tuple("abcd"))


def nothing(cfg, channels):
    return None
"""


def test_encoder_and_data_set_of_ones_own_stand_beside_the_recipe(tmp_path: Path) -> None:
    """From any directory, through the command."""
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    mine.mkdir()
    elsewhere.mkdir()
    recipe = write_recipe(mine)
    (mine / "my_plugins.py").write_text(PLUGINS)
    changes = (
        "backbone.name=my_plugins:Encoder",
        "backbone.options={width: 16}",
        "data.dataset=my_plugins:scans",
    )
    run = fork(elsewhere, "fit", "--recipe", recipe, "--out", "run", *changes)
    assert run.wait() == 0, run.said
    assert "Faulty on my_plugins:Encoder, 16 features" in run.out and "my_plugins:scans, 96 images" in run.out

    for wrong, said in (
        ("backbone.name=my_plugins:Nothing", "backbone.name 'my_plugins:Nothing' cannot be loaded"),
        (
            "backbone.name=no_such_module:X",
            "backbone.name 'no_such_module:X' cannot be loaded: No module named",
        ),
        (
            "data.dataset=my_plugins:nothing",
            "data.dataset='my_plugins:nothing' returned NoneType, not an ImageSource",
        ),
        (
            "data.dataset=my_plugins:scans data.augment_on=worker",
            "data.augment_on must be device or left out: my_plugins:scans is in memory",
        ),
    ):
        refused = fork(elsewhere, "fit", "--recipe", recipe, "--out", "refused", *wrong.split())
        assert refused.wait() == 2 and said in refused.err and len(refused.err.splitlines()) == 1, (
            refused.said
        )


def test_a_plugin_leaves_the_search_path_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text("VALUE = 5\n")
    recipe = write_recipe(tmp_path)
    before = list(sys.path)
    load_recipe(str(recipe))
    assert registry.plugin("once:VALUE", "method.name") == 5
    assert sys.path == before
