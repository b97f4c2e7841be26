"""Send a run to Weights & Biases from its own files.

`push` sends what the server lacks: the rows of metrics.csv with the recipe, the manifest, throughput, pictures and
all evaluations. It can be repeated at any time, also while an offline run trains, from any machine that sees the run
directory; nothing is sent twice. Of an unfinished run, the rows up to its newest checkpoint are sent. If the server has
another history under the run's id, the run is sent anew under a new one.

  sslzoo wandb push runs/RECIPE/ID
  for run in runs/*/*; do sslzoo wandb push $run --project mine; done

exit codes: 0 done; 1 the server cannot be reached; 2 no run, or no login.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("push",), metavar="push", help="push: send a run")
    parser.add_argument("path", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--project", help="default: logging.wandb.project of the run's recipe, or sslzoo")
    parser.add_argument("--entity", help="user or team (default: the recipe's, or the login's)")


def run(args: argparse.Namespace) -> int:
    import logging

    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("sslzoo").addHandler(terminal)
    from sslzoo.dashboards.wandb_run import push

    try:
        url = push(args.path, project=args.project, entity=args.entity)
    except (ValueError, OSError) as error:
        print(f"sslzoo wandb push: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"sslzoo wandb push: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 1
    print(url)
    return 0
