"""Check recipes without running them: one line each, exit code 2 if any is invalid."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE|KEY=VALUE",
        help="bundled names or files; words with = are overrides applied to all of them",
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.recipe.load import RecipeError, check_once, load_recipe

    overrides = [word for word in args.recipes if "=" in word]
    names = [word for word in args.recipes if "=" not in word]
    if not names:
        print("sslzoo validate: no recipe given, only overrides", file=sys.stderr)
        return 2
    check_once(overrides)
    code = 0
    for name in names:
        try:
            load_recipe(name, overrides)
        except RecipeError as error:
            print(error, file=sys.stderr)
            code = 2
        else:
            print(f"{name}: fine")
    return code
