"""Show the keys in which two recipes differ, defaults included."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs=2, metavar="RECIPE", help="bundled name or file")


def run(args: argparse.Namespace) -> int:
    from sslzoo.recipe.load import leaves, load_recipe

    sides = [load_recipe(name).recipe for name in args.recipes]
    values = [{key: _short(value) for key, value in leaves(side) if key != "name"} for side in sides]
    keys = [*values[0], *(key for key in values[1] if key not in values[0])]
    rows = [(key, values[0].get(key, "-"), values[1].get(key, "-")) for key in keys]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return 0
    rows = [("", *args.recipes), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")
    return 0


def _short(value: Any) -> str:
    """Format a value for the table; long lists are shortened but still tell different lists apart."""
    if isinstance(value, list) and len(str(value)) > 60:
        return f"{len(value)} items: {value[0]} .. {value[-1]}"
    return str(value)
