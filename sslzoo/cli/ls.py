"""List methods, analyses, protocols of linear evaluation, recipes and data sets.

Recipes are listed with method, training data, encoder, epochs, and two figures for linear top-1 accuracy in
per cent: the published one and the mean of our own runs; the recipe's header gives source and seeds. Below
them are variants, as overrides to add after `sslzoo fit --recipe`. The options select recipes and variants
by name or part of a name.

  sslzoo ls recipes --method NAME --data imagenet
  sslzoo ls recipes --data cifar100
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from statistics import fmean

from sslzoo.checks import did_you_mean
from sslzoo.protocols.protocol import protocol_named
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS
from sslzoo.recipe.header import Variant, read_header

KINDS = ("methods", "analyses", "protocols", "recipes", "datasets")
FILTERS = ("method", "data", "backbone")
WIDTH = 100
KEYS = {"data": "data.dataset", "backbone": "backbone.name", "epochs": "trainer.max_epochs"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe in the table."""

    recipe: str
    method: str
    data: str
    backbone: str
    epochs: str
    published: str
    ours: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="|".join(KINDS), help="only these")
    parser.add_argument("--method", metavar="NAME", help="only recipes of this method")
    parser.add_argument("--data", metavar="NAME", help="only recipes that train on this data set")
    parser.add_argument("--backbone", metavar="NAME", help="only recipes with this encoder")


def run(args: argparse.Namespace) -> int:
    wanted = {key: value for key in FILTERS if (value := getattr(args, key)) is not None}
    kind = args.kind or ("recipes" if wanted else None)
    try:
        if wanted and kind != "recipes":
            raise _Refused(f"--{next(iter(wanted))} selects recipes; write sslzoo ls recipes")
        listings = {
            "methods": _methods,
            "analyses": _analyses,
            "protocols": _protocols,
            "recipes": lambda: _recipes(wanted),
            "datasets": _datasets,
        }
        shown = listings if kind is None else {kind: listings[kind]}
        texts = [
            "\n".join(lines()) if kind else "\n".join([f"{name}:", *lines()]) for name, lines in shown.items()
        ]
    except _Refused as refused:
        print(f"sslzoo ls: {refused}", file=sys.stderr)
        return 2
    print("\n\n".join(texts))
    return 0


class _Refused(Exception):
    """The request is invalid or matches nothing."""


def _methods() -> list[str]:
    rows = [row.method for row, _ in _bundled()]
    return _table(
        [("method", "recipes", "code")]
        + [(name, str(rows.count(name)), point.value) for name, point in registry.methods().items()],
        right=(1,),
    )


def _analyses() -> list[str]:
    rows = [(name, point.value) for name, point in registry.analyses().items()]
    return _table([("analysis", "code"), *rows])


def _protocols() -> list[str]:
    rows = []
    for name in registry.protocols():
        try:
            known = protocol_named(name)
            rows.append((name, known.reported, known.summary))
        except ValueError as error:  # of another package
            rows.append((name, "", str(error)))
    return _table([("protocol", "reports", ""), *rows])


def _datasets() -> list[str]:
    rows = [row.data for row, _ in _bundled()]
    body = [
        (
            name,
            *(f"{info.sizes[split]:,}" if split in info.sizes else "-" for split in ("train", "test")),
            str(info.num_classes or "-"),
            str(rows.count(name)),
            info.description,
        )
        for name, info in DATASETS.items()
    ]
    return _table([("data.dataset", "train", "test", "classes", "recipes", ""), *body], right=(1, 2, 3, 4))


def _recipes(wanted: dict[str, str]) -> list[str]:
    """The table of recipes that match the filters ``wanted``, and below it the matching variants."""
    bundled = _bundled()
    variants = [(_changed(row, variant), variant) for row, variants in bundled for variant in variants]
    every = [row for row, _ in bundled] + [row for row, _ in variants]
    for key, value in wanted.items():
        names = _called([getattr(row, key) for row in every], key, value, wanted)
        every = [row for row in every if getattr(row, key) in names]
    shown = [row for row, _ in bundled if row in every]
    lines = []
    if shown:
        head = tuple(field.name for field in fields(Row))
        body = [tuple(getattr(row, key) for key in head) for row in shown]
        lines += _table([head, *body], right=(4, 5, 6), limit={3: 18})
        lines += [
            "linear top-1 in per cent; published: by the protocol that the recipe's header names;",
            "ours: protocol honest (SGD), mean of the seeds",
        ]
    also = [(row, variant) for row, variant in variants if row in every]
    if also:
        lines += [*([""] if lines else []), "also, by overrides:"]
        for row, variant in also:
            command = f"{row.recipe} {variant.overrides}"
            lines += textwrap.wrap(
                f"  {command}   # {variant.description}",
                WIDTH,
                subsequent_indent="      ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def _called(names: Sequence[str], key: str, value: str, wanted: dict[str, str]) -> set[str]:
    """The name equal to ``value``, or else all names that contain it; ``_Refused`` if there are none."""
    matches = {name for name in names if name == value} or {name for name in names if value in name}
    if matches:
        return matches
    before = " ".join(
        f"--{k}={wanted[k]}" for k in FILTERS if k in wanted and FILTERS.index(k) < FILTERS.index(key)
    )
    others = f" with {before}" if before else ""
    known = sorted(set(names))
    raise _Refused(
        f"no recipe{others} has --{key}={value}{did_you_mean(value, known)} (there are {', '.join(known)})"
    )


@cache
def _bundled() -> list[tuple[Row, tuple[Variant, ...]]]:
    """Every bundled recipe as a row, and its variants."""
    import yaml

    rows = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name, path in registry.recipes().items():
        header = read_header(path)
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        row = Row(
            recipe=name,
            method=values["method"]["name"],
            data=values["data"]["dataset"],
            backbone=values["backbone"]["name"].removeprefix("timm/").rpartition(":")[2],
            epochs=str(values["trainer"]["max_epochs"]),
            published=header.published[0] if header.published else "-",
            ours=f"{fmean(map(float, header.ours)):.1f}" if header.ours else "-",
        )
        rows.append((row, header.also))
    return rows


def _changed(row: Row, variant: Variant) -> Row:
    """``row`` with the overrides of ``variant`` applied; variants have no figures."""
    given = {key: value for key, _, value in (override.partition("=") for override in variant.split())}
    changes = {column: given[key] for column, key in KEYS.items() if key in given}
    return replace(row, published="-", ours="-", **changes)


def _table(
    rows: Sequence[tuple[str, ...]], *, right: Sequence[int] = (), limit: dict[int, int] | None = None
) -> list[str]:
    """Format aligned columns; ``right`` lists right-aligned columns, ``limit`` the maximum width by column."""
    limit = limit or {}
    cut = [[_shortened(cell, limit.get(i, WIDTH)) for i, cell in enumerate(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    lines = []
    for row in cut:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _shortened(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - 1] + "…"
