"""Provenance of a run: package versions, git commit, hardware."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sslzoo", "torch", "torchvision", "lightning", "timm", "omegaconf", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the git repository that contains ``folder``, and whether tracked files differ; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _processor(table: Path = Path("/proc/cpuinfo")) -> str:
    """Model of the processor, or its architecture where the system does not name the model."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = (
        value.strip()
        for key, _, value in (line.partition(":") for line in lines)
        if key.strip() == "model name"
    )
    return next(named, "") or platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Hardware that results and speed depend on."""
    import torch

    from sslzoo.data.loading import processors

    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": _processor(),
        "cpu_cores": processors(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
