"""Check a machine for problems that would affect a run, and say how to fix them."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from sslzoo.dashboards.login import logged_in, reachable, server_url
from sslzoo.data.loading import processors
from sslzoo.launch.cluster import profile_path, read_profile
from sslzoo.processes.explain import one_line
from sslzoo.processes.placement import devices_per_node, world_size_of
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.sections import Recipe

FINE, NOTE, BROKEN = "fine", "note", "broken"
SHARED_MEMORY_NEEDED = 1 << 30  # bytes; data workers pass batches through shared memory


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check. ``note``: runs work, but perhaps not as intended; ``broken``: they will fail."""

    subject: str
    detail: str
    state: str = FINE
    fix: str = ""


def examine(recipe: Recipe | None = None) -> list[Finding]:
    """Run all checks, in order, for ``recipe`` where they depend on one."""
    return [
        Finding(subject="python", detail=f"{platform.python_version()} on {platform.platform()}"),
        *packages(),
        *methods(),
        *devices(),
        *threads(),
        data(os.environ),
        *shared_memory(Path("/dev/shm"), SHARED_MEMORY_NEEDED if recipe is None else _workers_need(recipe)),
        *(needs(recipe) if recipe is not None else ()),
        *wandb(os.environ),
        *cluster(os.environ),
    ]


def needs(recipe: Recipe) -> Iterator[Finding]:
    """Check whether ``recipe`` can start here: its device and precision, its images, also those for evaluation, and
    processors for its data workers."""
    from sslzoo.data.datasets import open_source
    from sslzoo.data.module import SSLDataModule
    from sslzoo.run.trainer import check_device

    yield _tried("trainer", lambda: check_device(recipe.trainer), "the recipe's device is here")

    def images() -> None:
        source = open_source(recipe.data)
        SSLDataModule(
            data=recipe.data,
            views=recipe.views,
            eval=recipe.eval,
            probe=recipe.probe,
            plan=plan_of(recipe, len(source), world_size_of(recipe)),
            seed=recipe.seed,
            source=source,
        ).validation_sets()

    yield _tried("images", images, f"{recipe.data.dataset} can be read, and evaluated")
    count = devices_per_node(recipe)
    here = processors()
    each = max(1, here // count)
    if dataset_info(recipe.data.dataset).decoded_by_workers and recipe.data.workers > each:
        yield Finding(
            subject="workers",
            detail=f"data.workers={recipe.data.workers} for each of {count} device(s), and {here} processors",
            state=NOTE,
            fix=f"set data.workers={each}, or measure with sslzoo bench",
        )


def _tried(subject: str, check: Callable[[], None], detail: str) -> Finding:
    """What ``check`` finds; the last clause of its error is the fix."""
    try:
        check()
    except (ValueError, OSError) as error:
        problem, _, fix = one_line(error).rpartition("; ")
        return Finding(
            subject=subject,
            detail=problem or fix,
            state=BROKEN,
            fix=fix if problem else "correct it, or override the recipe",
        )
    return Finding(subject=subject, detail=detail)


def packages() -> Iterator[Finding]:
    """Check the installed version of every dependency against the required one."""
    from packaging.requirements import Requirement

    for line in requires("sslzoo") or []:
        requirement = Requirement(line)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if requirement.marker is not None:
                extra = re.search(r'extra == "(.+?)"', str(requirement.marker))
                yield Finding(
                    subject=requirement.name,
                    detail="not installed; only some recipes need it",
                    state=NOTE,
                    fix=f"pip install 'sslzoo[{extra[1] if extra else requirement.name}]'",
                )
                continue
            yield Finding(
                subject=requirement.name,
                detail="not installed",
                state=BROKEN,
                fix=f"pip install '{requirement}'",
            )
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Finding(subject=requirement.name, detail=installed)
        else:
            yield Finding(
                subject=requirement.name,
                detail=f"{installed}, but sslzoo needs {requirement.specifier}",
                state=BROKEN,
                fix=f"pip install '{requirement}'",
            )


def methods() -> Iterator[Finding]:
    """Check that every registered method can be imported."""
    known = registry.methods()
    broken = []
    for name in known:
        try:
            registry.method_class(name)
        except Exception as error:  # importing third-party code may raise anything
            broken.append(
                Finding(
                    subject=f"method {name}",
                    detail=f"{known[name].value} cannot be loaded: {error}",
                    state=BROKEN,
                    fix="fix or uninstall the package that registers it",
                )
            )
    if not known:
        yield Finding(
            subject="methods",
            detail="none registered",
            state=BROKEN,
            fix="install sslzoo (pip install -e .); its folder on the path is not enough",
        )
    elif len(known) > len(broken):
        yield Finding(subject="methods", detail=f"{len(known) - len(broken)} of {len(known)} load")
    yield from broken


def devices() -> Iterator[Finding]:
    """List the GPUs."""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16: use trainer.precision=16-mixed"
        yield Finding(
            subject=f"gpu {index}",
            detail=f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{bf16}",
        )
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "the driver finds none"
        yield Finding(
            subject="gpu",
            detail=f"none ({reason})",
            state=NOTE,
            fix="quickstart runs on the CPU; recipes that ask for GPUs need trainer.accelerator=cpu, or a CUDA "
            "build of torch and a driver that nvidia-smi can see",
        )


def threads() -> Iterator[Finding]:
    """Compare the number of torch's threads with the processors that this process may use."""
    import torch

    here = processors()
    count = torch.get_num_threads()
    detail = f"{count} for torch, {here} processors"
    if count > here:
        yield Finding(
            subject="threads",
            detail=detail,
            state=NOTE,
            fix=f"export OMP_NUM_THREADS={here}: more threads than processors slow each other down",
        )
    else:
        yield Finding(subject="threads", detail=detail)


def data(environ: Mapping[str, str]) -> Finding:
    """Check the folder in which bundled recipes look for their images."""
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
            detail=f"SSLZOO_DATA_DIR={folder} is not a readable folder",
            state=BROKEN,
            fix="mount or create it, or export another SSLZOO_DATA_DIR",
        )
    inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    return Finding(subject="data", detail=f"{path}: {', '.join(inside) or 'contains no folders'}")


def shared_memory(path: Path, needed: int) -> Iterator[Finding]:
    """Check the free shared memory against the bytes ``needed``, on systems that have the folder ``path`` for it."""
    if not path.is_dir():
        return
    usage = shutil.disk_usage(path)
    detail = (
        f"{path}: {usage.free / 2**20:.0f} MiB free of {usage.total / 2**20:.0f}, {needed / 2**20:.0f} needed"
    )
    if usage.free < needed:
        yield Finding(
            subject="shared memory",
            detail=detail,
            state=NOTE,
            fix=f"start the container with --shm-size={max(8, -(-needed >> 30))}g (or --ipc=host), "
            "or lower data.workers",
        )
    else:
        yield Finding(subject="shared memory", detail=detail)


def _workers_need(recipe: Recipe) -> int:
    """Bytes of shared memory that the data workers of a machine fill."""
    from sslzoo.run.memory import shared_memory as needed

    plan = plan_of(recipe, recipe.data.global_batch_size, world_size_of(recipe))
    return needed(recipe, plan.micro_batch_size, devices_per_node(recipe))


def wandb(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check whether Weights & Biases runs, if it is installed, will be online or offline, and recommend what works."""
    if find_spec("wandb") is None:
        return
    url, push = server_url(environ), "sslzoo wandb push RUN"
    if environ.get("WANDB_MODE") in ("offline", "disabled"):
        yield Finding(subject="wandb", detail=f"{environ['WANDB_MODE']}, by WANDB_MODE")
    elif not logged_in(environ):
        yield Finding(
            subject="wandb",
            detail=f"no login for {url}; runs are kept offline in their own folder",
            state=NOTE,
            fix=f"run wandb login, with --host URL for a server of your own; {push} then sends earlier runs",
        )
    elif not reachable(url):
        yield Finding(
            subject="wandb",
            detail=f"there is a login for {url}, but no connection from here",
            state=NOTE,
            fix=f"set logging.wandb.mode=offline, so that runs do not wait for it, and call {push} on a machine with a "
            "connection, such as the login node, also while they train",
        )
    else:
        yield Finding(subject="wandb", detail=f"online, with a login for {url}")


def cluster(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Show the profile that ``sslzoo submit`` uses, on machines that have one or have SLURM."""
    path = profile_path(environ)
    try:
        profile = read_profile(environ)
    except ValueError as error:
        yield Finding(
            subject="cluster", detail=str(error), state=BROKEN, fix="correct it, or unset SSLZOO_CLUSTER"
        )
        return
    if path.exists():
        values = {field.name: getattr(profile, field.name) for field in fields(profile)}
        shown = [
            f"{key} {', '.join(value) if isinstance(value, tuple) else value}"
            for key, value in values.items()
            if value
        ]
        yield Finding(subject="cluster", detail=f"{path}: {'; '.join(shown) or 'empty'}")
    elif shutil.which("sbatch"):
        yield Finding(
            subject="cluster",
            detail="SLURM, and no profile for sslzoo submit",
            state=NOTE,
            fix=f"write partition, account and time to {path} if jobs need them",
        )
