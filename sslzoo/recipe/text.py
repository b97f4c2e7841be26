"""YAML and ``${...}`` as plain values, with the line of every key.

What an alias or a reference would multiply is counted before anything is expanded: a file of a few lines can stand for
more values than fit into memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from sslzoo.checks import ConfigError, shown

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # once aliases and references are expanded; OmegaConf has the same limit
MAX_DEPTH = 20
_DEEP, _LONG = f"it is more than {MAX_DEPTH} levels deep", f"it holds more than {MAX_VALUES:,} values"
_DIGITS = 40  # of a number, in any base but the binary one: more than 64 bits need
_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
_NESTED = re.compile(r"\$\{[^:{}]*\$\{")
_RESOLVER = re.compile(r"\$\{\s*([\w.]+):")
_RESOLVERS = ("oc.env", "oc.decode")


def join(*parts: str) -> str:
    """A dotted key; empty parts are left out."""
    return ".".join(part for part in parts if part)


def read(source: Path, lines: dict[str, int]) -> dict[str, Any]:
    """The values of the file, references unresolved; ``lines`` is filled on the way, also when it fails."""
    try:
        if source.stat().st_size > MAX_BYTES:
            raise _TooMuch(problem=f"it has more than {MAX_BYTES:,} bytes")
        text = source.read_text(encoding="utf-8")
        lines |= lines_of(text)
        values = OmegaConf.to_container(OmegaConf.create(text))
    except _Duplicate as error:
        lines[error.key] = error.line
        raise ConfigError(error.key, f"written twice, first in line {error.first}; keep one") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        lines[""] = mark.line + 1 if mark else 1
        what = "not a recipe" if isinstance(error, _TooMuch) else "not YAML"
        raise ConfigError("", f"{what}: {getattr(error, 'problem', None) or error}") from None
    except GrammarParseError as error:
        raise ConfigError(_dotted(error), f"bad reference: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(_dotted(error), _first_line(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("", f"cannot be read: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # of YAML's own types, such as !!int x
        raise ConfigError("", f"not YAML: {_first_line(error)}") from None
    if not isinstance(values, dict) or not lines:
        raise ConfigError("", "a recipe is a mapping of sections such as seed, backbone, method")
    return values  # type: ignore[return-value]


def value_of(text: str, key: str) -> Any:
    """The value that an override of ``key`` has behind its equals sign."""
    try:
        lines_of(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except _TooMuch as error:
        raise ConfigError(key, f"must be a value that a recipe can hold: {error.problem}") from None
    except _Duplicate as error:
        raise ConfigError(join(key, error.key), "written twice; keep one") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(key, f"{shown(text)} is not YAML: {_first_line(error)}") from None


def resolve(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with its ``${...}`` replaced by what they mean."""
    _check_references(raw)
    try:
        return OmegaConf.to_container(OmegaConf.create(raw), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        hint = ""
        if "Environment variable" in str(error):
            hint = "; set it, or give a default: ${oc.env:NAME,default}"
        raise ConfigError(_dotted(error), _first_line(error) + hint) from None


def _dotted(error: OmegaConfBaseException) -> str:
    return re.sub(r"\[(\w+)\]", r".\1", error.full_key or "").strip(".")


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.removeprefix("KeyError raised while resolving interpolation: ")


# What aliases make


class _TooMuch(yaml.MarkedYAMLError):
    """Valid YAML that no recipe is."""


class _Duplicate(Exception):
    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(key)
        self.key, self.line, self.first = key, line, first


class _Loader(yaml.SafeLoader):
    depth = count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node more, one level deeper."""
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MAX_DEPTH or self.count > 2 * MAX_VALUES:  # keys are nodes too
            problem = _DEEP if self.depth > MAX_DEPTH else _LONG
            raise _TooMuch(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def lines_of(text: str) -> dict[str, int]:
    """The line of every key and list item. A key written twice is a fault, and so is more than a recipe can hold."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, key: str, above: tuple[yaml.Node, ...]) -> None:
        assert node is not None
        problem = ""
        if node in above:
            problem = "something in it contains itself"
        elif len(above) > MAX_DEPTH:
            problem = _DEEP
        elif len(found) > MAX_VALUES:
            problem = _LONG
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > _DIGITS:
            problem = "a number in it needs more than 64 bits"
        if problem:
            raise _TooMuch(problem=problem, problem_mark=node.start_mark)
        items: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.SequenceNode):
            items = [(str(i), value, value) for i, value in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if not isinstance(name, yaml.ScalarNode):
                    raise _TooMuch(problem="a key in it is not text", problem_mark=name.start_mark)
                items.append((name.value, name, value))
        for name, place, value in items:
            inner, line = join(key, name), place.start_mark.line + 1
            if inner in found:
                raise _Duplicate(inner, line, found[inner])
            found[inner] = line
            walk(value, inner, (*above, node))

    node = yaml.compose(text, Loader=_Loader)
    if node is not None:
        walk(node, "", ())
    return found


# What references make


def _check_references(raw: dict[str, Any]) -> None:
    """Refuse references that no recipe needs, and those that would make more of ``raw`` than one can hold."""
    count = 0

    def walk(value: Any, key: str, level: int, above: tuple[str, ...]) -> None:
        nonlocal count
        count += 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if count > MAX_VALUES or level > MAX_DEPTH:
            raise ConfigError(key, f"must not grow by references: {_LONG if count > MAX_VALUES else _DEEP}")
        if isinstance(value, (dict, list)):
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, join(key, str(name)), level + 1, above)
        elif isinstance(value, str):
            for name in _RESOLVER.findall(value):
                if name not in _RESOLVERS:
                    raise ConfigError(
                        key, f"${{{name}:...}} is unknown; use ${{key}} or ${{oc.env:NAME,default}}"
                    )
            if _NESTED.search(value):
                raise ConfigError(key, "has a reference inside the key of another; write the key out")
            for path in _REFERENCE.findall(value):
                target = _absolute(path.strip(), key)
                if target in above:
                    raise ConfigError(key, "refers to itself in the end")
                walk(_at(raw, target), target, level + 1, (*above, target))

    walk(raw, "", 0, ())


def _absolute(path: str, key: str) -> str:
    """The dotted key of the reference ``path`` in the value at ``key``; each leading dot goes up one level."""
    name = path.lstrip(".")
    up = len(path) - len(name)
    around = key.split(".")[:-up] if up else []
    return join(*around, re.sub(r"\[([^]]*)\]", r".\1", name))


def _at(raw: Any, key: str) -> Any:
    """What stands at the dotted ``key``, or None."""
    for name in key.split("."):
        if isinstance(raw, dict):
            raw = raw.get(name)
        elif isinstance(raw, list) and name.isdecimal() and int(name) < len(raw):
            raw = raw[int(name)]
        else:
            return None
    return raw
