"""Copy a bundled recipe, including its comments, for editing."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from sslzoo.recipe import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="bundled name or file")
    parser.add_argument("dest", metavar="DEST", help="file or folder")
    parser.add_argument("--force", action="store_true", help="replace DEST if it exists")


def run(args: argparse.Namespace) -> int:
    try:
        source = registry.recipe_path(args.recipe)
    except ValueError as error:
        return _refuse(str(error))
    dest = Path(args.dest)
    if dest.is_dir():
        dest /= source.name
    elif os.path.basename(args.dest) in ("", ".", ".."):  # noqa: PTH119 -- a Path drops the trailing separator
        return _refuse(f"{args.dest} is not a folder; create it first, or name a file")
    if dest.exists() and dest.samefile(source):
        return _refuse(f"{dest} is the same file; for the bundled recipe leave .yaml out of RECIPE")
    if dest.exists() and not args.force:
        return _refuse(f"{dest} exists; --force replaces it")
    if not dest.parent.is_dir():
        return _refuse(f"{dest.parent} is not a folder; create it first")
    shutil.copyfile(source, dest)
    print(f"{dest}: now sslzoo fit --recipe {shlex.quote(str(dest))}")
    return 0


def _refuse(reason: str) -> int:
    print(f"sslzoo cp: {reason}", file=sys.stderr)
    return 2
