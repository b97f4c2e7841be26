"""What a machine offers a run, and what is wrong with it. Every problem comes with its repair."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path

from sslzoo.recipe import registry

FINE, NOTE, BROKEN = "fine", "note", "broken"
SHARED_MEMORY_NEEDED = 1 << 30  # bytes; worker processes hand their batches over through it
WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. ``note``: a run works, but maybe not as wished; ``broken``: it will not."""

    subject: str
    detail: str
    state: str = FINE
    fix: str = ""


def examine() -> list[Finding]:
    """Everything that is looked at, in order."""
    return [
        Finding(subject="python", detail=f"{platform.python_version()} on {platform.platform()}"),
        *packages(),
        *methods(),
        *devices(),
        *threads(),
        data(os.environ),
        *shared_memory(Path("/dev/shm")),
        *wandb(os.environ),
    ]


def packages() -> Iterator[Finding]:
    """The installed version of every dependency against the one asked for."""
    from packaging.requirements import Requirement

    for line in requires("sslzoo") or []:
        requirement = Requirement(line)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if requirement.marker is not None:
                yield Finding(
                    subject=requirement.name,
                    detail="not installed, and only needed by recipes that ask for it",
                    state=NOTE,
                    fix=f"pip install 'sslzoo[{requirement.name}]'",
                )
                continue
            yield Finding(
                subject=requirement.name,
                detail="not installed",
                state=BROKEN,
                fix=f"pip install '{requirement}'",
            )
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding(subject=requirement.name, detail=found)
        else:
            yield Finding(
                subject=requirement.name,
                detail=f"{found}, but sslzoo needs {requirement.specifier}",
                state=BROKEN,
                fix=f"pip install '{requirement}'",
            )


def methods() -> Iterator[Finding]:
    """Whether every registered method can be imported."""
    known = registry.methods()
    broken = []
    for name in known:
        try:
            registry.method_class(name)
        except Exception as error:  # whatever a stranger's package raises when imported
            broken.append(
                Finding(
                    subject=f"method {name}",
                    detail=f"{known[name].value} cannot be loaded: {error}",
                    state=BROKEN,
                    fix="repair or uninstall the package that registers it",
                )
            )
    if not known:
        yield Finding(
            subject="methods",
            detail="none registered",
            state=BROKEN,
            fix="install sslzoo itself (pip install -e .), not only its folder on the path",
        )
    elif len(known) > len(broken):
        yield Finding(subject="methods", detail=f"{len(known) - len(broken)} of {len(known)} load")
    yield from broken


def devices() -> Iterator[Finding]:
    """What can compute."""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16: use trainer.precision=16-mixed"
        yield Finding(
            subject=f"gpu {index}",
            detail=f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{bf16}",
        )
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "the driver shows none"
        yield Finding(
            subject="gpu",
            detail=f"none ({reason})",
            state=NOTE,
            fix="quickstart runs on the CPU; recipes that ask for GPUs need trainer.accelerator=cpu, or a CUDA "
            "build of torch and a driver that nvidia-smi can see",
        )


def threads() -> Iterator[Finding]:
    """Processors that this process may use against the threads that torch starts."""
    import torch

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.get_num_threads()
    detail = f"{count} for torch, {processors} processors"
    if count > processors:
        yield Finding(
            subject="threads",
            detail=detail,
            state=NOTE,
            fix=f"export OMP_NUM_THREADS={processors}: more threads than processors only fight",
        )
    else:
        yield Finding(subject="threads", detail=detail)


def data(environ: Mapping[str, str]) -> Finding:
    """The folder under which bundled recipes look for their images."""
    folder = environ.get("SSLZOO_DATA_DIR", "")
    if not folder:
        return Finding(
            subject="data",
            detail="SSLZOO_DATA_DIR is not set; recipes look under ./data",
            state=NOTE,
            fix="export SSLZOO_DATA_DIR=/path/to/datasets (embedded data needs none)",
        )
    path = Path(folder).expanduser()
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        return Finding(
            subject="data",
            detail=f"SSLZOO_DATA_DIR={folder} is no folder that can be read",
            state=BROKEN,
            fix="mount or make it, or export another SSLZOO_DATA_DIR",
        )
    inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    return Finding(subject="data", detail=f"{path}: {', '.join(inside) or 'no folders in it'}")


def shared_memory(path: Path) -> Iterator[Finding]:
    """Room for what worker processes hand over; nothing where the system has no such folder."""
    if not path.is_dir():
        return
    usage = shutil.disk_usage(path)
    detail = f"{path}: {usage.free / 2**20:.0f} MiB free of {usage.total / 2**20:.0f}"
    if usage.free < SHARED_MEMORY_NEEDED:
        yield Finding(
            subject="shared memory",
            detail=detail,
            state=NOTE,
            fix="start the container with --shm-size=8g (or --ipc=host), or set data.workers=0",
        )
    else:
        yield Finding(subject="shared memory", detail=detail)


def wandb(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Where Weights & Biases runs will go, where it is installed."""
    if find_spec("wandb") is None:
        return
    if environ.get("WANDB_MODE") in ("offline", "disabled"):
        yield Finding(subject="wandb", detail=f"{environ['WANDB_MODE']}, by WANDB_MODE")
    elif environ.get("WANDB_API_KEY") or _in_netrc(environ):
        yield Finding(subject="wandb", detail="logged in")
    else:
        yield Finding(
            subject="wandb",
            detail="not logged in; runs are kept offline in their own folder",
            state=NOTE,
            fix="wandb login; later wandb sync RUN_DIR/wandb/offline-* sends what was kept",
        )


def _in_netrc(environ: Mapping[str, str]) -> bool:
    """Whether a login stands where ``wandb login`` writes it. Its secret is not looked at."""
    path = Path(environ.get("NETRC") or Path.home() / ("_netrc" if sys.platform == "win32" else ".netrc"))
    try:
        return WANDB_HOST in netrc(path).hosts
    except (OSError, NetrcParseError):
        return False
