"""Keys of a recipe's ``trainer`` section: what the installed Lightning accepts, and what recipes may not set.

Works without importing Lightning.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from sslzoo.checks import ConfigError, check_field, require, shown

_LENGTH = "trainer.max_epochs sets the length of a run, and all schedules follow from it"
_MEASURED = "eval.every_epochs says when features are evaluated, always on the whole of eval.test_split"
_FIT = "fit has its own"
OWNED = {
    "barebones": "sslzoo needs its callbacks; logging.every_steps sets how often metrics are logged",
    "callbacks": "the sections probe, eval, logging and analyses configure the callbacks",
    "check_val_every_n_epoch": _MEASURED,
    "default_root_dir": "fit --out sets the run directory",
    "enable_autolog_hparams": "recipe.yaml and manifest.json in the run directory record them",
    "enable_checkpointing": f"{_FIT}; logging.checkpoint_every_steps sets how often it saves",
    "enable_model_summary": f"{_FIT}; fit --dry-run shows it",
    "enable_progress_bar": _FIT,
    "fast_dev_run": "fit --dry-run runs each stage once",
    "limit_predict_batches": _MEASURED,
    "limit_test_batches": _MEASURED,
    "limit_train_batches": _LENGTH,
    "limit_val_batches": _MEASURED,
    "log_every_n_steps": "use logging.every_steps",
    "logger": "metrics.csv is always written; logging.tensorboard and logging.wandb add other loggers",
    "max_steps": _LENGTH,
    "max_time": _LENGTH,
    "min_epochs": _LENGTH,
    "min_steps": _LENGTH,
    "model_registry": "use logging.wandb",
    "num_sanity_val_steps": _MEASURED,
    "overfit_batches": _LENGTH,
    "plugins": "use trainer.precision and trainer.strategy",
    "reload_dataloaders_every_n_epochs": "the order of the data is a function of seed and epoch",
    "use_distributed_sampler": "sslzoo distributes the data over the ranks itself",
    "val_check_interval": _MEASURED,
}

# Arguments annotated as str in Lightning's signature, and the values that its code accepts.
CHOICES: dict[str, Any] = {
    "strategy": Literal["auto", "ddp", "ddp_find_unused_parameters_true"],
    "precision": Literal[
        "32-true",
        "16-mixed",
        "bf16-mixed",
        "16-true",
        "bf16-true",
        "64-true",
        "32",
        "16",
        "bf16",
        "64",
    ]
    | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "deterministic": bool | Literal["warn"] | None,
    "profiler": Literal["simple", "advanced", "pytorch"] | None,
}

FP16 = ("16-mixed", "16")  # precisions for which Lightning takes bf16 on a CPU, with a warning
# What other libraries call some of these precisions.
PRECISIONS = {
    "amp": "16-mixed",
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "half": "16-mixed",
    "bfloat16": "bf16-mixed",
    "fp32": "32-true",
    "float32": "32-true",
}


def check_trainer(values: dict[str, Any]) -> None:
    """Refuse values that are invalid or have no effect; ``ConfigError`` names the key."""
    for name in ("max_epochs", "accumulate_grad_batches", "num_nodes"):
        value = values.get(name, 1)
        check_field(value is not None and value >= 1, name, f"must be positive, got {shown(value)}")
    clip = values.get("gradient_clip_val")
    check_field(
        clip is None or clip > 0,
        "gradient_clip_val",
        f"must be positive, got {clip}; leave it out to disable clipping",
    )
    check_field(
        clip is not None or values.get("gradient_clip_algorithm") is None,
        "gradient_clip_algorithm",
        "must be left out without trainer.gradient_clip_val",
    )
    stated_devices(values.get("devices", "auto"))


def check_precision(values: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the precision needs a GPU; for runs on a CPU."""
    precision = values.get("precision")
    require(
        precision not in FP16,
        f"trainer.precision={precision}: fp16 is not available on a CPU; set trainer.precision=bf16-mixed or "
        "trainer.precision=32-true",
    )


def stated_devices(devices: int | str | list[int]) -> int | None:
    """Number of devices per machine that ``trainer.devices`` asks for; None: as many as the machine has."""
    if devices in ("auto", "-1", -1):
        return None
    listed = devices
    if isinstance(devices, str):
        numbers = [part.strip() for part in devices.split(",") if part.strip()]
        if numbers and all(number.isdecimal() for number in numbers):
            listed = [int(number) for number in numbers] if "," in devices else int(devices)
    if isinstance(listed, list) and 0 < len(set(listed)) == len(listed) and min(listed) >= 0:
        return len(listed)
    if isinstance(listed, int) and listed > 0:
        return listed
    raise ConfigError(
        "devices", f"must be a number of devices, a list of distinct indices, or auto; got {devices!r}"
    )


@cache
def trainer_arguments() -> dict[str, Any]:
    """Arguments of the installed ``lightning.Trainer`` and their types, parsed from its source without importing it."""
    spec = find_spec("lightning")
    assert spec is not None and spec.submodule_search_locations, "lightning is a dependency"
    source = Path(spec.submodule_search_locations[0], "pytorch", "trainer", "trainer.py")
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
            return {a.arg: CHOICES.get(a.arg) or _annotation(a.annotation) for a in init.args.kwonlyargs}
    raise AssertionError(f"no class Trainer in {source}")


def _annotation(node: ast.expr | None) -> Any:
    """The type that an annotation denotes; ``Any`` if it is not made of plain values."""
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
