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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from sslzoo.records.compare import Comparison, Grid

GAP = 2  # between columns on the terminal
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
    """The tables for a terminal, with a column for each group, because there are more figures than groups. What is too
    wide for the terminal is split into several tables, so that words stay whole."""
    from rich.console import Console

    turned = [_turned(grid) for grid in (comparison.table(), comparison.differences())]
    console = Console(highlight=False)
    with console.capture() as capture:
        for head, rows in (*turned, comparison.recipes()):
            for columns in _parts(head, rows, console.width) if rows else ():
                console.print(_table(columns, console.width))
                console.print()
        console.print(" ".join(comparison.notes()), markup=False)
    return capture.get()


def _parts(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """The columns in groups that fit into ``width`` characters if lines break between words; each group begins with
    the first column."""
    first, *others = ([title, *cells] for title, *cells in zip(head, *rows, strict=True))
    parts = [[first]]
    for column in others:
        if len(parts[-1]) > 1 and sum(map(_least, [*parts[-1], column])) > width:
            parts.append([first])
        parts[-1].append(column)
    return parts


def _least(column: Sequence[str]) -> int:
    """The width of the longest word, and of the space beside it."""
    return max((len(word) for cell in column for word in cell.split()), default=0) + GAP


def _table(columns: Sequence[Sequence[str]], width: int) -> Table:
    """Cells of the columns, the first of which are titles; columns get more room than they need in order."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold")
    spare = width - sum(map(_least, columns))
    for number, column in enumerate(columns):
        least = _least(column)
        room = min(max(map(len, column)) + GAP, least + max(spare, 0))
        spare -= room - least
        table.add_column(
            escape(column[0]),
            justify="right" if number else "left",
            overflow="fold",
            width=min(room, width) - GAP,
        )
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(escape, row))
    return table


def _turned(grid: Grid) -> Grid:
    head, rows = grid
    first, *others = (list(column) for column in zip(head, *rows, strict=True))
    return first, others if rows else []
