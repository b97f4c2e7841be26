"""The comment at the head of a bundled recipe: what it is, its variants, its figures. Importable without torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ``also:`` line: overrides, as typed after the command, and what they make of the recipe."""

    overrides: tuple[str, ...]
    description: str


@dataclass(frozen=True, kw_only=True)
class Header:
    title: str
    also: tuple[Variant, ...]


def header(recipe: Path) -> Header:
    """The header of a recipe's file."""
    lines: list[str] = []
    with recipe.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())
    also = [_variant(line.removeprefix("also:").strip()) for line in lines if line.startswith("also:")]
    return Header(title=lines[0] if lines else "", also=tuple(also))


def _variant(line: str) -> Variant:
    """Overrides and description stand three blanks apart."""
    overrides, _, description = line.partition("   ")
    return Variant(overrides=tuple(shlex.split(overrides)), description=description.strip())
