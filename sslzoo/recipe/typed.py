"""Convert plain values to config dataclasses by their annotations; errors name the key and suggest the nearest valid
one. Importable without torch.

A choice is a ``Literal``. A choice whose alternatives have parameters of their own is a tagged union: dataclasses with
``name: Literal[...]`` as the tag. A recipe writes ``{name: step, gamma: 0.1, ...}``, or just ``constant`` if that
variant needs no parameters. A parameter can therefore only be set where it has an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sslzoo.checks import ConfigError, closest, did_you_mean, shown
from sslzoo.recipe import registry
from sslzoo.recipe.sections import AnalysisConfig, MethodConfig, Recipe
from sslzoo.recipe.text import join
from sslzoo.recipe.trainer_keys import OWNED, PRECISIONS, check_trainer, trainer_arguments


class OtherVariant(ConfigError):
    """A key that belongs to another variant than the chosen one."""


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The resolved annotation of each field, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _tags(kind: Any) -> tuple[str, ...]:
    """The names that select the dataclass ``kind`` in a tagged union; empty if it is not a variant."""
    hint = _hints(kind).get("name") if isinstance(kind, type) and is_dataclass(kind) else None
    return get_args(hint) if get_origin(hint) is Literal else ()


def section(kind: Any, values: Any, key: str, variants: Mapping[str, type] | None = None) -> Any:
    """Build the dataclass ``kind`` from a mapping at the dotted ``key``.

    ``variants`` are all variants by tag if ``kind`` belongs to a tagged union. Raises ``ConfigError``.
    """
    if kind in (MethodConfig, AnalysisConfig):
        kind = _named_config(kind, values, key)
    if not isinstance(values, dict):
        raise ConfigError(
            key, f"expected a section with the keys {', '.join(_hints(kind))}; got {shown(values)}"
        )
    for old, new in getattr(kind, "RENAMED", {}).items():
        if _present(values, old.split(".")):
            raise ConfigError(join(key, old), f"renamed: use {join(key, new)}")
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise _unknown(kind, values, key, str(name), variants or {})
    arguments = {}
    for field in fields(kind):
        inner = join(key, field.name)
        if field.name in values:
            value = _with_default_name(field, hints[field.name], values[field.name])
            arguments[field.name] = _typed(hints[field.name], value, inner)
        elif field.default is MISSING and field.default_factory is MISSING:
            who = f"{key} {values['name']} needs it" if variants else "every recipe must set it"
            raise ConfigError(inner, f"missing key; {who}")
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(join(key, error.field), error.message) from None
    except ValueError as error:  # from a plug-in's config
        raise ConfigError(key, str(error)) from None


def _present(values: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _named_config(base: type, values: Any, key: str) -> type:
    """The config class of the method or analysis named in ``values``."""
    if not isinstance(values, dict):
        return base  # the caller refuses it: a section must be a mapping
    what, several = ("method", "methods") if base is MethodConfig else ("analysis", "analyses")
    config_of = registry.method_config if base is MethodConfig else registry.analysis_config
    if values.get("name") is None:
        raise ConfigError(
            join(key, "name"), f"missing key; name a registered {what} (see sslzoo ls {several})"
        )
    name = _typed(str, values["name"], join(key, "name"))
    try:
        config = config_of(name)
    except ConfigError as error:
        raise ConfigError(join(key, "name"), error.message) from None
    except Exception as error:  # importing third-party code may raise anything
        raise ConfigError(join(key, "name"), str(error)) from None
    if not (isinstance(config, type) and issubclass(config, base)):
        raise ConfigError(
            join(key, "name"),
            f"{name} is not a valid {what}: its Config is {config!r}, not a {base.__name__}",
        )
    return config


def _typed(kind: Any, value: Any, key: str) -> Any:
    """``value`` converted to the annotation ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return section(kind, value, key)
    if origin in (Union, UnionType):
        return _one_of_types(arguments, value, key)
    if origin is Literal:
        return _choice(arguments, value, key)
    if origin in (tuple, list):
        return origin(_items(arguments, value, key))
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise ConfigError(key, f"expected a mapping, got {shown(value)}")
        inner = arguments[1] if arguments else Any
        return {str(name): _typed(inner, item, join(key, str(name))) for name, item in value.items()}
    return _scalar(kind, value, key)


# Choices


def _choice(allowed: tuple[Any, ...], value: Any, key: str) -> Any:
    """The allowed choice that ``value`` equals, or matches as text."""
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return choice
    names = [str(choice) for choice in allowed]
    if isinstance(value, str | int) and str(value) in names:  # 16 matches "16" and vice versa
        return allowed[names.index(str(value))]
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise ConfigError(key, f"must be one of {', '.join(names)}; got {shown(value)}{hint}")


def _variants(kinds: tuple[Any, ...]) -> dict[str, type]:
    """The tagged dataclasses among ``kinds``, by tag."""
    return {tag: kind for kind in kinds for tag in _tags(kind)}


def _with_default_name(field: Field[Any], hint: Any, value: Any) -> Any:
    """Give a mapping without ``name`` the name of the field's default variant, so that one parameter can be set."""
    if not isinstance(value, dict) or "name" in value or not _variants(get_args(hint)):
        return value
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return {"name": default.name} | value if hasattr(default, "name") else value


def _variant(variants: dict[str, type], value: Any, key: str) -> Any:
    """Build the variant that ``value`` selects: it is the variant's name, or a mapping with the key ``name``."""
    short = not isinstance(value, dict)
    values, at = ({"name": value}, key) if short else (value, join(key, "name"))
    if values.get("name") is None:
        raise ConfigError(at, f"missing key; one of {', '.join(variants)}")
    name = _choice(tuple(variants), values["name"], at)
    return section(variants[name], values, key, variants)


def _one_of_types(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    """``value`` as the member of a union whose type it has, otherwise as the first it can be converted to."""
    if value is None and NoneType in kinds:
        return None
    variants = _variants(kinds)
    others = [kind for kind in kinds if kind is not NoneType and not _tags(kind)]
    named = isinstance(value, str) and value in variants
    if variants and (named or not others or isinstance(value, dict)):
        return _variant(variants, value, key)
    for kind in others:
        if type(value) is kind:
            return _typed(kind, value, key)
    for kind in others[:-1]:
        try:
            return _typed(kind, value, key)
        except ConfigError:
            continue
    return _typed(others[-1], value, key)


# Values


def _items(kinds: tuple[Any, ...], value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(key, f"expected a list, got {shown(value)}")
    if len(kinds) == 1 or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ConfigError(key, f"expected a list of {len(kinds)}, got {shown(value)}")
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
    """Convert a number or text. Numbers may be given as text because environment variables are text."""
    expected, accepted, parse = _SCALARS[kind]
    if isinstance(value, str) and kind is not str:
        try:
            value = parse(value)
        except (ValueError, KeyError):
            raise ConfigError(key, f"expected {expected}, got {shown(value)}") from None
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(key, f"expected {expected}, got {shown(value)}")
    check_plain(value, key)
    return float(value) if kind is float else value


def check_plain(value: Any, key: str) -> None:
    """Refuse values that no key accepts, at any depth: ``???``, inf, nan, and integers of more than 64 bits."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_plain(item, join(key, str(name)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_plain(item, join(key, str(i)))
    elif value == "???":
        raise ConfigError(key, "??? stands for a value to be filled in; write one, or leave the key out")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(key, "must be a number of at most 64 bits")
    elif isinstance(value, float) and not isfinite(value):
        raise ConfigError(key, f"must be finite, got {value}")


def trainer_section(values: dict[str, Any]) -> dict[str, Any]:
    """The ``trainer`` section, each value converted to the type in the signature of Lightning's ``Trainer``."""
    known = trainer_arguments()
    free = [name for name in known if name not in OWNED]
    for name in values:
        if name in OWNED:
            raise ConfigError(f"trainer.{name}", f"cannot be set in a recipe: {OWNED[name]}")
        if name not in known:
            raise ConfigError(f"trainer.{name}", _unknown_key("trainer", name, free))
    if "max_epochs" not in values:
        raise ConfigError("trainer.max_epochs", "missing key; every recipe must set it")
    other = PRECISIONS.get(str(values.get("precision")).lower())
    if other is not None:
        raise ConfigError("trainer.precision", f"{values['precision']!r} is called {other} here")
    typed = {name: _typed(known[name], value, f"trainer.{name}") for name, value in values.items()}
    try:
        check_trainer(typed)
    except ConfigError as error:
        raise ConfigError(f"trainer.{error.field}", error.message) from None
    return typed


# Suggestions


def _unknown(
    kind: type, values: Mapping[str, Any], at: str, name: str, variants: Mapping[str, type]
) -> ConfigError:
    """The error for the unknown key ``name``, which may be a key of another variant or method."""
    keys = {tag: set(_hints(other)) for tag, other in variants.items()}
    others = _method_keys() if issubclass(kind, MethodConfig) else keys
    owners = [tag for tag, theirs in others.items() if name in theirs]
    if owners:
        chosen = f"not a key of {at} {values['name']}, but of {', '.join(owners)}"
        return OtherVariant(join(at, name), chosen)
    return ConfigError(join(at, name), _unknown_key(at, name, list(_hints(kind))))


def _unknown_key(at: str, name: str, names: list[str]) -> str:
    """The message for the unknown key ``name`` of the section ``at``, with the nearest of its keys ``names``."""
    if name in registry.analyses():
        return f"unknown key; {name} is an analysis, which belongs to the list analyses: [{{name: {name}}}]"
    near = closest(name, names, cutoff=0.7)
    if not near:
        for key in _all_keys():
            if key.rpartition(".")[2] == name.lower():
                return f"unknown key; did you mean {key}?"
        owners = [method for method, keys in _method_keys().items() if name in keys]
        if owners:
            return f"unknown key; did you mean method.{name}, a key of {', '.join(owners)}?"
    if near := near or closest(name, names):
        return f"unknown key; did you mean {join(at, near)}?"
    return f"unknown key (known: {', '.join(names)})"


def _all_keys(kind: type = Recipe, at: str = "") -> list[str]:
    """Every dotted key that a recipe may have, except the keys of methods."""
    keys = []
    for name, hint in _hints(kind).items():
        key = join(at, name)
        kinds = [hint]
        if get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            kinds, key = [get_args(hint)[0]], f"{key}.0"
        elif get_origin(hint) in (Union, UnionType):
            kinds = list(get_args(hint))
        inner = [
            deeper for k in kinds if isinstance(k, type) and is_dataclass(k) for deeper in _all_keys(k, key)
        ]
        keys += inner or [key]
    if not at:
        keys += [f"trainer.{name}" for name in trainer_arguments() if name not in OWNED]
    return list(dict.fromkeys(keys))


def _method_keys() -> dict[str, set[str]]:
    """The keys of every registered method that can be loaded."""
    keys = {}
    for name in registry.methods():
        try:
            keys[name] = set(_hints(registry.method_config(name))) - {"name"}
        except (ImportError, ValueError):
            continue
    return keys
