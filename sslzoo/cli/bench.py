"""Measure how fast this machine reads the data and trains by a recipe, and suggest data.workers.

  sslzoo bench RECIPE            all three
  sslzoo bench data RECIPE       reading and views alone
  sslzoo bench model RECIPE      training steps alone, on generated images
  sslzoo bench step RECIPE       training steps with their data

One device is measured, with its share of the recipe's batch and without communication between devices. Close other
programs first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="[data|model|step] RECIPE [KEY=VALUE]", help="bundled name or file"
    )
    parser.add_argument("--steps", type=int, default=20, help="micro-batches to measure (default: 20)")
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    from sslzoo.recipe.load import check_once, load_recipe

    given = [word for word in args.words if "=" in word and not Path(word).exists()]
    words = [word for word in args.words if word not in given]
    overrides = [*given, *args.overrides]
    check_once(overrides)
    part = words.pop(0) if words and words[0] in ("data", "model", "step") else None
    problem = ""
    if len(words) != 1:
        problem = f"give one recipe, got {len(words)}; what may be measured is data, model or step"
    elif args.steps < 1:
        problem = f"--steps must be at least 1, got {args.steps}"
    if problem:
        print(f"sslzoo bench: {problem}", file=sys.stderr)
        return 2
    recipe = load_recipe(words[0], overrides).recipe

    from torch import OutOfMemoryError

    from sslzoo.data.disk import DataError
    from sslzoo.run.bench import PARTS, bench

    try:
        report = bench(recipe, tuple(p for p in PARTS if part in (None, p)), args.steps)
    except ValueError as error:
        print(f"sslzoo bench: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"sslzoo bench: {error}", file=sys.stderr)
        return 1
    except OutOfMemoryError:
        print("sslzoo bench: the device is out of memory; lower data.global_batch_size", file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    return 0
