"""Read YAML with ``${...}`` references into plain values, and note the line number of every key.

Values are counted before aliases and references are expanded, because a file of a few lines can expand to more values
than fit into memory.
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
MAX_VALUES = 10_000  # after expanding aliases and references; OmegaConf has the same limit
MAX_DEPTH = 20
_DEEP, _LONG = f"it is more than {MAX_DEPTH} levels deep", f"it holds more than {MAX_VALUES:,} values"
_DIGITS = 40  # more digits than a 64-bit number has in any base except binary
_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
_NESTED = re.compile(r"\$\{[^:{}]*\$\{")
_RESOLVER = re.compile(r"\$\{\s*([\w.]+):")
_RESOLVERS = ("oc.env", "oc.decode")


def join(*parts: str) -> str:
    """Join ``parts`` to a dotted key, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def read(source: Path, lines: dict[str, int]) -> dict[str, Any]:
    """The values in the file, with references unresolved. Fills ``lines``, even when it raises ``ConfigError``."""
    try:
        if source.stat().st_size > MAX_BYTES:
            raise _TooMuch(problem=f"it has more than {MAX_BYTES:,} bytes")
        text = source.read_text(encoding="utf-8")
    except _TooMuch as error:
        raise ConfigError("", f"not a recipe: {error.problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("", f"cannot be read: {error}") from None
    return parse(text, lines)


def parse(text: str, lines: dict[str, int]) -> dict[str, Any]:
    """The values in ``text``, with references unresolved. Fills ``lines``, even when it raises ``ConfigError``."""
    try:
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
    except (ValueError, TypeError, AttributeError) as error:  # from YAML's explicit tags, such as !!int x
        raise ConfigError("", f"not YAML: {_first_line(error)}") from None
    if not isinstance(values, dict) or not lines:
        raise ConfigError("", "a recipe is a mapping of keys such as seed, backbone, method")
    return values  # type: ignore[return-value]


def value_of(text: str, key: str) -> Any:
    """Parse ``text``, the part of an override of ``key`` after the equals sign."""
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
    """``raw`` with every ``${...}`` replaced by its value."""
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


# Aliases


class _TooMuch(yaml.MarkedYAMLError):
    """Valid YAML that cannot be a recipe: too large, too deep, or recursive."""


class _Duplicate(Exception):
    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(key)
        self.key, self.line, self.first = key, line, first


class _Loader(yaml.SafeLoader):
    depth = count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count the node and its depth, and stop at the limits."""
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MAX_DEPTH or self.count > 2 * MAX_VALUES:  # keys are nodes too
            problem = _DEEP if self.depth > MAX_DEPTH else _LONG
            raise _TooMuch(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def lines_of(text: str) -> dict[str, int]:
    """The line number of every key and list item, by dotted key.

    Raises ``_Duplicate`` for a key written twice, and ``_TooMuch`` for YAML that exceeds the limits of a recipe.
    """
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, key: str, above: tuple[yaml.Node, ...]) -> None:
        assert node is not None
        problem = ""
        if node in above:
            problem = "one of its values contains itself"
        elif len(above) > MAX_DEPTH:
            problem = _DEEP
        elif len(lines) > MAX_VALUES:
            problem = _LONG
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > _DIGITS:
            problem = "it has a number of more than 64 bits"
        if problem:
            raise _TooMuch(problem=problem, problem_mark=node.start_mark)
        items: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.SequenceNode):
            items = [(str(i), value, value) for i, value in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if not isinstance(name, yaml.ScalarNode):
                    raise _TooMuch(problem="it has a key that is not text", problem_mark=name.start_mark)
                items.append((name.value, name, value))
        for name, place, value in items:
            inner, line = join(key, name), place.start_mark.line + 1
            if inner in lines:
                raise _Duplicate(inner, line, lines[inner])
            lines[inner] = line
            walk(value, inner, (*above, node))

    node = yaml.compose(text, Loader=_Loader)
    if node is not None:
        walk(node, "", ())
    return lines


# References


def _check_references(raw: dict[str, Any]) -> None:
    """Refuse unknown resolvers, nested and cyclic references, and references that expand ``raw`` beyond the limits."""
    count = 0

    def walk(value: Any, key: str, level: int, above: tuple[str, ...]) -> None:
        nonlocal count
        count += 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if count > MAX_VALUES or level > MAX_DEPTH:
            raise ConfigError(key, f"too large with references: {_LONG if count > MAX_VALUES else _DEEP}")
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
                raise ConfigError(key, "has a reference nested in another; write the inner key out")
            for path in _REFERENCE.findall(value):
                target = _absolute(path.strip(), key)
                if target in above:
                    raise ConfigError(key, "refers to itself")
                walk(_at(raw, target), target, level + 1, (*above, target))

    walk(raw, "", 0, ())


def _absolute(path: str, key: str) -> str:
    """The dotted key that the reference ``path`` in the value at ``key`` means; each leading dot goes up one level."""
    name = path.lstrip(".")
    up = len(path) - len(name)
    around = key.split(".")[:-up] if up else []
    return join(*around, re.sub(r"\[([^]]*)\]", r".\1", name))


def _at(raw: Any, key: str) -> Any:
    """The value at the dotted ``key``, or None."""
    for name in key.split("."):
        if isinstance(raw, dict):
            raw = raw.get(name)
        elif isinstance(raw, list) and name.isdecimal() and int(name) < len(raw):
            raw = raw[int(name)]
        else:
            return None
    return raw
