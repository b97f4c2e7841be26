"""Analyse checkpoints: what margins do, or would do, to a method's embeddings.

sslzoo analyze margins --checkpoint runs/NAME/ID writes scalars (margins.json), a table of samples
(samples.parquet), pictures and one page (index.html). Any contrastive method's checkpoint will do.

exit codes: 0 done; 2 a checkpoint, recipe or option is wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

MARGINS = ("10,0", "0,0.1", "10,0.1", "20,0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", choices=["margins"], help="what to analyse")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes, here before the options: data.root=/data"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="checkpoint files of one run, or its directory for all of them: several show the course of training",
    )
    parser.add_argument("--recipe", help="bundled name or path; default: the recipe of the run")
    parser.add_argument(
        "--margin",
        action="append",
        metavar="DEGREES,M2",
        help="angular margin in degrees and subtractive margin; repeatable, the first is shown in detail; a "
        f"negative one is written --margin=-5,0.1 (default: {' '.join(MARGINS)})",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="default: the method's own")
    parser.add_argument("--samples", type=int, default=2048, help="training images looked at (default: 2048)")
    parser.add_argument("--out", type=Path, help="directory; default: margins/ in the run directory")


def run(args: argparse.Namespace) -> int:
    from math import radians

    from sslzoo.evaluate.margin_report import analyse, expand, recipe_of
    from sslzoo.evaluate.margins import margin_name
    from sslzoo.margins import Margin
    from sslzoo.recipe.load import RecipeError, load_recipe

    try:
        paths = expand(args.checkpoint)
        loaded = load_recipe(args.recipe or str(recipe_of(paths[-1])), args.overrides)
        pairs = [_margin(text) for text in args.margin or MARGINS]
        margins = {
            margin_name(*pair): Margin(angular=radians(pair[0]), subtractive=pair[1]) for pair in pairs
        }
        out = args.out or paths[-1].resolve().parent.parent / "margins"
        summary = analyse(loaded, paths, margins, samples=args.samples, temperature=args.temperature, out=out)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    last = summary["checkpoints"][-1]
    for name, values in last["margins"].items():
        logs = [key for key in values if key.startswith("log_")]
        shares = ", ".join(f"{key.removeprefix('log_')} {_text(values[key], '+.3f')}" for key in logs)
        print(f"{name}: angle {_text(values['theta_q50'], '.1f')} degrees, log effects {shares or 'none'}")
    print(f"written to {out}: index.html, margins.json, samples.parquet and the pictures")
    return 0


def _text(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _margin(text: str) -> tuple[float, float]:
    try:
        degrees, subtractive = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--margin {text!r} must be degrees and a cosine, such as 10,0.1") from None
    return degrees, subtractive
