"""The run directory: one folder that says what was run, with what, and how it went. Costs no torch to import."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sslzoo.recipe import LoadedRecipe, leaves

log = logging.getLogger(__name__)

PACKAGES = ("sslzoo", "torch", "torchvision", "lightning", "timm", "omegaconf", "numpy")
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


class RunError(ValueError):
    """A run directory cannot be used as asked; the message says what to change."""


@dataclass(frozen=True)
class Run:
    """A run's directory, and the names of what lies in it."""

    path: Path
    run_id: str
    resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def manifest(self) -> Path:
        """Versions, hardware, command, status."""
        return self.path / "manifest.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe with the origin of each value."""
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        """Everything that was logged."""
        return self.path / "train.log"

    @property
    def metrics(self) -> Path:
        """The metrics, a row an interval."""
        return self.path / "metrics.csv"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluations' JSON files."""
        return self.path / "eval"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest's content."""
        return json.loads(self.manifest.read_text())

    def update_manifest(self, **values: Any) -> None:
        """Set top-level entries (``data_fingerprint=...``). Rank 0 only."""
        write_json(self.manifest, self.read_manifest() | values)

    def finish(self, exit_code: int) -> None:
        """Record the end and the exit code. Rank 0 only."""
        self.update_manifest(finished=_now(), exit_code=int(exit_code))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` is never half written."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def new_run_id() -> str:
    """Sorts by time and does not repeat; under SLURM the job's number, so that a requeued job finds itself."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{hashlib.sha256(os.urandom(16)).hexdigest()[:6]}"


def open_run(
    loaded: LoadedRecipe, *, world_size: int, out: Path | None, resume: bool, root: Path = Path("runs")
) -> Run:
    """The directory ``out``, or ``root/<recipe>/<run id>``, made or taken up again. The same on all ranks.

    With ``resume`` and no ``out`` the recipe's newest run with a checkpoint is taken up, or a new one
    begun when there is none. Rank 0 decides and writes; the others follow.

    Raises:
        RunError: the directory holds another run, or the run in it had another recipe or world size.
    """
    if not is_leader():
        return _follow()
    path = out or (newest(root / loaded.recipe.name) if resume else None)
    run_id = os.environ.get("SSLZOO_RUN_ID") or new_run_id()
    path = Path(path or root / loaded.recipe.name / run_id).absolute()
    run = Run(path, run_id)
    if run.manifest.exists():
        if not resume:
            raise RunError(
                f"{path} holds another run; continue it with --resume auto, or give --out another directory"
            )
        manifest = run.read_manifest()
        run = Run(path, manifest["run_id"], resumed=True)
        _check_same(run, manifest, loaded, world_size)
    elif path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run; give --out a new directory")
    for folder in (run.checkpoints, run.evaluation):
        folder.mkdir(parents=True, exist_ok=True)
    _write(run, loaded, world_size)
    _announce(run)
    return run


def newest(folder: Path) -> Path | None:
    """The run in ``folder`` that was started last, among those with a checkpoint."""
    runs = [
        p.parent for p in Path(folder).glob("*/manifest.json") if any(p.parent.glob("checkpoints/step=*"))
    ]
    return max(runs, key=lambda path: Run(path, path.name).read_manifest()["started"], default=None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old, new)}`` of the leaves that differ."""
    absent = "absent"
    keys = [*old, *(key for key in new if key not in old)]
    return {
        key: (old.get(key, absent), new.get(key, absent))
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    }


def _check_same(run: Run, manifest: Mapping[str, Any], loaded: LoadedRecipe, world_size: int) -> None:
    if manifest["world_size"] != world_size:
        raise RunError(
            f"{run.path} was run with {manifest['world_size']} processes, not {world_size}: a run continues "
            "exactly only with as many; set trainer.devices and trainer.num_nodes back, or start another run "
            "with --init-from"
        )
    changed = differences(manifest["recipe"], _flat(loaded))
    refused = {key: pair for key, pair in changed.items() if not key.startswith(CHANGEABLE)}
    if refused:
        listing = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in refused.items())
        raise RunError(
            f"{run.path} was run with another recipe: {listing}; undo this, or start another run with --init-from"
        )
    for key, (old, new) in changed.items():
        log.warning("continuing with another %s: was %r, is %r", key, old, new)


def _flat(loaded: LoadedRecipe) -> dict[str, Any]:
    return json.loads(json.dumps(dict(leaves(loaded.recipe))))


def _write(run: Run, loaded: LoadedRecipe, world_size: int) -> None:
    before = run.read_manifest() if run.manifest.exists() else {}
    now = {
        "run_id": run.run_id,
        "started": before.get("started", _now()),
        "sessions": [*before.get("sessions", []), {"started": _now(), "command": sys.argv}],
        "finished": None,
        "exit_code": None,
        "command": sys.argv,
        "seed": loaded.recipe.seed,
        "world_size": world_size,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
        "recipe": _flat(loaded),
    }
    write_json(run.manifest, before | now)
    run.recipe.write_text(loaded.to_yaml(origins=True))


def versions() -> dict[str, str]:
    """Installed version of Python and of each package that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that ``folder`` lies in and whether files differ from it, or None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """What the numbers and the speed depend on."""
    import torch

    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def log_to(path: Path) -> logging.Handler:
    """Append everything logged by the framework and by Lightning to ``path``. Rank 0 only; returns the handler."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("sslzoo", "sslzoo_methods", "lightning.pytorch", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    for name in ("sslzoo", "sslzoo_methods"):
        logging.getLogger(name).setLevel(logging.INFO)
    return handler


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# -- the same directory on all ranks ------------------------------------------------------------
# Ranks that Lightning starts inherit rank 0's environment. Those that torchrun or srun start meet in a
# key-value store at the address where the process group is going to meet.

_STORES: list[Any] = []  # the server must outlive the call


def is_leader() -> bool:
    """Whether this process is global rank 0, before any process group exists."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if _srun_tasks() > 1:
        return os.environ["SLURM_PROCID"] == "0"
    return os.environ.get("NODE_RANK", "0") == os.environ.get("LOCAL_RANK", "0") == "0"


def _srun_tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def _store() -> Any:
    """The key-value store that all ranks share, or None where they were not started together."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = is_leader() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    elif _srun_tasks() > 1:
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        environment = SLURMEnvironment(auto_requeue=False)
        address, port, serves = environment.main_address, environment.main_port, is_leader()
    else:
        return None
    _STORES.append(TCPStore(address, port, is_master=serves, multi_tenant=True, timeout=timedelta(minutes=2)))
    return _STORES[-1]


def _announce(run: Run) -> None:
    message = json.dumps({"path": str(run.path), "run_id": run.run_id, "resumed": run.resumed})
    os.environ["SSLZOO_RUN"] = message
    store = _store()
    if store is not None:
        store.set("sslzoo/run", message)


def _follow() -> Run:
    store = _store()
    message = store.get("sslzoo/run").decode() if store is not None else os.environ.get("SSLZOO_RUN")
    if message is None:
        raise RunError("the processes of several machines are started by torchrun or srun")
    entries = json.loads(message)
    return Run(Path(entries["path"]), entries["run_id"], entries["resumed"])
