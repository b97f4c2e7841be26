"""Turn the fields of a config into command-line options. Importable without torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from sslzoo.checks import ConfigError
from sslzoo.recipe.typed import section


def add_options(group: Any, config: type, base: type) -> None:
    """Add an option to ``group`` for each field that ``config`` has and ``base`` has not.

    A list is given by repeating the option; an item that is itself a list is written with commas.
    """
    for option in _options(config, base):
        field = option.field
        required = field.default is MISSING and field.default_factory is MISSING
        shown = "" if required or field.default is None else f" (default: {_shown(field.default)})"
        group.add_argument(
            option.name,
            dest=field.name,
            required=required,
            action="append" if option.repeated else "store",
            metavar=option.metavar,
            help=(field.metadata.get("help", "") + shown).strip().replace("%", "%%"),
        )


def from_options(config: type, base: type, args: argparse.Namespace, *, name: str) -> Any:
    """Build ``config``, with the registered ``name``, from parsed options. ``ValueError`` names the invalid option."""
    given: dict[str, Any] = {"name": name}
    options = {option.field.name: option for option in _options(config, base)}
    for key, option in options.items():
        if (text := getattr(args, key)) is not None:
            given[key] = [item.split(",") for item in text] if option.nested else text
    try:
        return section(config, given, "")
    except ConfigError as error:
        at = error.field.partition(".")[0]
        option = options.get(at)
        where = at if option is None else f"{option.name} {option.metavar}"
        raise ValueError(": ".join(part for part in (where, error.message) if part)) from None


@dataclass(frozen=True, kw_only=True)
class _Option:
    field: Field[Any]
    repeated: bool  # the field is a list
    nested: bool  # its items are lists

    @property
    def name(self) -> str:
        return self.field.metadata.get("option", "--" + self.field.name.replace("_", "-"))

    @property
    def metavar(self) -> str:
        return self.field.metadata.get("metavar", self.field.name.upper())


def _options(config: type, base: type) -> Iterator[_Option]:
    """One option for each field that is not in ``base`` and is neither a dataclass nor a dict."""
    hints = get_type_hints(config)
    of_base = {field.name for field in fields(base)}
    for field in fields(config):
        hint = hints[field.name]
        if field.name not in of_base and not is_dataclass(hint) and get_origin(hint) is not dict:
            repeated = get_origin(hint) in (tuple, list)
            nested = repeated and get_origin(get_args(hint)[0]) in (tuple, list)
            yield _Option(field=field, repeated=repeated, nested=nested)


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(_shown(item).replace(" ", ",") for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
