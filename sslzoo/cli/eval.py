"""Evaluate a trained encoder on plain images.

KIND is one of
  linear    linear classifiers by the protocols in --protocol; `honest`, which never chooses by test images, comes first
  knn       weighted k-NN, for several k and temperatures at once
  logistic  logistic regression
  features  no evaluation: the features of all labelled images, with labels and ids, as files

  sslzoo eval linear runs/RECIPE/ID
  sslzoo eval knn runs/RECIPE/ID --k 10,20,200 --temperature 0.07,0.5
  sslzoo eval logistic resnet50 --recipe RECIPE --out results/resnet50 data.root=/data/imagenet

Images are those of the recipe: the training data if labelled, and the data sets in probe.data. Features are extracted
once and stay on disk for the next evaluation of the same weights. Results go to KIND.json or PROTOCOL.json, and .csv,
in eval/ of the run directory or in --out; those of an earlier call are replaced. The report.html of a run that has
ended shows them too. They do not depend on the number of processes.

exit codes: 0 done; 1 error at run time; 2 invalid target, recipe, data or option; 75 stopped by a signal, the same
command continues with the features extracted so far; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sslzoo.posthoc.options import FORMATS, KEEP, KINDS
from sslzoo.streams import outlive_readers

if TYPE_CHECKING:
    from sslzoo.posthoc.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "target",
        metavar="RUN|CHECKPOINT|EXPORT|BACKBONE",
        help="a run directory (its newest checkpoint), a checkpoint, an exported backbone.safetensors, a file of "
        "weights (a state dict), or an encoder of torchvision or timm (timm/NAME) with its published weights",
    )
    parser.add_argument(
        "--recipe",
        help="bundled name or file: what is evaluated, and how images look (default: the recipe of the run, or in the "
        "file); needed for weights without a run",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results and features (default: eval/ of the run)"
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=KEEP,
        metavar="GIB",
        help="features that stay on disk afterwards, in GiB; those not used for the longest time are deleted first "
        f"(default: {KEEP:g}; 0 keeps none)",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="processes on this machine, one per GPU if it has GPUs (default: trainer.devices, at most the GPUs that "
        "there are); torchrun and srun start their own",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME,...",
        help="linear: protocols (default: honest); `sslzoo ls protocols` lists them",
    )
    parser.add_argument("--k", metavar="K,...", help="knn: numbers of neighbours (default: eval.knn_k)")
    parser.add_argument(
        "--temperature", metavar="T,...", help="knn: temperatures (default: eval.knn_temperature)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help=f"features: safetensors, npy (three files), or parquet, which needs pyarrow (default: {FORMATS[0]})",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the recipe: data.root=/data, eval.size=224, 'probe.data=[{dataset: cifar10, root: /data}]'",
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.checks import require
    from sslzoo.launch.launcher import end_with_parent, launch
    from sslzoo.processes.departure import leave_while_importing
    from sslzoo.processes.placement import place, processes_here
    from sslzoo.recipe.load import RecipeError

    outlive_readers()
    leave_while_importing()
    try:
        request = _request(args)
        loaded = request.load_recipe()
        starter = place().starter
        require(
            request.devices is None or starter in ("alone", "sslzoo"),
            f"--devices {request.devices} cannot be set here: {starter} has started the processes; leave it out",
        )
        processes = request.devices or processes_here(loaded.recipe)
    except RecipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"sslzoo eval: {error}", file=sys.stderr)
        return 2
    if starter == "alone" and processes > 1:
        return launch(args.arguments, loaded, processes=processes, nodes=1)
    end_with_parent()
    # Torch's own messages about lost ranks would only repeat ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sslzoo.run.evaluate import evaluate

    return evaluate(request, loaded)


def _request(args: argparse.Namespace) -> Request:
    from sslzoo.checks import require
    from sslzoo.posthoc.request import Request, numbers, protocol_names

    for option, kind in (
        ("protocol", "linear"),
        ("k", "knn"),
        ("temperature", "knn"),
        ("format", "features"),
    ):
        given = getattr(args, option)
        require(given is None or args.kind == kind, f"--{option} is an option of {kind}, not of {args.kind}")
    names = {
        "linear": lambda: protocol_names(args.protocol or ""),
        "features": lambda: (),
    }
    return Request(
        kind=args.kind,
        target=args.target,
        recipe=args.recipe,
        overrides=tuple(args.overrides),
        out=args.out,
        names=names.get(args.kind, lambda: (args.kind,))(),
        ks=numbers(args.k, "--k", int),
        temperatures=numbers(args.temperature, "--temperature", float),
        format=args.format or FORMATS[0],
        keep=args.keep,
        devices=args.devices,
    )
