"""List runs: state, epoch, best figures, tags and notes.

A run is running while its lock is renewed; one that ended before its time says why. A run that is
neither running nor has recorded its end was killed. Nothing is written, so that the folder may be mounted from another
machine, read-only too.

  sslzoo runs
  sslzoo runs /mnt/cluster/runs --state running --watch 30

exit codes: 0 done; 2 a folder that is named does not exist or contains no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

NONE = "no runs yet in runs/; sslzoo fit --recipe quickstart makes one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="folders with runs (default: runs)"
    )
    parser.add_argument("--state", help="only runs in this state, such as running or failed")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="list them again every SECONDS (default: 10) until Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    import shutil
    import time

    from sslzoo.checks import did_you_mean, require
    from sslzoo.records.listing import listing
    from sslzoo.records.record import STATE_NAMES, records

    folders = args.folders or [Path("runs")]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        require(
            args.state is None or args.state in STATE_NAMES,
            f"no state {args.state!r}{did_you_mean(args.state or '', STATE_NAMES)} "
            f"(there are {', '.join(STATE_NAMES)})",
        )
        require(args.watch is None or args.watch > 0, f"--watch {args.watch} must be positive")
        while True:
            try:
                lines = listing([r for r in records(folders) if args.state in (None, r.state)], width)
            except ValueError:
                if args.folders:
                    raise
                lines = [NONE]
            if args.watch is None:
                print("\n".join(lines))
                return 0
            clear = "\x1b[H\x1b[2J" if width is not None else ""
            head = f"{time.strftime('%H:%M:%S')}, again every {args.watch:g} s; Ctrl-C ends"
            print(clear + "\n".join([head, *lines]), flush=True)
            time.sleep(args.watch)
    except BrokenPipeError:  # for main
        raise
    except (ValueError, OSError) as error:
        print(f"sslzoo runs: {error}", file=sys.stderr)
        return 2
