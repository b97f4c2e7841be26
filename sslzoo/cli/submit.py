"""Submit a recipe to SLURM as a job that requeues itself until the run is finished.

It writes the job script to RUN/slurm/submit.sh and gives it to sbatch: one task per GPU, each with data.workers + 1
processors. Two minutes before the time limit, and when the job is pre-empted, the run saves and leaves, and the script
requeues the job, which continues the same run. On anything else it stops and says why. The output is in
RUN/slurm/JOB.out.

What every job on a cluster needs is in ~/.config/sslzoo/cluster.yaml, or in the file that SSLZOO_CLUSTER names:
partition, account, time, options, modules, container, scratch; all are optional.

exit codes: 0 submitted; 2 invalid command line, recipe, profile or directory, or refused by sbatch.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sslzoo.checks import require

if TYPE_CHECKING:
    from sslzoo.launch.slurm import Job

_FOLDER = re.compile(r"[\w.+-]+")  # values of an array that can be part of a folder's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--recipe", required=True, help="file or bundled name; a file takes precedence, .yaml is optional"
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="machines (default: the recipe's trainer.num_nodes)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="M",
        help="GPUs, and tasks, per machine (default: the recipe's trainer.devices); with trainer.accelerator=cpu "
        "the tasks get no GPU",
    )
    parser.add_argument("--partition", help="instead of the profile's")
    parser.add_argument("--account", help="instead of the profile's")
    parser.add_argument("--time", help="time limit of each job, such as 24:00:00, instead of the profile's")
    parser.add_argument(
        "--array",
        metavar="KEY=A,B,...",
        help="one run for each value of a recipe's key, such as seed=1,2,3, in OUT/KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=Path, help="run directory (default: runs/<recipe>/<run id>, in the profile's scratch)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    """Submit, and return the exit code."""
    from sslzoo.launch.slurm import script_of, submit

    command = ["sslzoo", *args.arguments]
    try:
        job = _job(args)
        if args.dry_run:
            print(script_of(job, command), end="")
            print(f"would be written to {job.script}; nothing was submitted", file=sys.stderr)
            return 0
        number = submit(job, command)
    except ValueError as error:
        print(error if _is_recipe_error(error) else f"sslzoo submit: {error}", file=sys.stderr)
        return 2
    print(
        f"job {number} submitted: {len(job.runs)} runs in" if job.values else f"job {number} submitted:",
        end=" ",
    )
    print(job.folder)
    print(f"script {job.script}, output {job.output(f'{number}_*' if job.values else number)}")
    return 0


def _array(text: str | None) -> tuple[str, tuple[str, ...]]:
    """Key and values of ``--array``."""
    if text is None:
        return "", ()
    key, _, listed = text.partition("=")
    values = tuple(value.strip() for value in listed.split(","))
    require(key != "" and all(values), f"--array {text} must have the form KEY=A,B,... such as seed=1,2,3")
    odd = [value for value in values if not _FOLDER.fullmatch(value)]
    require(
        not odd,
        f"--array {text}: {', '.join(odd)} cannot be part of a folder's name; submit that run by itself",
    )
    require(len(set(values)) == len(values), f"--array {text} names a value twice")
    return key, values


def _is_recipe_error(error: ValueError) -> bool:
    from sslzoo.recipe.load import RecipeError

    return isinstance(error, RecipeError)


def _job(args: argparse.Namespace) -> Job:
    """The job that the arguments ask for; raises ``ValueError`` if its run would be refused."""
    from sslzoo.launch.cluster import check_time, read_profile
    from sslzoo.launch.slurm import Job
    from sslzoo.recipe.load import check_once, load_recipe
    from sslzoo.recipe.registry import name_of, recipe_path
    from sslzoo.recipe.trainer_keys import check_precision
    from sslzoo.records.directory import check_recipe, unique_id

    taken = [word for word in args.overrides if word.startswith(("trainer.devices=", "trainer.num_nodes="))]
    require(not taken, f"leave out {' '.join(taken)}: --gpus-per-node and --nodes set it")
    recipe = load_recipe(args.recipe, args.overrides).recipe
    nodes = recipe.nodes if args.nodes is None else args.nodes
    per_node = recipe.devices if args.gpus_per_node is None else args.gpus_per_node
    require(
        per_node is not None, "the recipe asks for all GPUs of a machine; say how many: --gpus-per-node M"
    )
    require(min(nodes, per_node or 0) > 0, "--nodes and --gpus-per-node must be positive")
    key, values = _array(args.array)
    overrides = (*args.overrides, f"trainer.devices={per_node}", f"trainer.num_nodes={nodes}")
    check_once([*overrides, *([args.array] if values else [])])  # as the job's fit will
    loaded = [load_recipe(args.recipe, [*overrides, f"{key}={value}"]) for value in values]
    loaded = loaded or [load_recipe(args.recipe, overrides)]
    profile = read_profile()
    if args.time:
        check_time(args.time, "--time")
    chosen = {name: getattr(args, name) for name in ("partition", "account", "time") if getattr(args, name)}
    folder = args.out or Path(profile.scratch or ".").expanduser() / "runs" / recipe.name / unique_id()
    source = recipe_path(args.recipe)
    bundled = name_of(source) != str(source)
    job = Job(
        name=recipe.name,
        folder=folder.absolute(),
        directory=Path.cwd(),
        recipe=name_of(source) if bundled else str(source.absolute()),
        nodes=nodes,
        per_node=per_node or 0,
        cpus=recipe.data.workers + 1,
        gpus=recipe.trainer.get("accelerator") != "cpu",
        overrides=overrides,
        key=key,
        values=values,
        cluster=replace(profile, **chosen),
    )
    for path, variant in zip(job.runs, loaded, strict=True):
        if not job.gpus:
            check_precision(variant.recipe.trainer)
        check_recipe(path, variant)
    return job
