"""Recipes: YAML and overrides in, a typed tree out, every value with its origin.

A recipe cannot lie: each key is checked against the dataclasses of ``sslzoo.config`` and the method's own
config, each ``trainer`` key against the signature of the installed Lightning, and a fault stops here with
the file, the line and the key. Costs no torch, and no import of Lightning.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslzoo import registry
from sslzoo.config import MethodConfig, Recipe
from sslzoo.data.catalog import dataset_info
from sslzoo.plan import TrainingPlan


class RecipeError(ValueError):
    """What is wrong with a recipe, in one line: ``file:line: dotted.key: fault; did you mean X?``."""


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A checked recipe and where each of its values comes from."""

    recipe: Recipe
    origins: dict[str, str]  # dotted key of a leaf -> default | recipe | override | derived
    derived: dict[str, int | float]  # what follows from the values; lengths by the data's nominal size
    source: Path

    def to_yaml(self, *, origins: bool = False) -> str:
        """The resolved recipe, loadable again as it is; ``origins`` adds one comment a value."""
        text = yaml.dump(
            plain(self.recipe), Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True
        )
        if not origins:
            return text
        lines = text.splitlines()
        marks = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
        width = max(len(line) for line in lines if len(line) <= 60) + 2
        for key, line in marks.items():
            if key in self.origins:
                lines[line - 1] = f"{lines[line - 1]:{width}}# {self.origins[key]}"
        for name, value in self.derived.items():
            lines.append(f"# derived: {name} = {value if isinstance(value, int) else f'{value:g}'}")
        return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of each leaf in order. A list of plain values, or nothing at all, is a leaf."""
    if is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, (tuple, list)) and any(is_dataclass(item) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        yield key, plain(value)
        return
    for name, item in items:
        yield from leaves(item, _join(key, name))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of that bundled name or file, changed by ``overrides`` (``dotted.key=value``).

    Raises:
        RecipeError: whatever is wrong with it, before anything heavy is imported.
    """
    try:
        source = registry.recipe_path(name_or_path)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    lines: dict[str, int] = {}
    overridden: set[str] = set()
    try:
        raw = _read(source, lines)
        for override in overrides:
            _apply(raw, override, overridden)
        values = _resolve(raw)
        recipe = _section(Recipe, values, "")
        recipe = replace(recipe, trainer=_trainer(recipe.trainer))
        if "name" not in values:
            recipe = replace(recipe, name=source.stem)
        _check_data(recipe)
        derived = _derive(recipe)
    except _Fault as fault:
        where = f"{source}:{_line(lines, fault.key)}"
        if _touched(fault.key, overridden):
            where = "override"
        message = ": ".join(part for part in (where, fault.key, fault.message) if part)
        raise RecipeError(" ".join(message.split())) from None
    return LoadedRecipe(
        recipe=recipe, origins=_origins(recipe, values, overridden), derived=derived, source=source
    )


class _Dumper(yaml.SafeDumper):
    """A key a line, a list of plain values in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        scalars = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=scalars)


class _Fault(Exception):
    """Something wrong at ``key``; ``load_recipe`` adds the place."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _touched(key: str, overridden: set[str]) -> bool:
    """Whether an override set ``key``, something it lies in, or a part of it."""
    return any(key == o or key.startswith(o + ".") or o.startswith(key + ".") for o in overridden if key)


def _line(lines: Mapping[str, int], key: str) -> int:
    """The line of ``key``, or of the nearest thing around it that stands in the file."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


# Reading


def _lines(node: yaml.Node | None, key: str = "") -> dict[str, int]:
    """Line of every key and list item under ``node``. A key written twice is a fault."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = _join(key, str(name.value))
            if inner in found:
                raise _Duplicate(inner, name.start_mark.line + 1, found[inner])
            found[inner] = name.start_mark.line + 1
            found |= _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found[_join(key, str(i))] = value.start_mark.line + 1
            found |= _lines(value, _join(key, str(i)))
    return found


class _Duplicate(Exception):
    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(key)
        self.key, self.line, self.first = key, line, first


def _read(source: Path, lines: dict[str, int]) -> dict[str, Any]:
    """The file's values, interpolations unresolved; ``lines`` is filled on the way, also when it fails."""
    try:
        text = source.read_text(encoding="utf-8")
        lines |= _lines(yaml.compose(text, Loader=yaml.SafeLoader))
        config = OmegaConf.create(text)
    except _Duplicate as error:
        lines[error.key] = error.line
        raise _Fault(error.key, f"written twice, first in line {error.first}; keep one") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        lines[""] = mark.line + 1 if mark else 1
        raise _Fault("", f"not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise _Fault("", "not a recipe: something in it contains itself") from None
    except OmegaConfBaseException as error:
        raise _Fault(_dotted(error), f"bad interpolation: {_first_line(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _Fault("", f"cannot be read: {error}") from None
    values = OmegaConf.to_container(config)
    if not isinstance(values, dict) or not lines:
        raise _Fault("", "a recipe is a mapping of sections such as seed, backbone, method")
    return values  # type: ignore[return-value]


def _dotted(error: OmegaConfBaseException) -> str:
    return re.sub(r"\[(\w+)\]", r".\1", error.full_key or "").strip(".")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")


def _apply(raw: dict[str, Any], override: str, overridden: set[str]) -> None:
    """Set ``dotted.key=value`` in ``raw``; what stood there is replaced."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        overridden.add(override)
        raise _Fault(override, "an override has the form dotted.key=value, such as optim.lr=0.3")
    overridden.add(key)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise _Fault(key, f"{text!r} is not YAML: {_first_line(error)}") from None
    names = key.split(".")
    place: Any = raw
    for i, name in enumerate(names):
        so_far = ".".join(names[:i])
        if isinstance(place, list) and not (name.isdigit() and int(name) < len(place)):
            raise _Fault(key, f"{so_far} is a list of {len(place)}; count from 0, or override it whole")
        if not isinstance(place, (dict, list)):
            raise _Fault(key, f"{so_far} is {place!r}, which has no keys")
        at: Any = int(name) if isinstance(place, list) else name
        if i == len(names) - 1:
            place[at] = value
        elif isinstance(place, dict) and place.get(name) is None:
            place[at] = {}
        place = place[at]


def _resolve(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with its ``${...}`` replaced by what they mean."""
    try:
        return OmegaConf.to_container(OmegaConf.create(raw), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        hint = ""
        if "Environment variable" in str(error):
            hint = "; set it, or give a default: ${oc.env:NAME,default}"
        raise _Fault(_dotted(error), _first_line(error) + hint) from None


# Typing


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _section(kind: Any, values: Any, key: str) -> Any:
    """The dataclass ``kind`` from a mapping."""
    if kind is MethodConfig:
        kind = _method_config(values, key)
    if not isinstance(values, dict):
        raise _Fault(key, f"expected a section with the keys {', '.join(_hints(kind))}; got {values!r}")
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise _Fault(_join(key, str(name)), _unknown(key, str(name), list(hints), values))
    arguments = {}
    for field in fields(kind):
        inner = _join(key, field.name)
        if values.get(field.name, "???") != "???":
            arguments[field.name] = _typed(hints[field.name], values[field.name], inner)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _Fault(inner, "missing key; every recipe states it")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise _out_of_range(str(error), key, list(hints)) from None


def _method_config(values: Any, key: str) -> type[MethodConfig]:
    if not isinstance(values, dict):
        return MethodConfig  # refused by the caller, like any section that is none
    if values.get("name") is None:
        raise _Fault(_join(key, "name"), "missing key; name a registered method (see sslzoo ls methods)")
    name = _typed(str, values["name"], _join(key, "name"))
    try:
        config = registry.method_config(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise _Fault(_join(key, "name"), str(error)) from None
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise _Fault(_join(key, "name"), f"{name} is no method: its Config is {config!r}, not a MethodConfig")
    return config


def _out_of_range(message: str, key: str, names: list[str]) -> _Fault:
    """The fault that a dataclass's ``__post_init__`` raised, at the key that its message names."""
    for dotted in re.findall(r"\b[a-z]\w*(?:\.\w+)+", message):
        name = dotted.rpartition(".")[2]
        if name in names:
            own = message.removeprefix(dotted + " ")
            return _Fault(_join(key, name), own if own.startswith(("must ", "is ")) else message)
    return _Fault(key, message)


def _typed(kind: Any, value: Any, key: str) -> Any:
    """``value`` as the annotation ``kind`` wants it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _section(kind, value, key)
    if origin in (Union, UnionType):
        return _one_of_types(arguments, value, key)
    if origin is Literal:
        if value not in arguments:
            raise _Fault(key, f"must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin in (tuple, list):
        return origin(_items(arguments, value, key))
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise _Fault(key, f"expected a mapping, got {value!r}")
        inner = arguments[1] if arguments else Any
        return {str(name): _typed(inner, item, _join(key, str(name))) for name, item in value.items()}
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
        except _Fault:
            continue
    return _typed(last, value, key)


def _items(kinds: tuple[Any, ...], value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Fault(key, f"expected a list, got {value!r}")
    if len(kinds) == 1 or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise _Fault(key, f"expected a list of {len(kinds)}, got {value!r}")
    return [
        _typed(kind, item, _join(key, str(i)))
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
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
    raise _Fault(key, f"expected {expected}, got {'null' if value is None else repr(value)}")


# Lightning's Trainer


_LENGTH = "the length of a run is trainer.max_epochs, from which all schedules follow"
_MEASURED = "eval.every_epochs says when features are measured, always on the whole of eval.test_split"
_FIT = "fit brings its own"
OWNED = {
    "barebones": "sslzoo needs its callbacks; logging.every_steps says how much is recorded",
    "callbacks": "nothing in a recipe names code; the sections probe, eval and logging switch the callbacks on",
    "check_val_every_n_epoch": _MEASURED,
    "default_root_dir": "the run directory is given by fit --out",
    "enable_autolog_hparams": "the run's recipe.yaml and manifest.json hold them",
    "enable_checkpointing": f"{_FIT}; logging.checkpoint_every_steps says how often",
    "enable_model_summary": f"{_FIT}; fit --dry-run shows it",
    "enable_progress_bar": _FIT,
    "fast_dev_run": "fit --dry-run runs one step",
    "limit_predict_batches": _MEASURED,
    "limit_test_batches": _MEASURED,
    "limit_train_batches": _LENGTH,
    "limit_val_batches": _MEASURED,
    "log_every_n_steps": "use logging.every_steps",
    "logger": "metrics.csv is always written; logging.tensorboard and logging.wandb add the others",
    "max_steps": _LENGTH,
    "max_time": _LENGTH,
    "min_epochs": _LENGTH,
    "min_steps": _LENGTH,
    "model_registry": "logging.wandb is where runs go",
    "num_sanity_val_steps": _MEASURED,
    "overfit_batches": _LENGTH,
    "plugins": "nothing in a recipe names code; use trainer.precision and trainer.strategy",
    "reload_dataloaders_every_n_epochs": "the order of the data is a function of seed and epoch",
    "use_distributed_sampler": "the order of the data depends on no rank, and sslzoo shares it out itself",
    "val_check_interval": _MEASURED,
}


@cache
def trainer_arguments() -> dict[str, Any]:
    """Arguments of the installed ``lightning.Trainer`` and their types, read without importing it."""
    spec = find_spec("lightning")
    assert spec is not None and spec.submodule_search_locations, "lightning is a dependency"
    source = Path(spec.submodule_search_locations[0], "pytorch", "trainer", "trainer.py")
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
            return {argument.arg: _annotation(argument.annotation) for argument in init.args.kwonlyargs}
    raise AssertionError(f"no class Trainer in {source}")


def _annotation(node: ast.expr | None) -> Any:
    """The type that an annotation spells, ``Any`` where it is more than plain values."""
    if isinstance(node, ast.Constant) and node.value is None:
        return NoneType
    if isinstance(node, ast.Name):
        return {"int": int, "float": float, "str": str, "bool": bool}.get(node.id, Any)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        kinds = [_annotation(item) for item in inner]
        if node.value.id == "Optional":
            kinds.append(NoneType)
        if node.value.id in ("Optional", "Union") and Any not in kinds:
            return reduce(or_, kinds)
        if node.value.id == "list":
            return list[kinds[0]]
    return Any


def _trainer(values: dict[str, Any]) -> dict[str, Any]:
    known = trainer_arguments()
    free = [name for name in known if name not in OWNED]
    for name in values:
        if name in OWNED:
            raise _Fault(f"trainer.{name}", f"not for a recipe to set: {OWNED[name]}")
        if name not in known:
            raise _Fault(f"trainer.{name}", _unknown("trainer", name, free, values))
    if "max_epochs" not in values:
        raise _Fault("trainer.max_epochs", "missing key; every recipe states it")
    typed = {name: _typed(known[name], value, f"trainer.{name}") for name, value in values.items()}
    for name in ("max_epochs", "accumulate_grad_batches", "num_nodes"):
        if name in typed and _typed(int, typed[name], f"trainer.{name}") < 1:
            raise _Fault(f"trainer.{name}", f"must be positive, got {typed[name]}")
    return typed


# Suggestions


def _unknown(section: str, name: str, names: list[str], values: Mapping[str, Any]) -> str:
    """Why ``name`` is not a key of ``section``, and the nearest right one."""
    near = get_close_matches(name, names, n=1, cutoff=0.7)
    owners = [] if near else [method for method, keys in _method_keys().items() if name in keys]
    elsewhere = [] if near else [key for key in _all_keys() if key.rpartition(".")[2] == name]
    if owners and section == "method":
        return f"not a key of method {values['name']}, but of {', '.join(owners)}"
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]}?"
    if owners:
        return f"unknown key; did you mean method.{name}, a key of {', '.join(owners)}?"
    near = near or get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"unknown key; did you mean {_join(section, near[0])}?"
    return f"unknown key (known: {', '.join(names)})"


def _all_keys(kind: type = Recipe, section: str = "") -> list[str]:
    """Every dotted key that a recipe may have, the methods' own aside."""
    keys = []
    for name, hint in _hints(kind).items():
        key = _join(section, name)
        inner = hint
        if get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            inner, key = get_args(hint)[0], f"{key}.0"
        elif get_origin(hint) in (Union, UnionType):
            inner = get_args(hint)[0]
        keys += _all_keys(inner, key) if is_dataclass(inner) and isinstance(inner, type) else [key]
    if not section:
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


# What follows from the values


def _origins(recipe: Recipe, values: dict[str, Any], overridden: set[str]) -> dict[str, str]:
    origins = {}
    for key, _ in leaves(recipe):
        if _touched(key, overridden):
            origins[key] = "override"
        elif _stated(values, key.split(".")):
            origins[key] = "recipe"
        else:
            origins[key] = "derived" if key == "name" else "default"
    return origins


def _stated(values: Any, path: list[str]) -> bool:
    for name in path:
        if isinstance(values, list):
            values = values[int(name)]
        elif isinstance(values, dict) and name in values:
            values = values[name]
        else:
            return False
    return True


def _check_data(recipe: Recipe) -> None:
    """What no section can see alone: data sets, their splits, and channels."""
    labelled = recipe.probe.data or (recipe.data,)
    sources = [("data", "split", recipe.data)]
    sources += [(f"probe.data.{i}", "split", source) for i, source in enumerate(recipe.probe.data)]
    sources += [("eval", "test_split", replace(source, split=recipe.eval.test_split)) for source in labelled]
    for key, split, source in sources:
        try:
            info = dataset_info(source.dataset)
        except ValueError as error:
            raise _Fault(f"{key}.dataset", str(error)) from None
        if info.splits and source.split not in info.splits:
            raise _Fault(
                f"{key}.{split}",
                f"{source.dataset} has no split {source.split!r}{registry.closest(source.split, [*info.splits])}"
                f" (known: {', '.join(info.splits)})",
            )
    if len(recipe.data.mean) != recipe.backbone.in_channels:
        raise _Fault(
            "backbone.in_channels",
            f"{recipe.backbone.in_channels} channels, but data.mean has {len(recipe.data.mean)}; make them equal",
        )
    if not recipe.views:
        raise _Fault("views", "a recipe needs at least one view")


def _derive(recipe: Recipe) -> dict[str, int | float]:
    """What fit will do with these values, as far as they alone tell."""
    devices, nodes = recipe.trainer.get("devices"), recipe.trainer.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    known = isinstance(devices, int) and devices > 0
    size = dataset_info(recipe.data.dataset).nominal_size(recipe.data.split, recipe.data.classes)
    try:
        plan = TrainingPlan(
            dataset_size=size or recipe.data.global_batch_size,
            global_batch_size=recipe.data.global_batch_size,
            max_epochs=recipe.trainer["max_epochs"],
            world_size=devices * nodes if known else 1,
            accumulate=recipe.trainer.get("accumulate_grad_batches", 1),
        )
    except ValueError as error:
        raise _Fault("data.global_batch_size", str(error)) from None
    derived: dict[str, int | float] = {"peak_lr": plan.scaled_lr(recipe.optim)}
    if known:
        derived["micro_batch_size"] = plan.micro_batch_size
    if size:
        derived |= {"nominal_steps_per_epoch": plan.steps_per_epoch, "nominal_total_steps": plan.total_steps}
    return derived
