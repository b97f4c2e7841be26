"""Test a method against the contract: one row per promise, exit code 1 if one is broken.

The method is a registered name or module:Class, either installed or in the working directory. It runs on generated
images with a tiny encoder, small crops and short runs. Its own settings come from --recipe, else from its first bundled
recipe on embedded images, else from its config's defaults; overrides fill in what has no default. A section that an
override changes is not shrunk, so backbone.name=resnet18 tests the method with that encoder.

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
    parser.add_argument("method", metavar="NAME|module:Class", help="the method to test")
    parser.add_argument("--recipe", default="", help="bundled recipe or file that provides the settings")
    parser.add_argument(
        "--only",
        default="",
        metavar="PROMISE,...",
        help="test only these promises, named as in the first column of the table",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the recipe: method.temperature=0.1"
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
    results = []
    for promise in promises:  # print rows as they come, because some take several seconds
        results.append(check(promise, recipe))
        console.print(_row(results[-1]))
    kept = sum(result.kept and result.tried for result in results)
    broken = sum(not result.kept for result in results)
    others = f", {len(results) - kept - broken} not tried" if kept + broken < len(results) else ""
    console.print(f"{args.method} keeps {kept} of {len(results)} promises{others}")
    return 1 if broken else 0


def _row(result: Result) -> Table:
    """A row with name, outcome, seconds, and the promise with any findings."""
    from rich.table import Table
    from rich.text import Text

    outcome, style = ("ok", "green") if result.kept else ("FAILED", "bold red")
    if not result.tried:
        outcome, style = "-", "yellow"
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
        Text(outcome, style=style),
        f"{result.seconds:5.1f} s",
        text,
    )
    return row
