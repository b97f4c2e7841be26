"""List methods, recipes and data sets."""

from __future__ import annotations

import argparse

from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS
from sslzoo.recipe.header import header

KINDS = ("methods", "recipes", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="|".join(KINDS), help="only these")


def run(args: argparse.Namespace) -> int:
    listed = {
        "methods": {name: point.value for name, point in registry.methods().items()},
        "recipes": {name: header(path).title for name, path in registry.recipes().items()},
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
