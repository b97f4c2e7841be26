"""Compare runs: what differs between their recipes, and their figures side by side.

RUN is a run directory, a folder with runs, or a pattern such as 'runs/*/a*'. Runs whose recipes differ only in the seed
are one group: its figures are mean and standard deviation over the runs. Groups that share seeds with the first are
compared with it seed by seed, with a t-interval. The page (html) also has curves, with a band over the runs of a group.

  sslzoo compare runs/RECIPE runs/OTHER
  sslzoo compare runs/sweep --format html --out comparison.html

exit codes: 0 done; 2 a path is no run directory and contains none, or fewer than two runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sslzoo.records.compare import Comparison, Grid

FORMATS = ("text", "csv", "markdown", "html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder with run directories"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text, for the terminal")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to this file instead of the terminal")


def run(args: argparse.Namespace) -> int:
    from sslzoo.checks import require
    from sslzoo.files import write_text
    from sslzoo.records.compare import as_csv, as_markdown, as_page, compare
    from sslzoo.records.record import records

    try:
        found = records(args.runs)
        require(len(found) > 1, f"{found[0].path} is a single run; sslzoo report shows it")
        comparison = compare(found)
        text = {"text": as_text, "csv": as_csv, "markdown": as_markdown, "html": as_page}[args.format](
            comparison
        )
        if args.out is None:
            print(text, end="")
        else:
            write_text(args.out, text)
            print(args.out)
    except BrokenPipeError:  # for main
        raise
    except (ValueError, OSError) as error:
        print(f"sslzoo compare: {error}", file=sys.stderr)
        return 2
    return 0


def as_text(comparison: Comparison) -> str:
    """The tables for a terminal, with a column for each group, because there are more figures than groups."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    turned = [_turned(grid) for grid in (comparison.table(), comparison.differences())]
    console = Console(highlight=False)
    with console.capture() as capture:
        for head, rows in (*turned, comparison.recipes()):
            if rows:
                table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
                for number, title in enumerate(head):
                    table.add_column(escape(title), justify="right" if number else "left", overflow="fold")
                for row in rows:
                    table.add_row(*map(escape, row))
                console.print(table)
                console.print()
        console.print(" ".join(comparison.notes()), markup=False)
    return capture.get()


def _turned(grid: Grid) -> Grid:
    head, rows = grid
    first, *others = (list(column) for column in zip(head, *rows, strict=True))
    return first, others if rows else []
