"""Draw the page of a run again: report.html in its directory.

A run draws its page itself, at its start, after evaluations and at its end, and `sslzoo eval` draws it with the new
results. This command draws it for older runs. The page is one file, which needs no network and may be mailed.

  sslzoo report runs/RECIPE/ID
  sslzoo report runs

exit codes: 0 done; 2 a path is no run directory and contains none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder with run directories"
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.records.page import write_page
    from sslzoo.records.record import records

    try:
        for record in records(args.runs):
            print(write_page(record.path))
    except BrokenPipeError:  # for main
        raise
    except (ValueError, OSError) as error:
        print(f"sslzoo report: {error}", file=sys.stderr)
        return 2
    return 0
