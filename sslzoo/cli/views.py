"""Draw what the network will see: some images and the views of a recipe, with the drawn parameters.

sslzoo views RECIPE --images ~/photos -o views.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="bundled name or file")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as views.0.hue=0.2"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of images to show (default: the recipe's data)"
    )
    parser.add_argument("-n", "--number", type=int, default=4, help="how many images (default: 4)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="picture to write: .png, .pdf or .svg",
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.data.disk import DataError
    from sslzoo.recipe.load import load_recipe

    problem = ""
    if args.number < 1:
        problem = f"--number must be at least 1, got {args.number}"
    elif args.output.suffix not in (".png", ".pdf", ".svg"):
        problem = f"{args.output} must end in .png, .pdf or .svg"
    elif not args.output.parent.is_dir():
        problem = f"there is no folder {args.output.parent} for {args.output.name}; make it first"
    if problem:
        print(f"sslzoo views: {problem}", file=sys.stderr)
        return 2
    recipe = load_recipe(args.recipe, args.overrides).recipe

    from sslzoo.run.views import draw_views

    try:
        ids = draw_views(recipe, args.output, args.number, args.images)
    except ValueError as error:
        print(f"sslzoo views: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(f"sslzoo views: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.output}: {recipe.crops} view{'s' * (recipe.crops > 1)} of {len(ids)} image{'s' * (len(ids) > 1)}"
    )
    return 0
