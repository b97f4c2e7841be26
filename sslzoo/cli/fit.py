"""Train a recipe.

With trainer.devices above 1 it starts one process per device; under torchrun or srun it is one of these processes.

exit codes, also recorded in manifest.json: 0 done, or already finished; 1 error at run time; 2 invalid recipe, data or
directory, nothing started; 75 stopped by SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP, continue with --resume auto;
76 the loss is not finite; 130 Ctrl-C, nothing saved. torchrun itself exits with 1 for every code but 0.
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
        "--recipe", required=True, help="file or bundled name; a file takes precedence, .yaml is optional"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<recipe>/<run id>)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue exactly, with weights, state, position and metrics. auto: from the newest checkpoint in --out, "
        "or in the newest run of the recipe that has one; if there is none, start a new run. PATH: a checkpoint or run "
        "directory. Repeat the overrides of the first start",
    )
    start.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="start a new run with the weights of a checkpoint, or of the newest one in a run directory; only the "
        "backbone if it is from another method or an exported backbone.safetensors",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build the run on the CPU and run each stage once on a few generated images: one training step, one "
        "validation batch, probes, a checkpoint; no files are kept",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the recipe, anywhere on the command line: optim.lr=0.3",
    )


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code."""
    from sslzoo.launch.launcher import end_with_parent, launch
    from sslzoo.processes.departure import leave_while_importing
    from sslzoo.processes.placement import devices_per_node, place, world_size_of
    from sslzoo.recipe.load import load_recipe

    loaded = load_recipe(
        args.recipe, args.overrides
    )  # before importing torch, so that typos are reported at once
    try:
        if args.dry_run:
            from sslzoo.run.dry_run import dry_run

            return dry_run(loaded.recipe)
        if place().starter == "alone" and world_size_of(loaded.recipe) > 1:
            outlive_readers()
            return launch(
                args.arguments,
                loaded,
                processes=devices_per_node(loaded.recipe),
                nodes=loaded.recipe.nodes,
            )
    except ValueError as error:
        print(f"sslzoo fit: {error}", file=sys.stderr)
        return 2
    outlive_readers()
    leave_while_importing()
    end_with_parent()
    # Torch's own messages about lost ranks would only repeat ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sslzoo.run.fit import fit

    return fit(loaded, out=args.out, resume=args.resume, init_from=args.init_from)
