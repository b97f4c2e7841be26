"""Train by a recipe.

With trainer.devices above 1 it starts a process for each device itself; under torchrun or srun it is one of them.

exit codes, which manifest.json holds too: 0 done, or finished before; 1 failure at run time; 2 recipe, data or
directory wrong, nothing started; 75 pre-empted by SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP, --resume auto continues;
76 the loss is not finite; 130 interrupt, which saves nothing. torchrun's own exit code is 1 for all but 0.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sslzoo.streams import outlive_readers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--recipe", required=True, help="a file, or else a bundled name, with or without .yaml"
    )
    parser.add_argument("--out", type=Path, help="run directory; runs/<recipe>/<run id> if left out")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue exactly: weights, state, position, metrics. auto: from the newest checkpoint of --out, or of "
        "the recipe's newest run that has one, and from the beginning where there is none; PATH: a checkpoint or a "
        "run directory. Repeat the overrides that the run was started with",
    )
    start.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="begin a new run with the weights of a checkpoint, or of a run directory's newest; of another method's, "
        "the backbone alone",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build the run on the CPU and try each stage once, on a few generated images: one training step, one "
        "validation batch, probes, a checkpoint; nothing is kept",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, anywhere on the line: optim.lr=0.3",
    )


def run(args: argparse.Namespace) -> int:
    """Train; the exit code."""
    from sslzoo.recipe.load import load_recipe
    from sslzoo.run.departure import leave_while_importing
    from sslzoo.run.launcher import end_with_parent, launch
    from sslzoo.run.placement import place, world_size_of

    loaded = load_recipe(args.recipe, args.overrides)  # before torch: a typo answers at once
    try:
        if args.dry_run:
            from sslzoo.run.dry_run import dry_run

            return dry_run(loaded.recipe)
        if place().starter == "alone" and world_size_of(loaded.recipe) > 1:
            outlive_readers()
            return launch(args.arguments, loaded)
    except ValueError as error:
        print(f"sslzoo fit: {error}", file=sys.stderr)
        return 2
    outlive_readers()
    leave_while_importing()
    end_with_parent()
    # The libraries under us say on their own that a neighbour is gone: once is enough.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sslzoo.run.fit import fit

    return fit(loaded, out=args.out, resume=args.resume, init_from=args.init_from)
