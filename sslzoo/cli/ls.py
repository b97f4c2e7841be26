"""List methods, recipes and data sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS

KINDS = ("methods", "recipes", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="|".join(KINDS), help="only these")


def run(args: argparse.Namespace) -> int:
    listed = {
        "methods": {name: point.value for name, point in registry.methods().items()},
        "recipes": {name: _headline(path) for name, path in registry.recipes().items()},
        "datasets": {name: info.description for name, info in DATASETS.items()},
    }
    for kind, entries in listed.items():
        if args.kind not in (None, kind):
            continue
        if args.kind is None:
            print(f"{kind}:")
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            print(f"{'' if args.kind else '  '}{name:{width}}  {text}".rstrip())
    return 0


def _headline(path: Path) -> str:
    """The first line of a recipe, which says what it is."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()
