"""Analyse the checkpoints of a run and write a report.

Every checkpoint is analysed on the same training images: sslzoo analyze NAME runs/RECIPE/ID. `sslzoo ls analyses`
lists the installed analyses, and `sslzoo analyze NAME --help` shows the options of one.

exit codes: 0 done; 2 invalid checkpoint, recipe or option.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a registered analysis or module:Class; must come first")
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|CHECKPOINT|EXPORT|KEY=VALUE",
        help="a run directory (all its checkpoints), checkpoint files of one run, or its exported "
        "backbone.safetensors, whose heads are then untrained; and overrides of its recipe, "
        "such as data.root=/data",
    )
    parser.add_argument(
        "--recipe", help="bundled name or file (default: the recipe of the run, or in the file)"
    )
    parser.add_argument("--samples", type=int, default=2048, help="number of training images (default: 2048)")
    parser.add_argument(
        "--out", type=Path, help="folder for the report (default: NAME/ in the run directory)"
    )
    parser.set_defaults(overrides=[])


def add_arguments_of(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of the analysis ``name``."""
    from sslzoo.recipe import registry
    from sslzoo.recipe.options import add_options
    from sslzoo.recipe.sections import AnalysisConfig

    try:
        config = registry.analysis_config(name)
    except (ValueError, AttributeError) as error:
        parser.error(str(error))
    add_options(parser.add_argument_group(f"options of {name}"), config, AnalysisConfig)


def run(args: argparse.Namespace) -> int:
    from sslzoo.recipe.load import RecipeError, check_once
    from sslzoo.recipe.options import from_options
    from sslzoo.recipe.registry import analysis_class
    from sslzoo.recipe.sections import AnalysisConfig

    words = [*args.words, *args.overrides]
    changes = [word for word in words if _is_override(word)]
    paths = [Path(word) for word in words if not _is_override(word)]
    check_once(changes)
    try:
        if not paths:
            raise ValueError("name a run directory or a checkpoint")
        kind = analysis_class(args.name)
        analysis = kind(from_options(kind.Config, AnalysisConfig, args, name=args.name))
        from sslzoo.run.analyze import analyze

        text = analyze(
            analysis, paths, samples=args.samples, recipe=args.recipe, overrides=changes, out=args.out
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(text)
    return 0


def _is_override(word: str) -> bool:
    """Whether ``word`` is an override ``dotted.key=value`` and not a checkpoint file with such a name."""
    return re.match(r"\w+(\.\w+)*=", word) is not None and not Path(word).exists()
