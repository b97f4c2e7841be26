"""Checks of user input that raise one-line errors naming the fix. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any


class ConfigError(ValueError):
    """An invalid config value; ``message`` continues a sentence that starts with the field's name: "must be positive".

    ``field`` is the dataclass field, dotted for nested values (``scale.0``). The code that reads the config prepends
    the path of the section, and the code that reads the file adds the line number.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        self.message = message


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_field(condition: bool, field: str, message: str) -> None:
    """Raise ``ConfigError(field, message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(field, message)


def check_positive(config: Any, *fields: str) -> None:
    """Refuse ``fields`` of ``config`` that are not above 0; in a tuple, all numbers are checked. None is allowed."""
    _check_each(config, fields, lambda number: number > 0, "must be positive")


def check_not_negative(config: Any, *fields: str) -> None:
    """Refuse ``fields`` of ``config`` that are below 0; in a tuple, all numbers are checked. None is allowed."""
    _check_each(config, fields, lambda number: number >= 0, "must not be negative")


def check_fraction(config: Any, *fields: str) -> None:
    """Refuse ``fields`` of ``config`` outside [0, 1]; in a tuple, all numbers are checked. None is allowed."""
    _check_each(config, fields, lambda number: 0 <= number <= 1, "must lie in [0, 1]")


def _check_each(config: Any, fields: tuple[str, ...], holds: Callable[[float], bool], message: str) -> None:
    for field in fields:
        value = getattr(config, field)
        listed = isinstance(value, tuple)
        numbers = value if listed else () if value is None else (value,)
        shown = list(value) if listed else value
        check_field(all(map(holds, numbers)), field, f"{message}, got {shown}")


def check_plugin_name(name: str, field: str) -> None:
    """Refuse a ``name`` that contains a colon but is not of the form ``module:attribute``."""
    module, colon, attribute = name.partition(":")
    parts = (*module.split("."), attribute)
    check_field(
        not colon or all(part.isidentifier() for part in parts),
        field,
        f"must have the form module:attribute, got {name!r}",
    )


def shown(value: Any) -> str:
    """``value`` formatted for an error message, truncated to 80 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def closest(name: str, known: Iterable[str], cutoff: float = 0.65) -> str:
    """The name in ``known`` closest to ``name``, ignoring case and the dashes of options; empty if none is close: two
    of three letters must be the same."""
    by_lower = {other.lower().lstrip("-"): other for other in known}
    match = get_close_matches(name.lower().lstrip("-"), by_lower, n=1, cutoff=cutoff)
    return by_lower[match[0]] if match else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of ``names`` as text, and how many more there are; ``none`` without any."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``'; did you mean X?'`` with the closest known name, prefixed by ``prefix``; empty if none is close."""
    match = closest(name, known)
    return f"; did you mean {prefix}{match}?" if match else ""
