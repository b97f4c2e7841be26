"""Check this machine, for a recipe if one is given, and say how to fix problems; exit code 1 if something is broken."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="bundled name or file: also check what this recipe needs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sslzoo.recipe.load import load_recipe
    from sslzoo.run.doctor import BROKEN, FINE, examine

    try:
        findings = examine(load_recipe(args.recipe, args.overrides).recipe if args.recipe else None)
    except ValueError as error:
        print(f"sslzoo doctor: {error}", file=sys.stderr)
        return 2
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        style = {FINE: "green", BROKEN: "bold red"}.get(finding.state, "yellow")
        text = Text(finding.detail, overflow="fold")
        if finding.fix:
            text.append(f"\n-> {finding.fix}", style=style)
        table.add_row(Text(finding.state, style=style), finding.subject, text)
    Console(highlight=False).print(table)
    return 1 if any(finding.state == BROKEN for finding in findings) else 0
