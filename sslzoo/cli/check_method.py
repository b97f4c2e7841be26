"""Put a method to the test: one row for each promise of the contract; exit code 1 where one is broken.

The method is a registered name, or module:Class, installed or in the working directory. It is tried in seconds on
generated images, with everything small but itself: on its first bundled recipe with embedded images, on --recipe, or
on its config's defaults. Overrides fill what has no default, and a section that they change stays as the recipe has it
(the encoder, say).

  sslzoo check-method mine:Mine method.temperature=0.1
  sslzoo check-method mine:Mine --recipe mine.yaml --only resuming,world-size
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from sslzoo.testing.contract import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="NAME|module:Class", help="which method")
    parser.add_argument("--recipe", default="", help="a bundled recipe or a file to take the settings from")
    parser.add_argument(
        "--only",
        default="",
        metavar="PROMISE,...",
        help="these alone, by the names in the table's first column",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe: method.temperature=0.1"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sslzoo.testing.contract import check, promised, small_recipe

    try:
        promises = promised([name for name in args.only.split(",") if name])
    except ValueError as error:
        print(f"sslzoo check-method: {error}", file=sys.stderr)
        return 2
    recipe = small_recipe(args.method, recipe=args.recipe, overrides=args.overrides)
    warnings.simplefilter("ignore")
    logging.getLogger("sslzoo").setLevel(logging.ERROR)
    console = Console(highlight=False)
    kept = []
    for promise in promises:  # row by row: the slow ones take some seconds
        result = check(promise, recipe)
        kept.append(result.kept)
        console.print(_row(result))
    console.print(f"{args.method} keeps {sum(kept)} of {len(kept)} promises")
    return 0 if all(kept) else 1


def _row(result: Result) -> Table:
    """Name, outcome, seconds, and the promise with what was found."""
    from rich.table import Table
    from rich.text import Text

    style = "green" if result.kept else "bold red"
    text = Text(result.promise.words)
    if result.remark:
        text.append(f"\n{result.remark}", style="dim")
    if not result.kept:
        text.append(f"\n{result.found}\n-> {result.advice}", style=style)
    row = Table.grid(padding=(0, 2, 0, 0))
    for width in (12, 6, 7):
        row.add_column(width=width)
    row.add_row(
        result.promise.name,
        Text("ok" if result.kept else "FAILED", style=style),
        f"{result.seconds:5.1f} s",
        text,
    )
    return row
