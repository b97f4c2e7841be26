"""The run directory: one folder that says what was run, with what, and how it went. Importable without torch.

Rank 0 alone reads and writes here. First :func:`choose` decides which run to begin or to continue, and refuses what
cannot be; then :func:`begin` writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslzoo.exits import ExitCode, RunError
from sslzoo.files import write_json, write_text
from sslzoo.recipe.load import LoadedRecipe, leaves
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.run.ending import Ending
from sslzoo.run.lock import LOCK, refuse_if_owned
from sslzoo.run.provenance import git_state, hardware, versions

log = logging.getLogger(__name__)

# What may differ when a run continues: nothing that the numbers of a finished step depend on.
# trainer.max_epochs stretches the schedules of the steps to come, and is allowed for that.
CHANGEABLE = (
    "name",
    "data.root",
    "data.workers",
    "data.max_bad_fraction",
    "probe.data",
    "eval",
    "logging",
    "trainer.max_epochs",
    "trainer.enable_",
    "trainer.profiler",
    "trainer.detect_anomaly",
)
SHOWN = 3  # differences that an error lists
PHASES = ("training", "evaluation")  # what the manifest adds up the seconds of


@dataclass(frozen=True)
class Run:
    """A run's directory, and the names of what lies in it."""

    path: Path
    run_id: str

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def manifest(self) -> Path:
        """Versions, hardware, every start with its command, recipe, data and end."""
        return self.path / "manifest.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe with the origin of each value."""
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        """Everything that rank 0 logged."""
        return self.path / "train.log"

    def rank_log(self, rank: int) -> Path:
        """What one rank logged, with the traceback of its error."""
        return self.path / "logs" / f"rank-{rank}.log"

    @property
    def start(self) -> Path:
        """What the encoder started from, where that was not random."""
        return self.path / "start.pt"

    @property
    def metrics(self) -> Path:
        """The metrics, one row per interval."""
        return self.path / "metrics.csv"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluations' JSON files."""
        return self.path / "eval"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest's content; ``RunError`` where it cannot be read."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            _ = manifest["run_id"], manifest["recipe"], manifest["world_size"]
        except FileNotFoundError as error:
            raise RunError(f"the run directory {self.path} is gone, or its manifest.json is") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.manifest} is empty or damaged; start a run in another directory, from "
                f"{self.checkpoints} by --init-from"
            ) from error
        return manifest

    def conclude(self, ending: Ending, seconds: Mapping[str, float]) -> None:
        """Record the end of the start in progress, and what it spent."""
        manifest = self.read_manifest()
        error = None if ending.code == ExitCode.DONE else ending.for_manifest()
        end = {"finished": _now(), "exit_code": int(ending.code), "error": error}
        starts = manifest.get("sessions", [])
        if starts:
            starts[-1] |= end | {f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES}
        write_json(self.manifest, manifest | end | {"sessions": starts})

    def seconds_before(self, phase: str) -> float:
        """What the starts before the one in progress spent in ``phase``."""
        starts = self.read_manifest().get("sessions", [])
        return sum(start.get(f"{phase}_seconds") or 0.0 for start in starts[:-1])


@dataclass(frozen=True)
class Choice:
    """What is going to happen: this run, from this checkpoint, or nothing because it is finished."""

    run: Run
    checkpoint: Path | None = None
    finished: bool = False


def new_run_id() -> str:
    """Sorts by time and does not repeat; under SLURM the job's number, so that a requeued job finds itself."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{hashlib.sha256(os.urandom(16)).hexdigest()[:6]}"


def choose(
    loaded: LoadedRecipe,
    plan: TrainingPlan,
    *,
    fingerprint: str,
    out: Path | None,
    resume: str | None,
    root: Path = Path("runs"),
) -> Choice:
    """The run to begin or to continue: ``out``, the run that ``resume`` names, or ``root/<recipe>/<run id>``.
    Nothing is written.

    ``resume`` is ``auto`` (the recipe's newest run with a checkpoint where ``out`` is not given; a new run where
    there is none), a run directory or a checkpoint file. A damaged newest checkpoint gives way to the one before
    it, unless it was named.

    Raises:
        RunError: the directory holds another run or has an owner, or the run in it had another recipe, other
            images, another world size or more epochs.
        ValueError: no checkpoint can be read.
    """
    from sslzoo.checkpoints import load_checkpoint, newest_sound

    run_id = os.environ.get("SSLZOO_RUN_ID") or new_run_id()
    named = Path(resume).absolute() if resume is not None and resume != "auto" else None
    if named is not None and not named.exists():
        raise RunError(f"--resume {resume}: there is no such checkpoint or run directory")
    if named is not None and named.is_dir() and named.name == "checkpoints":
        named = named.parent
    origin = named if named is None or named.is_dir() else named.resolve().parent.parent
    path = out or origin or (newest(root / loaded.recipe.name) if resume else None)
    run = Run(Path(path or root / loaded.recipe.name / run_id).absolute(), run_id)
    if origin is not None and origin != run.path and run.manifest.exists():
        raise RunError(
            f"{run.path} holds another run than --resume {resume}, whose end would be lost; give --out a new directory"
        )
    source = run if origin is None else Run(origin, "")
    remarks: list[str] = []
    manifest: dict[str, Any] | None = None
    if source.manifest.exists():
        if not resume:
            raise RunError(
                f"{run.path} holds another run; continue it with --resume auto, or give --out another directory"
            )
        manifest = source.read_manifest()
        remarks = _check_same(source, manifest, loaded, plan, fingerprint)
        if source.path == run.path:
            run = Run(run.path, manifest["run_id"])
    if not run.manifest.exists() and _is_occupied(run.path):
        raise RunError(f"{run.path} is not empty and holds no run; give --out a new directory")
    refuse_if_owned(run.path)
    if resume is None:
        return Choice(run)
    checkpoint = named if named is not None and named.is_file() else newest_sound(source.checkpoints)
    done = manifest is not None and manifest["exit_code"] == ExitCode.DONE and source.path == run.path
    if checkpoint is None:
        if named is not None:
            raise RunError(f"--resume {resume}: no checkpoint in {source.checkpoints}")
        if done:
            raise RunError(
                f"{run.path} is a finished run whose checkpoints are gone; to train again give another --out"
            )
        return Choice(run)
    content = load_checkpoint(checkpoint)
    _check_data(checkpoint, content.get("SSLDataModule", {}).get("fingerprint", fingerprint), fingerprint)
    step = content["optimizer_steps"]
    _check_epochs(run, step, plan)
    if done and step == plan.total_steps and (named is None or named.is_dir()):
        return Choice(run, checkpoint, finished=True)
    for remark in remarks:
        log.warning("%s", remark)
    return Choice(run, checkpoint.absolute())


def _is_occupied(path: Path) -> bool:
    """Whether something lies at ``path`` that a start of ours, killed before its manifest, has not left."""
    if not path.is_dir():
        return path.exists()
    return any(p.name != LOCK and not p.name.endswith(".part") for p in path.iterdir())


def newest(folder: Path) -> Path | None:
    """The run in ``folder`` that was started last, among those with a checkpoint."""
    started: dict[Path, str] = {}
    for path in Path(folder).glob("*/manifest.json"):
        try:
            started[path.parent] = Run(path.parent, "").read_manifest()["started"]
        except RunError as error:
            log.warning("passing over a run: %s", error)
    passed: list[Path] = []
    for run in sorted(started, key=started.__getitem__, reverse=True):
        if any(run.glob("checkpoints/step=*.ckpt")):
            for other in passed:
                log.warning("%s has no checkpoint; taking up %s instead", other, run)
            return run
        passed.append(run)
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old, new)}`` of the leaves that differ."""
    absent = "not there"
    keys = [*old, *(key for key in new if key not in old)]
    return {
        key: (old.get(key, absent), new.get(key, absent))
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    }


def _check_same(
    run: Run, manifest: Mapping[str, Any], loaded: LoadedRecipe, plan: TrainingPlan, fingerprint: str
) -> list[str]:
    """What differs and may differ, one line each; ``RunError`` for what may not."""
    if manifest["world_size"] != plan.world_size:
        raise RunError(
            f"{run.path} was run with {manifest['world_size']} processes, not {plan.world_size}: a run continues "
            "exactly only with as many; set trainer.devices and trainer.num_nodes back, or start another run "
            "with another --out, from its weights by --init-from"
        )
    changed = differences(manifest["recipe"], _flat(loaded))
    refused = {key: pair for key, pair in changed.items() if not key.startswith(CHANGEABLE)}
    if refused:
        listing = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in refused.items()]
        more = f" and {len(listing) - SHOWN} more" if len(listing) > SHOWN else ""
        raise RunError(
            f"{run.path} was run with another recipe: {', '.join(listing[:SHOWN])}{more}; set that back, or start "
            "another run with another --out"
        )
    _check_data(run.path, manifest.get("data_fingerprint", fingerprint), fingerprint)
    return [f"continuing with another {key}: was {old!r}, is {new!r}" for key, (old, new) in changed.items()]


def _check_data(what: Path, old: str, new: str) -> None:
    if old != new:
        raise RunError(
            f"{what} was trained on other images: then {old}, now {new}; set data.dataset, data.root and data.split "
            "back, or start another run with another --out, from its weights by --init-from"
        )


def _check_epochs(run: Run, step: int, plan: TrainingPlan) -> None:
    if step > plan.total_steps:
        done = math.ceil(step / plan.steps_per_epoch)
        raise RunError(
            f"{run.path} has already trained to step {step}, in epoch {done}; trainer.max_epochs={plan.max_epochs} "
            f"lies below: set at least {done}, or --resume an older checkpoint"
        )


def _flat(loaded: LoadedRecipe) -> dict[str, Any]:
    return json.loads(json.dumps(dict(leaves(loaded.recipe))))


def begin(
    choice: Choice,
    loaded: LoadedRecipe,
    plan: TrainingPlan,
    *,
    fingerprint: str,
    left_behind: Mapping[str, float],
    start: Mapping[str, Any] | None = None,
) -> None:
    """Write manifest and recipe, and make the folders of ``choice.run``. The caller owns the directory.

    ``left_behind`` holds the seconds by phase of the last start, should it have been killed; ``start`` says which
    weights a new run's encoder starts from. ``OSError`` where the file system refuses.
    """
    run = choice.run
    before = run.read_manifest() if run.manifest.exists() else {}
    starts = before.get("sessions", [])
    if starts and starts[-1].get("exit_code") is None:  # it was killed: its lock tells how long it lived
        starts[-1] |= {f"{phase}_seconds": left_behind.get(phase, 0.0) for phase in PHASES}
    recipe = _flat(loaded)
    now = {
        "run_id": run.run_id,
        "started": before.get("started", _now()),
        "sessions": [
            *starts,
            {
                "started": _now(),
                "command": sys.argv,
                "host": platform.node(),
                "checkpoint": str(choice.checkpoint) if choice.checkpoint else None,
                "world_size": plan.world_size,
                "data_fingerprint": fingerprint,
                "recipe": recipe,
                "finished": None,
                "exit_code": None,
                "error": None,
            },
        ],
        "finished": None,
        "exit_code": None,
        "error": None,
        "command": sys.argv,
        "seed": loaded.recipe.seed,
        "world_size": plan.world_size,
        "data_fingerprint": fingerprint,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
        "recipe": recipe,
    } | ({} if start is None else {"start": start})
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.manifest, before | now)  # first: whatever lies here from now on belongs to a run
    write_text(run.recipe, loaded.to_yaml(origins=True))
    for folder in (run.checkpoints, run.evaluation):
        folder.mkdir(exist_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
