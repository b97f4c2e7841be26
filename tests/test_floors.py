"""The order of the floors: a room imports from its own floor's room and from those below, never from above."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import sslzoo
from sslzoo.recipe import registry

PACKAGE = Path(sslzoo.__file__).parent
# From the ground up; rooms of one floor do not know one another.
FLOORS = (
    (
        "batch",
        "checkpoints",
        "checks",
        "distributed",
        "exits",
        "files",
        "panels",
        "pictures",
        "randomness",
        "streams",
        "terminal",
        "verdict",
    ),
    ("pages", "recipe"),
    ("nn", "optim"),
    ("method",),
    ("analysis", "data"),
    ("evaluate", "processes"),
    ("export", "protocols"),
    ("posthoc",),
    ("callbacks",),
    ("records",),
    ("dashboards", "launch"),
    ("run",),
    ("testing",),
    ("cli",),
    ("__main__",),
)


def _imports(path: Path) -> set[str]:
    """Dotted names of ours that ``path`` imports, wherever in it and for whatever reason."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("sslzoo", "sslzoo_methods", "sslzoo_recipes")}


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_every_module_is_in_a_room_with_a_floor() -> None:
    assert {_room(path) for path in MODULES} <= set(FLOOR)


def test_no_arrow_runs_upward() -> None:
    arrows = []
    for path in MODULES:
        for name in _imports(path):
            here, other = _room(path), name.partition(".")[2].partition(".")[0]
            # On the ground everybody may know everybody; above, rooms of one floor do not.
            beside = FLOOR.get(other, 0) == FLOOR[here] > 0 and other != here
            if beside or FLOOR.get(other, 0) > FLOOR[here]:
                arrows.append(f"{path.relative_to(PACKAGE)} -> {name}")
    assert not arrows, "\n".join(arrows)


def test_no_circle_inside_a_room() -> None:
    """Of modules that need one another to be imported at all."""
    arrows = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): {
            name.removeprefix("sslzoo.").rpartition(".")[0]
            for name in _imports(path)
            if name.startswith("sslzoo.")
        }
        for path in MODULES
    }
    done: set[str] = set()
    while ready := {m for m in arrows.keys() - done if not (arrows[m] & arrows.keys() - {m} - done)}:
        done |= ready
    assert not arrows.keys() - done, sorted(arrows.keys() - done)


def _stands_in(name: str, line: str) -> bool:
    """Short names are parts of other words, as of "obsolescent": they must be a word, as in SCELoss or sce_loss."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", line)
    return name in line.lower() if len(name) > 3 else name in {word.lower() for word in words}


def test_the_framework_names_no_method() -> None:
    """Nor an analysis: no import, no identifier, no string and no comment does."""
    ours = {*registry.methods(), *registry.analyses(), "sslzoo_methods"}
    assert {"simclr", "sce", "margin", "margins"} <= ours
    assert all(_stands_in("sce", text) for text in ("SCELoss", "sce_loss", "an SCE", '"sce"'))
    assert not _stands_in("sce", "obsolescent")
    named = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(_stands_in(name, line) for name in ours)
    ]
    assert not named, "\n".join(named)
