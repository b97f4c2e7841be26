"""The profile of a cluster: what every job on it needs, in one small YAML file. Importable without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sslzoo.checks import did_you_mean, require, shown

VARIABLE = "SSLZOO_CLUSTER"  # environment variable that names another profile than the user's
LISTS = ("modules", "options")
# SLURM's formats of a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What ``sslzoo submit`` adds to every job script. All keys are optional."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None  # time limit of a job, in one of SLURM's formats
    options: tuple[
        str, ...
    ] = ()  # further options of sbatch, such as --constraint=a100; they come last and win
    modules: tuple[str, ...] = ()  # environment modules to load
    # Put before the command in srun: `apptainer exec --nv image.sif`, or Pyxis's `--container-image=image.sqsh`.
    container: str | None = None
    scratch: str | None = (
        None  # shared folder in which runs/<recipe>/<id> are created, instead of the current one
    )


def check_time(text: str, where: str) -> None:
    """Raise ``ValueError``, which begins with ``where``, unless ``text`` is a time limit in one of SLURM's formats."""
    require(
        _TIME.fullmatch(text) is not None,
        f"{where}: {shown(text)} is no time limit; write hours:minutes:seconds such as 24:00:00, "
        "days-hours:minutes:seconds such as 2-12:00:00, or minutes",
    )


def profile_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The file with the profile: that of ``SSLZOO_CLUSTER``, otherwise ``~/.config/sslzoo/cluster.yaml``."""
    if environ.get(VARIABLE):
        return Path(environ[VARIABLE]).expanduser()
    config = environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "sslzoo" / "cluster.yaml"


def read_profile(environ: Mapping[str, str] = os.environ) -> Cluster:
    """The user's profile; an empty one if there is no file.

    Raises ``ValueError`` if the file that ``SSLZOO_CLUSTER`` names does not exist, or for invalid content.
    """
    path = profile_path(environ)
    if not path.exists():
        require(not environ.get(VARIABLE), f"{VARIABLE} names {path}, which does not exist")
        return Cluster()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    known = [field.name for field in fields(Cluster)]
    values = {} if content is None else content
    require(isinstance(values, dict), f"{path} must be a mapping with keys among {', '.join(known)}")
    for key, value in values.items():
        require(key in known, f"{path}: {key}: unknown key{did_you_mean(str(key), known)}")
        if key in LISTS:
            listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
            require(listed, f"{path}: {key}: must be a list of texts, got {shown(value)}")
        else:  # YAML reads 24:00:00 as a number
            require(
                isinstance(value, str), f"{path}: {key}: must be text, got {shown(value)}; put it in quotes"
            )
            if key == "time":
                check_time(value, f"{path}: time")
    return Cluster(**{key: _hashable(value) for key, value in values.items()})


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
