"""The comment at the head of a bundled recipe: what it is, its variants, its figures. Importable without torch."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FIGURES = re.compile(r"(\d+(?:\.\d+)?(?:, \d+(?:\.\d+)?)*) % linear top-1")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ``also:`` line: overrides, as typed after the command, and what they make of the recipe."""

    overrides: str
    description: str

    def split(self) -> list[str]:
        """The overrides one by one, without the shell's quotes."""
        return shlex.split(self.overrides)


@dataclass(frozen=True, kw_only=True)
class Header:
    title: str
    also: tuple[Variant, ...]
    published: tuple[
        str, ...
    ]  # linear top-1 in per cent, with the digits of the source; empty: none available
    ours: tuple[str, ...]  # the same of our own runs, by seed


def read_header(recipe: Path) -> Header:
    """The header of a recipe's file; of a line that it lacks, nothing."""
    lines: list[str] = []
    with recipe.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())

    def said(key: str) -> list[str]:
        return [line.removeprefix(f"{key}:").strip() for line in lines if line.startswith(f"{key}:")]

    return Header(
        title=lines[0] if lines else "",
        also=tuple(map(_variant, said("also"))),
        published=_figures(said("published")),
        ours=_figures(said("ours")),
    )


def _variant(line: str) -> Variant:
    """Overrides and description stand three blanks apart."""
    overrides, _, description = line.partition("   ")
    return Variant(overrides=overrides, description=description.strip())


def _figures(lines: list[str]) -> tuple[str, ...]:
    """The figures that a line begins with; one in the middle belongs to something else."""
    match = FIGURES.match(lines[0]) if lines else None
    return tuple(match[1].split(", ")) if match else ()
