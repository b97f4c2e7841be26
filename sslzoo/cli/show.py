"""Show a recipe with all its values and their origins.

The output is itself a recipe: sslzoo show NAME optim.lr=0.1 > mine.yaml
"""

from __future__ import annotations

import argparse
import sys

STYLES = {
    "default": "dim",
    "recipe": "green",
    "override": "bold yellow",
    "dataset": "magenta",
    "derived": "cyan",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="bundled name or file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as optim.lr=0.3")


def run(args: argparse.Namespace) -> int:
    from sslzoo.recipe.load import load_recipe

    loaded = load_recipe(args.recipe, args.overrides)
    text = f"# {loaded.source}\n{loaded.to_yaml(origins=True)}"
    if sys.stdout.isatty():
        _coloured(text)
    else:
        print(text, end="")
    return 0


def _coloured(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in text.splitlines():
        value, mark, origin = line.rpartition("# ")
        console.print(
            Text(value) + Text(mark + origin, style=STYLES.get(origin, "cyan")) if mark else Text(line)
        )
