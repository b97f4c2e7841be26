"""Save W&B workspaces with the panels of every metric.

One workspace compares runs, grouped by method and recipe with the spread over seeds; one for each method has the panels
of what it records too. A second call updates the sections that it made and keeps what was added in the browser.

  sslzoo dashboard --project mine --entity team

exit codes: 0 done; 1 the server cannot be reached; 2 no login, or wandb-workspaces is not installed.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", required=True, help="the project whose runs are shown")
    parser.add_argument("--entity", help="user or team (default: the login's)")
    parser.add_argument(
        "--print", action="store_true", help="print the workspaces as JSON and save nothing; needs no login"
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.dashboards import workspaces

    try:
        workspaces.require_package()
        if args.print:
            print(workspaces.as_json(workspaces.build(args.entity or "", args.project)))
            return 0
        addresses = workspaces.save(args.project, args.entity)
    except ValueError as error:
        print(f"sslzoo dashboard: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"sslzoo dashboard: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 1
    print(*addresses, sep="\n")
    return 0
