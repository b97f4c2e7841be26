"""Load recipes: from YAML and overrides to a typed, checked recipe that knows the origin of every value.

Each key is checked against the dataclasses of ``sslzoo.recipe.sections`` and the method's config, and each ``trainer``
key against the signature of the installed Lightning. Errors name the file, the line and the key. Importable without
torch and Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sslzoo.checks import ConfigError, check_field, check_plugin_name, did_you_mean, shown
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS, DatasetInfo, dataset_info
from sslzoo.recipe.packed_info import packed_split, read_info
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.sections import Recipe
from sslzoo.recipe.text import join, lines_of, parse, read, resolve, value_of
from sslzoo.recipe.typed import OtherVariant, check_plain, section, trainer_section


class RecipeError(ValueError):
    """An invalid recipe; the message is one line: ``file:line: dotted.key: problem; did you mean X?``."""


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A checked recipe and the origin of each of its values."""

    recipe: Recipe
    origins: dict[str, str]  # dotted key of a leaf -> default | recipe | override | dataset | derived
    derived: dict[str, int | float]  # such as the peak rate; step counts assume the data set's nominal size
    source: Path
    overrides: tuple[str, ...] = ()  # as typed

    def to_yaml(self, *, origins: bool = False) -> str:
        """The resolved recipe as YAML that loads again; ``origins`` adds a comment to each value."""
        text = to_yaml(self.recipe)
        if not origins:
            return text
        lines = text.splitlines()
        marks = lines_of(text)
        width = max(len(line) for line in lines if len(line) <= 60)
        for key, line in marks.items():
            if key in self.origins:
                lines[line - 1] = f"{lines[line - 1]:{width}}  # {self.origins[key]}"
        for name, value in self.derived.items():
            lines.append(f"# derived: {name} = {value if isinstance(value, int) else f'{value:g}'}")
        return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """Convert dataclasses to dicts and tuples to lists, recursively."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def to_yaml(recipe: Recipe) -> str:
    """``recipe`` as YAML that loads again, with every value stated."""
    return yaml.dump(plain(recipe), Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` for each leaf in order. Lists of plain values and empty mappings are leaves."""
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
        yield from leaves(item, join(key, name))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a bundled recipe or a file and apply ``overrides`` (``dotted.key=value``).

    Raises:
        RecipeError: if anything is wrong with it; nothing slow has been imported by then.
    """
    try:
        source = registry.recipe_path(name_or_path)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    registry.look_beside(source)
    return _load(lambda lines: read(source, lines), source, overrides)


def load_carried(text: str, carrier: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load the recipe that the checkpoint or export ``carrier`` carries as YAML ``text``.

    Such a file says which weights it holds, and must not say which code runs.

    Raises:
        RecipeError: if anything is wrong with it, or if it names code (``module:attribute``).
    """

    def source(lines: dict[str, int]) -> dict[str, Any]:
        raw = parse(text, lines)
        for key, value in _strings(resolve(raw)):
            if _NAMES_CODE.fullmatch(key) and registry.is_plugin(value):
                raise ConfigError(
                    key, f"{value} is code that this file names; if you trust it, give its recipe by --recipe"
                )
        return raw

    return _load(source, carrier, overrides)


_NAMES_CODE = re.compile(
    r"(backbone|method|analyses\.\d+)(\.name)?|(data|probe\.data\.\d+)\.dataset|eval\.after\.\d+"
)


def _strings(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, value)`` of each text in a recipe's plain values."""
    if isinstance(values, str):
        yield key, values
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, (dict, list)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        yield from _strings(value, join(key, str(name)))


def _load(
    raw_values: Callable[[dict[str, int]], dict[str, Any]], source: Path, overrides: Sequence[str]
) -> LoadedRecipe:
    lines: dict[str, int] = {}
    overridden: set[str] = set()
    try:
        raw = raw_values(lines)
        for override in overrides:
            _apply(raw, override, overridden)
        values = resolve(raw)
        check_plain(values, "")
        if isinstance(values.get("trainer"), dict):
            values["trainer"] = trainer_section(values["trainer"])
        known = _fill_from_data_sets(values)
        recipe = section(Recipe, values, "")
        if "name" not in values:
            recipe = replace(recipe, name=source.stem)
        _check_data(recipe)
        recipe = _place_augmentation(recipe)
        derived = _derive(recipe)
    except ConfigError as error:
        where = f"{source}:{_line(lines, error.field)}"
        if _touched(error.field, overridden):
            where = "override"
        problem = error.message + _advice(error, overridden)
        message = ": ".join(part for part in (where, error.field, problem) if part)
        raise RecipeError(" ".join(message.split())) from None
    return LoadedRecipe(
        recipe=recipe,
        origins=_origins(recipe, values, overridden, known),
        derived=derived,
        source=source,
        overrides=tuple(overrides),
    )


class _Dumper(yaml.SafeDumper):
    """Writes one key per line, and lists of plain values on a single line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        scalars = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=scalars)


def _touched(key: str, overridden: set[str]) -> bool:
    """Whether an override set ``key``, a section that contains it, or a part of it."""
    return any(key == o or key.startswith(o + ".") or o.startswith(key + ".") for o in overridden if key)


def _advice(error: ConfigError, overridden: set[str]) -> str:
    """Advice for an override that chose another variant while the file still has keys of the old one."""
    at = error.field.rpartition(".")[0]
    if not isinstance(error, OtherVariant) or f"{at}.name" not in overridden:
        return ""
    return f"; overriding {at}.name keeps the other keys: override all of {at}, '{at}={{name: ..., ...}}'"


def _line(lines: Mapping[str, int], key: str) -> int:
    """The line of ``key``, or of the innermost section around it that is in the file."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


# Overrides


def check_once(overrides: Sequence[str]) -> None:
    """Raise ``RecipeError`` if ``overrides``, as typed by a user, set a key twice. Elsewhere the last one wins."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in seen:
            raise RecipeError(
                f"override: {key}: is set twice, by {seen[key]} and {override}; keep one of them"
            )
        seen[key] = override


def _apply(raw: dict[str, Any], override: str, overridden: set[str]) -> None:
    """Apply ``dotted.key=value`` to ``raw``, replacing any value already there."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        overridden.add(override)
        raise ConfigError(override, "an override has the form dotted.key=value, such as optim.lr=0.3")
    overridden.add(key)
    value = value_of(text, key)
    names = key.split(".")
    place: Any = raw
    for i, name in enumerate(names):
        so_far = ".".join(names[:i])
        if isinstance(place, list) and not (name.isdigit() and int(name) < len(place)):
            raise ConfigError(
                key, f"{so_far} is a list of {len(place)}; use an index from 0, or override the whole list"
            )
        if not isinstance(place, (dict, list)):
            raise ConfigError(key, f"{so_far} is {shown(place)}, which has no keys")
        at: Any = int(name) if isinstance(place, list) else name
        if i == len(names) - 1:
            place[at] = value
            return
        inner = place[at] if isinstance(place, list) else place.get(at)
        if inner is None:
            inner = place[at] = {}
        elif isinstance(inner, str):  # a variant given by name only; section() refuses any other text
            inner = place[at] = {"name": inner}
        place = inner


# Derived values


def _fill_from_data_sets(values: dict[str, Any]) -> set[str]:
    """Fill in the values that the recipe leaves to its data sets, in place; returns their dotted keys."""
    data, probe = values.get("data"), values.get("probe")
    labelled = probe.get("data") if isinstance(probe, dict) else None
    sources = {
        f"probe.data.{i}": source for i, source in enumerate(labelled if isinstance(labelled, list) else ())
    }
    filled = set()
    for key, source in {"data": data, **sources}.items():
        if not isinstance(source, dict) or not isinstance(name := source.get("dataset"), str):
            continue  # section() refuses it later
        if name == "packed":
            name = source["dataset"] = _packed_data_set(key, source)
            filled.add(f"{key}.dataset")
        check_plugin_name(name, f"{key}.dataset")
        try:
            info = dataset_info(name)
        except ValueError as error:
            raise ConfigError(f"{key}.dataset", str(error)) from None
        if info.class_list and source.get("classes") is None:
            source["classes"] = info.class_list
            filled.add(f"{key}.classes")
        if key == "data" and _take_statistics(source, name, info, values.get("backbone")):
            filled |= {"data.mean", "data.std"}
    return filled


def _packed_data_set(key: str, source: Mapping[str, Any]) -> str:
    """The name of the data set that was packed into the root of ``source``."""
    root, split = (str(source.get(name) or default) for name, default in (("root", ""), ("split", "train")))
    check_field(root != "", f"{key}.root", "missing key; it is the folder that sslzoo pack has written")
    try:
        return read_info(packed_split(Path(root), split)).dataset
    except ValueError as error:
        raise ConfigError(f"{key}.root", str(error)) from None


def _take_statistics(data: dict[str, Any], name: str, info: DatasetInfo, backbone: Any) -> bool:
    """Set the mean and std of the data set in ``data`` unless it sets its own; returns whether it did. The advice
    agrees with the channels of ``backbone``, the section as it is written."""
    stated = [key for key in ("mean", "std") if data.get(key) is not None]
    if len(stated) == 1:
        (missing,) = {"mean", "std"} - set(stated)
        raise ConfigError(f"data.{missing}", f"missing key; data.{stated[0]} is set, and both are needed")
    if stated:
        return False
    if not info.mean:
        imagenet = {key: ",".join(map(str, getattr(DATASETS["imagenet1k"], key))) for key in ("mean", "std")}
        example = " ".join(f"data.{key}=[{numbers}]" for key, numbers in imagenet.items())
        grey = isinstance(backbone, dict) and str(backbone.get("in_channels")) == "1"
        raise ConfigError(
            "data.mean",
            f"missing key; {name} has no known statistics: set both, such as ImageNet's {example}"
            + (" with backbone.in_channels=3, or one number each to read the images in grey" if grey else ""),
        )
    data["mean"], data["std"] = list(info.mean), list(info.std)
    return True


def _origins(recipe: Recipe, values: dict[str, Any], overridden: set[str], known: set[str]) -> dict[str, str]:
    origins = {}
    for key, _ in leaves(recipe):
        if key in known:
            origins[key] = "dataset"
        elif _stated(values, key.split(".")):
            origins[key] = "override" if _touched(key, overridden) else "recipe"
        else:
            chosen = key == "data.augment_on" and recipe.data.augment_on is not None
            origins[key] = "derived" if key == "name" or chosen else "default"
    return origins


def _stated(values: Any, path: list[str]) -> bool:
    for name in path:
        if isinstance(values, list):
            values = values[int(name)]
        elif isinstance(values, dict) and name in values:
            values = values[name]
        else:
            return name == "name" and isinstance(values, str)  # a variant given by name only
    return True


def _check_data(recipe: Recipe) -> None:
    """Check what spans several sections: data sets, splits, channels, and the layers to probe."""
    labelled = recipe.probe.data or (recipe.data,)
    sources = [("data", "split", recipe.data)]
    sources += [(f"probe.data.{i}", "split", source) for i, source in enumerate(recipe.probe.data)]
    sources += [("eval", "test_split", replace(source, split=recipe.eval.test_split)) for source in labelled]
    for key, split, source in sources:
        try:
            info = dataset_info(source.dataset)
        except ValueError as error:
            raise ConfigError(f"{key}.dataset", str(error)) from None
        if info.splits and source.split not in info.splits:
            raise ConfigError(
                f"{key}.{split}",
                f"{source.dataset} has no split {source.split!r}{did_you_mean(source.split, info.splits)}"
                f" (known: {', '.join(info.splits)})",
            )
        if not info.layout and source.root and not registry.is_plugin(source.dataset):
            raise ConfigError(f"{key}.root", f"must be left out: {source.dataset} comes with the package")
    for source in labelled:
        train = dataset_info(source.dataset).nominal_size(source.split, source.classes)
        if train is not None and recipe.eval.knn_k > train:
            raise ConfigError(
                "eval.knn_k",
                f"must be at most {train}, the number of training samples, got {recipe.eval.knn_k}",
            )
    if len(recipe.data.mean) != recipe.backbone.in_channels:
        raise ConfigError(
            "backbone.in_channels",
            f"{recipe.backbone.in_channels} channels, but {recipe.data.dataset} has "
            f"data.mean={list(recipe.data.mean)}; set backbone.in_channels={len(recipe.data.mean)}, "
            "or give one mean and std per channel",
        )
    if not recipe.views:
        raise ConfigError("views", "a recipe needs at least one view")
    for i, name in enumerate(recipe.eval.after):
        try:
            registry.check_evaluation(name)
        except ValueError as error:
            raise ConfigError(f"eval.after.{i}", str(error)) from None
    published = recipe.method.published_layers
    unknown = [layer for layer in recipe.probe.layers if layer not in published]
    if unknown:
        raise ConfigError(
            "probe.layers",
            f"no layer {', '.join(unknown)} to probe: {recipe.method.name} publishes {', '.join(published)}",
        )


def _place_augmentation(recipe: Recipe) -> Recipe:
    """The recipe with the place of augmentation that follows from its device and data, if it leaves that out. Nothing
    follows where a device is chosen when the run starts, or a plug-in opens the data."""
    data, accelerator = recipe.data, recipe.trainer.get("accelerator", "auto")
    in_memory = not (dataset_info(data.dataset).decoded_by_workers or registry.is_plugin(data.dataset))
    if data.augment_on is not None:
        check_field(
            data.augment_on == "device" or not in_memory,
            "data.augment_on",
            f"must be device or left out: {data.dataset} is in memory and needs no workers",
        )
        return recipe
    if in_memory:
        place = "device"
    elif accelerator == "auto" or registry.is_plugin(data.dataset):
        return recipe
    else:
        place = "worker" if accelerator == "cpu" else "device"
    return replace(recipe, data=replace(data, augment_on=place))


def _derive(recipe: Recipe) -> dict[str, int | float]:
    """The numbers that follow from the recipe alone, before the data set is opened."""
    devices = recipe.devices
    size = dataset_info(recipe.data.dataset).nominal_size(recipe.data.split, recipe.data.classes)
    try:
        plan = plan_of(recipe, size or recipe.data.global_batch_size, (devices or 1) * recipe.nodes)
    except ValueError as error:
        raise ConfigError("data.global_batch_size", str(error)) from None
    derived: dict[str, int | float] = {"peak_lr": plan.scaled_lr(recipe.optim)}
    if devices is not None:
        derived["micro_batch_size"] = plan.micro_batch_size
    if size:
        derived |= {"nominal_steps_per_epoch": plan.steps_per_epoch, "nominal_total_steps": plan.total_steps}
    return derived
