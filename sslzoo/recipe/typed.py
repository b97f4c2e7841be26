"""Values from outside as the annotations of the config dataclasses want them; what does not fit is named, with
the nearest right key. Costs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sslzoo.recipe import registry
from sslzoo.recipe.sections import MethodConfig, Recipe
from sslzoo.recipe.trainer_keys import OWNED, trainer_arguments


class Fault(Exception):
    """Something wrong at ``key``; who reads the file adds the place."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


def join(*parts: str) -> str:
    """A dotted key; empty parts are left out."""
    return ".".join(part for part in parts if part)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def section(kind: Any, values: Any, key: str) -> Any:
    """The dataclass ``kind`` from a mapping."""
    if kind is MethodConfig:
        kind = _method_config(values, key)
    if not isinstance(values, dict):
        raise Fault(key, f"expected a section with the keys {', '.join(_hints(kind))}; got {values!r}")
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise Fault(join(key, str(name)), _unknown(key, str(name), list(hints), values))
    arguments = {}
    for field in fields(kind):
        inner = join(key, field.name)
        if values.get(field.name, "???") != "???":
            arguments[field.name] = _typed(hints[field.name], values[field.name], inner)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Fault(inner, "missing key; every recipe states it")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise _out_of_range(str(error), key, list(hints)) from None


def _method_config(values: Any, key: str) -> type[MethodConfig]:
    if not isinstance(values, dict):
        return MethodConfig  # refused by the caller, like any section that is none
    if values.get("name") is None:
        raise Fault(join(key, "name"), "missing key; name a registered method (see sslzoo ls methods)")
    name = _typed(str, values["name"], join(key, "name"))
    try:
        config = registry.method_config(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise Fault(join(key, "name"), str(error)) from None
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise Fault(join(key, "name"), f"{name} is no method: its Config is {config!r}, not a MethodConfig")
    return config


def _out_of_range(message: str, key: str, names: list[str]) -> Fault:
    """The fault that a dataclass's ``__post_init__`` raised, at the key that its message names."""
    for dotted in re.findall(r"\b[a-z]\w*(?:\.\w+)+", message):
        name = dotted.rpartition(".")[2]
        if name in names:
            own = message.removeprefix(dotted + " ")
            return Fault(join(key, name), own if own.startswith(("must ", "is ")) else message)
    return Fault(key, message)


def _typed(kind: Any, value: Any, key: str) -> Any:
    """``value`` as the annotation ``kind`` wants it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return section(kind, value, key)
    if origin in (Union, UnionType):
        return _one_of_types(arguments, value, key)
    if origin is Literal:
        if value not in arguments:
            raise Fault(key, f"must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin in (tuple, list):
        return origin(_items(arguments, value, key))
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise Fault(key, f"expected a mapping, got {value!r}")
        inner = arguments[1] if arguments else Any
        return {str(name): _typed(inner, item, join(key, str(name))) for name, item in value.items()}
    return _scalar(kind, value, key)


def _one_of_types(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    """``value`` as the one of ``kinds`` that it already is, else the first that it converts to."""
    for kind in kinds:
        if type(value) is kind:
            return value
    *others, last = [kind for kind in kinds if kind is not NoneType]
    for kind in others:
        try:
            return _typed(kind, value, key)
        except Fault:
            continue
    return _typed(last, value, key)


def _items(kinds: tuple[Any, ...], value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise Fault(key, f"expected a list, got {value!r}")
    if len(kinds) == 1 or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise Fault(key, f"expected a list of {len(kinds)}, got {value!r}")
    return [
        _typed(kind, item, join(key, str(i))) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]


_SCALARS: dict[type, tuple[str, type | tuple[type, ...], Callable[[str], Any]]] = {
    bool: ("true or false", bool, lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", int, int),
    float: ("a number", (int, float), float),
    str: ("text", str, str),
    NoneType: ("null", NoneType, lambda text: {"null": None}[text]),
}


def _scalar(kind: type, value: Any, key: str) -> Any:
    """Numbers may come as text, since that is what environment variables hold."""
    expected, accepted, parse = _SCALARS[kind]
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return float(value) if kind is float else value
    if isinstance(value, str):
        try:
            return parse(value)
        except (ValueError, KeyError):
            pass
    raise Fault(key, f"expected {expected}, got {'null' if value is None else repr(value)}")


def trainer_section(values: dict[str, Any]) -> dict[str, Any]:
    """The ``trainer`` section, each value of the type that Lightning's own signature states."""
    known = trainer_arguments()
    free = [name for name in known if name not in OWNED]
    for name in values:
        if name in OWNED:
            raise Fault(f"trainer.{name}", f"not for a recipe to set: {OWNED[name]}")
        if name not in known:
            raise Fault(f"trainer.{name}", _unknown("trainer", name, free, values))
    if "max_epochs" not in values:
        raise Fault("trainer.max_epochs", "missing key; every recipe states it")
    typed = {name: _typed(known[name], value, f"trainer.{name}") for name, value in values.items()}
    for name in ("max_epochs", "accumulate_grad_batches", "num_nodes"):
        if name in typed and _typed(int, typed[name], f"trainer.{name}") < 1:
            raise Fault(f"trainer.{name}", f"must be positive, got {typed[name]}")
    return typed


# Suggestions


def _unknown(at: str, name: str, names: list[str], values: Mapping[str, Any]) -> str:
    """Why ``name`` is not a key of the section ``at``, and the nearest right one."""
    near = get_close_matches(name, names, n=1, cutoff=0.7)
    owners = [] if near else [method for method, keys in _method_keys().items() if name in keys]
    elsewhere = [] if near else [key for key in _all_keys() if key.rpartition(".")[2] == name]
    if owners and at == "method":
        return f"not a key of method {values['name']}, but of {', '.join(owners)}"
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]}?"
    if owners:
        return f"unknown key; did you mean method.{name}, a key of {', '.join(owners)}?"
    near = near or get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"unknown key; did you mean {join(at, near[0])}?"
    return f"unknown key (known: {', '.join(names)})"


def _all_keys(kind: type = Recipe, at: str = "") -> list[str]:
    """Every dotted key that a recipe may have, the methods' own aside."""
    keys = []
    for name, hint in _hints(kind).items():
        key = join(at, name)
        inner = hint
        if get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            inner, key = get_args(hint)[0], f"{key}.0"
        elif get_origin(hint) in (Union, UnionType):
            inner = get_args(hint)[0]
        keys += _all_keys(inner, key) if is_dataclass(inner) and isinstance(inner, type) else [key]
    if not at:
        keys += [f"trainer.{name}" for name in trainer_arguments() if name not in OWNED]
    return keys


def _method_keys() -> dict[str, set[str]]:
    """Keys of every registered method; one that is broken has none to offer."""
    keys = {}
    for name in registry.methods():
        try:
            keys[name] = set(_hints(registry.method_config(name))) - {"name"}
        except (ImportError, ValueError):
            continue
    return keys
