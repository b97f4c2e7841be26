"""The ``sslzoo`` command: dispatch to a verb and turn errors into exit codes.

0 done; 1 error at run time; 2 invalid usage or recipe, with one line on stderr; 130 Ctrl-C. Verbs document further
codes in their help.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import NoReturn

import sslzoo
from sslzoo import cli
from sslzoo.checks import did_you_mean

FEW = 10  # options that are listed where none is close to what was typed


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def verbs() -> dict[str, ModuleType]:
    """The module of each verb, by name."""
    names = [module.name for module in iter_modules(cli.__path__) if module.name != "main"]
    return {name.replace("_", "-"): import_module(f"sslzoo.cli.{name}") for name in sorted(names)}


def _parsers(
    arguments: Sequence[str],
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of the verbs by name; all options are only added for the verb in use."""
    typed, word = (*arguments, "", "")[:2]
    parser = _Parser(prog="sslzoo", description=sslzoo.__doc__)
    parser.add_argument("--version", action="version", version=f"sslzoo {sslzoo.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, module in verbs().items():
        documentation = module.__doc__ or ""
        summary = documentation.partition("\n")[0].rstrip(".")
        child = subparsers.add_parser(
            verb,
            help=summary[:1].lower() + summary[1:],
            description=documentation,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(child)
        if verb == typed and word and not word.startswith("-") and hasattr(module, "add_arguments_of"):
            module.add_arguments_of(child, word)
        for action in child._actions:  # a list of positional arguments may be empty
            action.required = action.required and action.nargs != "*"
        child.set_defaults(run=module.run)
    return parser, subparsers.choices


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments; recipe overrides may come before, between and after the options."""
    parser, children = _parsers(arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in children:
        parser.error(f"no verb {arguments[0]!r}{did_you_mean(arguments[0], children)}")
    _check_recipe_is_named(arguments, children)
    args, left = parser.parse_known_args(arguments)
    unknown = [
        word for word in left if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")
    ]
    if unknown:
        child = children[args.verb]
        options = [option for action in child._actions for option in action.option_strings]
        named = [option for option in options if option not in ("-h", "--help")]
        few = f" (there are {', '.join(named)})" if 0 < len(named) <= FEW else ""
        hint = did_you_mean(unknown[0].partition("=")[0], options) or few
        child.error(f"unknown argument {unknown[0]!r}{hint}")
    if left:
        args.overrides += left
    args.arguments = arguments  # for fit, which starts this command again as each rank
    return args


def _check_recipe_is_named(arguments: list[str], children: Mapping[str, argparse.ArgumentParser]) -> None:
    """Where a verb needs ``--recipe`` and a recipe is given without it, say so."""
    child = children.get(arguments[0]) if arguments else None
    if child is None or not any(a.required and "--recipe" in a.option_strings for a in child._actions):
        return
    words = arguments[1:]
    if any(word.startswith("--rec") or word in ("-h", "--help") for word in words):
        return
    from sslzoo.recipe.registry import recipes

    for word in words:
        if word in recipes() or word.endswith((".yaml", ".yml")):
            child.error(f"the recipe is an option: --recipe {word}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default ``sys.argv``) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    # Matplotlib warns of each letter's font that its cache lacks, and draws with another one.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    try:
        # A file, such as step=100.ckpt, is no override.
        overrides = [word for word in getattr(args, "overrides", None) or () if not Path(word).exists()]
        if len(overrides) > 1:
            from sslzoo.recipe.load import check_once

            check_once(overrides)
        code = args.run(args)
        sys.stdout.flush()  # so that a closed pipe is noticed here, and not when Python exits
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as `sslzoo ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except ValueError as error:
        from sslzoo.recipe.load import RecipeError

        if not isinstance(error, RecipeError):
            raise
        print(error, file=sys.stderr)
        return 2
