"""The run directory: its files, and the decision which run to start or continue. Importable without torch.

Only rank 0 uses it. First :func:`choose` decides which run to start or continue and refuses invalid requests, without
writing; then :func:`begin` writes manifest and recipe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslzoo.exits import ExitCode, RunError
from sslzoo.files import write_json, write_text
from sslzoo.processes.ending import Ending
from sslzoo.processes.placement import SPECIAL_STEPS
from sslzoo.recipe.load import LoadedRecipe, leaves
from sslzoo.recipe.plan import Division, TrainingPlan
from sslzoo.records.lock import LOCK, process_start, refuse_if_owned
from sslzoo.records.provenance import git_state, hardware, versions

log = logging.getLogger(__name__)

# Keys that may change when a run continues, because finished steps do not depend on them.
# trainer.max_epochs is one of them; it stretches the schedules of the remaining steps.
CHANGEABLE = (
    "name",
    "data.root",
    "data.workers",
    "data.max_bad_fraction",
    "data.timeout",
    "probe.data",
    "eval",
    "logging",
    "speed.activation_checkpointing",
    "trainer.max_epochs",
    "trainer.devices",  # the division of a step into processes and micro-batches is checked by itself
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.enable_",
    "trainer.profiler",
    "trainer.detect_anomaly",
)
SLURM_FOLDER = "slurm"  # in a run directory: what `sslzoo submit` writes, before and beside the run
SHOWN = 3  # maximum number of differences listed in an error
PHASES = ("training", "evaluation")  # phases whose duration the manifest records


@dataclass(frozen=True)
class Run:
    """A run's directory and the paths of its files."""

    path: Path
    run_id: str

    @property
    def checkpoints(self) -> Path:
        """Folder with the checkpoints."""
        return self.path / "checkpoints"

    @property
    def manifest(self) -> Path:
        """JSON file with versions, hardware, and every start with its command, recipe, data and end."""
        return self.path / "manifest.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe as YAML, with the origin of each value."""
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        """Log of rank 0."""
        return self.path / "train.log"

    def rank_log(self, rank: int) -> Path:
        """Log of one rank, with the traceback of its error."""
        return self.path / "logs" / f"rank-{rank}.log"

    @property
    def start(self) -> Path:
        """Initial weights of the encoder, unless they were random."""
        return self.path / "start.pt"

    @property
    def metrics(self) -> Path:
        """Metrics as CSV, one row per logging interval."""
        return self.path / "metrics.csv"

    @property
    def evaluation(self) -> Path:
        """Folder with the evaluations' JSON files."""
        return self.path / "eval"

    @property
    def gallery(self) -> Path:
        """Neighbours and map of the last evaluation, as JSON."""
        return self.evaluation / "gallery.json"

    def read_manifest(self) -> dict[str, Any]:
        """The content of the manifest; ``RunError`` if it cannot be read."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            _ = manifest["run_id"], manifest["recipe"], manifest["world_size"]
        except FileNotFoundError as error:
            raise RunError(f"the run directory {self.path} or its manifest.json is gone") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.manifest} is empty or damaged; start a new run with a different --out, initialised with "
                f"--init-from {self.checkpoints}"
            ) from error
        return manifest

    def conclude(
        self, ending: Ending, seconds: Mapping[str, float], unreadable: Mapping[str, int] | None = None
    ) -> None:
        """Record how the current start ended, its seconds per phase and, if known, how many images of each source the
        run has found unreadable."""
        manifest = self.read_manifest()
        error = None if ending.code == ExitCode.DONE else ending.for_manifest()
        end = {"finished": _now(), "exit_code": int(ending.code), "error": error}
        if unreadable is not None:
            end["unreadable_images"] = dict(unreadable)
        starts = manifest.get("sessions", [])
        if starts:
            starts[-1] |= end | {f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES}
        write_json(self.manifest, manifest | end | {"sessions": starts})

    def seconds_before(self, phase: str) -> float:
        """Seconds that all earlier starts spent in ``phase``."""
        starts = self.read_manifest().get("sessions", [])
        return sum(start.get(f"{phase}_seconds") or 0.0 for start in starts[:-1])


@dataclass(frozen=True)
class Choice:
    """The run to start or continue, the checkpoint to continue from, and whether it is already finished."""

    run: Run
    checkpoint: Path | None = None
    finished: bool = False
    before: Division | None = None  # how steps were divided before the checkpoint
    launch: str = ""  # id of the start: that of the job, or of torchrun's agent, if there is one


def new_run_id(environ: Mapping[str, str] = os.environ) -> str:
    """A unique id, but the same after a restart: under SLURM that of the job, and of each step after the first, which
    may be another run; under torchrun that of its agent."""
    if "SLURM_JOB_ID" not in environ and "TORCHELASTIC_RUN_ID" in environ:
        # The agent that started this process, which starts it anew when it restarts the ranks.
        agent = (platform.node(), str(os.getppid()), process_start(os.getppid()))
        return f"torchrun-{hashlib.sha256(' '.join(agent).encode()).hexdigest()[:12]}"
    if "SLURM_JOB_ID" not in environ:
        return unique_id()
    step = environ.get("SLURM_STEP_ID", "")
    later = f".{step}" if step.isdecimal() and 0 < int(step) < SPECIAL_STEPS else ""
    return f"slurm-{environ['SLURM_JOB_ID']}{later}"


def unique_id() -> str:
    """A unique id that sorts by time."""
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
    attempt: int = 0,
    obstacle: Callable[[Division, bool], str] | None = None,
) -> Choice:
    """Decide which run to start or continue: ``out``, the run that ``resume`` names, or ``root/<recipe>/<run id>``.
    Nothing is written.

    ``resume`` is ``auto`` (without ``out``, the recipe's newest run with a checkpoint; if there is none, a new
    run), a run directory or a checkpoint file. If the newest checkpoint is damaged, the one before it is used,
    unless the damaged one was named. With ``attempt`` > 0, torchrun has restarted the processes, and the run that they
    have begun before continues. ``obstacle(before, draws)`` says why a run cannot continue whose steps were divided as
    ``before`` and have drawn random numbers or not; without it, the division must be the same.

    Raises:
        RunError: the directory contains another run or is in use, or its run had a different recipe, different
            images, a different world size or more epochs.
        ValueError: no checkpoint can be read.
    """
    from sslzoo.checkpoints import load_checkpoint, newest_sound

    run_id = os.environ.get("SSLZOO_RUN_ID") or new_run_id()
    out, resume = _restarted(loaded, out, resume, root, run_id) if attempt > 0 else (out, resume)
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
            f"{run.path} contains a different run than --resume {resume} and would be overwritten; give --out a new "
            "directory"
        )
    source = run if origin is None else Run(origin, "")
    remarks: list[str] = []
    manifest: dict[str, Any] | None = None
    if source.manifest.exists():
        if not resume:
            raise RunError(
                f"{run.path} already contains a run; continue it with --resume auto, or give --out another directory"
            )
        manifest = source.read_manifest()
        remarks = _check_same(source, manifest, loaded, fingerprint)
        if source.path == run.path:
            run = Run(run.path, manifest["run_id"])
    if not run.manifest.exists() and _is_occupied(run.path):
        raise _occupied(run.path)
    refuse_if_owned(run.path)
    if resume is None:
        return Choice(run, launch=run_id)
    checkpoint = named if named is not None and named.is_file() else newest_sound(source.checkpoints)
    done = manifest is not None and manifest["exit_code"] == ExitCode.DONE and source.path == run.path
    if checkpoint is None:
        if named is not None:
            raise RunError(f"--resume {resume}: no checkpoint in {source.checkpoints}")
        if done:
            raise RunError(
                f"{run.path} is a finished run whose checkpoints are gone; to train again, give another --out"
            )
        return Choice(run, launch=run_id)
    content = load_checkpoint(checkpoint)
    _check_data(checkpoint, content.get("SSLDataModule", {}).get("fingerprint", fingerprint), fingerprint)
    before = _check_division(checkpoint, content, plan, obstacle)
    step = content["optimizer_steps"]
    _check_epochs(run, step, plan)
    if done and step == plan.total_steps and (named is None or named.is_dir()):
        return Choice(run, checkpoint, finished=True)
    for remark in remarks:
        log.warning("%s", remark)
    return Choice(run, checkpoint.absolute(), before=before, launch=run_id)


def _restarted(
    loaded: LoadedRecipe, out: Path | None, resume: str | None, root: Path, run_id: str
) -> tuple[Path | None, str | None]:
    """``out`` and ``resume`` for processes that torchrun has restarted."""
    if resume is None:  # they may have begun a run, in a new directory
        return out or root / loaded.recipe.name / run_id, "auto"
    if resume == "auto":
        return out, resume
    named = Path(resume).absolute()
    path = out or (named if named.is_dir() else named.resolve().parent.parent)
    run = Run(path, "")
    begun = run.manifest.exists() and run.read_manifest()["sessions"][-1].get("launch") == run_id
    return (path, "auto") if begun else (out, resume)


def _is_occupied(path: Path) -> bool:
    """Whether ``path`` contains anything but a job script and its output, and the leftovers of a start that was killed
    before it wrote a manifest."""
    if not path.is_dir():
        return path.exists()
    ours = (LOCK, SLURM_FOLDER)
    return any(p.name not in ours and not p.name.endswith(".part") for p in path.iterdir())


def _occupied(path: Path) -> RunError:
    return RunError(f"{path} is not empty and contains no run; give --out a new directory")


def newest(folder: Path) -> Path | None:
    """The most recently started run in ``folder`` that has a checkpoint, or None."""
    started: dict[Path, str] = {}
    for path in Path(folder).glob("*/manifest.json"):
        try:
            started[path.parent] = Run(path.parent, "").read_manifest()["started"]
        except RunError as error:
            log.warning("skipping a run: %s", error)
    passed: list[Path] = []
    for run in sorted(started, key=started.__getitem__, reverse=True):
        if any(run.glob("checkpoints/step=*.ckpt")):
            for other in passed:
                log.warning("%s has no checkpoint; continuing %s instead", other, run)
            return run
        passed.append(run)
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old, new)}`` for the leaves that differ."""
    absent = "absent"
    keys = [*old, *(key for key in new if key not in old)]
    return {
        key: (old.get(key, absent), new.get(key, absent))
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    }


def _check_same(run: Run, manifest: Mapping[str, Any], loaded: LoadedRecipe, fingerprint: str) -> list[str]:
    """One line for each changed key that may change; ``RunError`` for any other difference."""
    changed = _check_recipe(run, manifest, loaded)
    _check_data(run.path, manifest.get("data_fingerprint", fingerprint), fingerprint)
    return [
        f"continuing with a changed {key}: was {old!r}, is {new!r}" for key, (old, new) in changed.items()
    ]


def check_recipe(path: Path, loaded: LoadedRecipe) -> None:
    """Raise ``RunError`` if ``path`` contains a run that ``loaded`` cannot continue, or something else than a run.
    Images and checkpoints are not looked at."""
    run = Run(path.absolute(), "")
    if run.manifest.exists():
        _check_recipe(run, run.read_manifest(), loaded)
    elif _is_occupied(run.path):
        raise _occupied(run.path)


def _check_recipe(run: Run, manifest: Mapping[str, Any], loaded: LoadedRecipe) -> dict[str, tuple[Any, Any]]:
    """The changed keys, with their old and new values; ``RunError`` if one of them must not change."""
    changed = differences(manifest["recipe"], _flat(loaded))
    refused = {key: pair for key, pair in changed.items() if not key.startswith(CHANGEABLE)}
    if refused:
        listing = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in refused.items()]
        more = f" and {len(listing) - SHOWN} more" if len(listing) > SHOWN else ""
        raise RunError(
            f"{run.path} was run with a different recipe: {', '.join(listing[:SHOWN])}{more}; change that back, or "
            "start a new run with a different --out"
        )
    return changed


def _check_division(
    checkpoint: Path,
    content: Mapping[str, Any],
    plan: TrainingPlan,
    obstacle: Callable[[Division, bool], str] | None,
) -> Division:
    """How steps were divided before ``checkpoint``; ``RunError`` if ``plan`` divides them otherwise and must not."""
    known = content.get("division") or {
        "processes": (content.get("manifest") or {}).get("world_size", plan.world_size),
        "micro_batches": plan.accumulate,
    }
    before = Division(**known)
    if before == plan.division:
        return before
    draws = content["callbacks"].get("StepSeeding", {}).get("draws", True)
    reason = "it was made for that division alone" if obstacle is None else obstacle(before, draws)
    if reason:
        raise RunError(
            f"{checkpoint} is of a run with {before}, and cannot be continued with {plan.division}: {reason}; change "
            "trainer.devices, trainer.num_nodes and trainer.accumulate_grad_batches back, or start a new run with a "
            "different --out, initialised with --init-from"
        )
    return before


def _check_data(what: Path, old: str, new: str) -> None:
    if old != new:
        raise RunError(
            f"{what} was trained on different images (then {old}, now {new}); change data.dataset, data.root and "
            "data.split back, or start a new run with a different --out, initialised with --init-from"
        )


def _check_epochs(run: Run, step: int, plan: TrainingPlan) -> None:
    if step > plan.total_steps:
        done = math.ceil(step / plan.steps_per_epoch)
        raise RunError(
            f"{run.path} has already trained to step {step}, in epoch {done}; trainer.max_epochs={plan.max_epochs} "
            f"is less: set at least {done}, or --resume an older checkpoint"
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
    parameters: int,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write manifest and recipe, and create the folders of ``choice.run``. The caller must hold the directory's lock.
    Returns the manifest without the recipe, for the checkpoints.

    ``left_behind`` holds the seconds per phase of the last start in case it was killed; ``parameters`` is the number of
    trained ones; ``start`` describes the
    weights that a new run's encoder starts from. Raises ``OSError`` if a file cannot be written.
    """
    run = choice.run
    before = run.read_manifest() if run.manifest.exists() else {}
    starts = before.get("sessions", [])
    if starts and starts[-1].get("exit_code") is None:  # it was killed; its lock holds its durations
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
                "launch": choice.launch,
                "checkpoint": str(choice.checkpoint) if choice.checkpoint else None,
                "world_size": plan.world_size,
                "nodes": loaded.recipe.nodes,
                "micro_batches": plan.accumulate,
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
        "derived": {
            "parameters": parameters,
            "peak_lr": plan.scaled_lr(loaded.recipe.optim),
            "total_steps": plan.total_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "training_images": plan.dataset_size,
        },
        "recipe": recipe,
    } | ({} if start is None else {"start": start})
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.manifest, before | now)  # first, because it marks the folder as a run directory
    write_text(run.recipe, loaded.to_yaml(origins=True))
    for folder in (run.checkpoints, run.evaluation):
        folder.mkdir(exist_ok=True)
    return _without_recipe(json.loads(json.dumps(before | now)))


def _without_recipe(manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest`` and its sessions without the recipe's flat keys."""
    kept = {key: value for key, value in manifest.items() if key != "recipe"}
    if "sessions" in kept:
        kept["sessions"] = [_without_recipe(start) for start in kept["sessions"]]
    return kept


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
