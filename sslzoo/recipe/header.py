"""The header comment of a bundled recipe: title, variants and results. Importable without torch."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FIGURES = re.compile(r"(\d+(?:\.\d+)?(?:, \d+(?:\.\d+)?)*) % linear top-1")
PROTOCOL = re.compile(rf"published: {FIGURES.pattern}, protocol (\w+) \((.*?)\)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ``also:`` line: overrides as typed on the command line, and what the recipe becomes with them."""

    overrides: str
    description: str

    def split(self) -> list[str]:
        """The overrides as a list, with shell quotes removed."""
        return shlex.split(self.overrides)


@dataclass(frozen=True, kw_only=True)
class Header:
    title: str
    also: tuple[Variant, ...]
    published: tuple[
        str, ...
    ]  # linear top-1 in per cent, with as many digits as the source gives; empty: not available
    protocol: str  # of linear evaluation, by which it was measured; empty: not known, or not offered
    source: str  # of the published figure, if its protocol is known
    ours: tuple[str, ...]  # the same from our own runs, one per seed


def read_header(recipe: Path) -> Header:
    """Read the header of a recipe file; the fields of missing lines are empty."""
    lines: list[str] = []
    with recipe.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())

    def entries(key: str) -> list[str]:
        return [line.removeprefix(f"{key}:").strip() for line in lines if line.startswith(f"{key}:")]

    by = PROTOCOL.search("\n".join(lines))
    return Header(
        title=lines[0] if lines else "",
        also=tuple(map(_variant, entries("also"))),
        published=_figures(entries("published")),
        protocol=by[2] if by else "",
        source=" ".join(by[3].split()) if by else "",
        ours=_figures(entries("ours")),
    )


def _variant(line: str) -> Variant:
    """Parse an ``also:`` line: overrides, three spaces, description."""
    overrides, _, description = line.partition("   ")
    return Variant(overrides=overrides, description=description.strip())


def _figures(lines: list[str]) -> tuple[str, ...]:
    """The figures at the beginning of a line; figures further on have another meaning."""
    match = FIGURES.match(lines[0]) if lines else None
    return tuple(match[1].split(", ")) if match else ()
