"""TensorBoard and Weights & Biases loggers. Once a run has started, their errors never end it."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from sslzoo.recipe.sections import LoggingConfig, WandbConfig

log = logging.getLogger(__name__)

# Key under logging, which is also the name of the package it needs -> argument of pip install.
PACKAGES = {"tensorboard": "'sslzoo[tensorboard]'", "wandb": "wandb"}
ONLINE_TIMEOUT = 20.0  # seconds to reach the server at the start, before the run continues offline


def require_packages(cfg: LoggingConfig) -> None:
    """Raise ``ValueError`` if a package that ``cfg`` needs is not installed."""
    for name, requirement in PACKAGES.items():
        if getattr(cfg, name) and find_spec(name) is None:
            raise ValueError(
                f"logging.{name} needs the package {name}: pip install {requirement}, or leave it out of the recipe"
            )


def build_loggers(
    cfg: LoggingConfig, run_dir: Path, run_id: str, *, recipe: dict[str, Any] | None = None
) -> list[Logger]:
    """The loggers that ``cfg`` asks for; one that cannot start is left out with a warning.

    ``recipe`` (plain values) becomes the config of the W&B run. A resumed run continues the W&B run with
    the same ``run_id``. Log values with ``logger.log_metrics(values, step=optimizer_steps)``.
    """
    loggers: list[Logger] = []
    if cfg.tensorboard:
        loggers.append(TensorBoardLogger(str(run_dir), name="", version="tensorboard"))
    if cfg.wandb is not None:
        wandb = _wandb(cfg.wandb, run_dir, run_id, recipe or {})
        loggers += [wandb] if wandb is not None else []
    return loggers


def log_histogram(loggers: Iterable[Logger], name: str, values: Tensor, *, step: int) -> None:
    """Log a histogram of ``values`` with every logger that supports histograms."""
    values = values.detach().cpu()
    for logger in loggers:
        try:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(name, values, step)
            elif isinstance(logger, WandbLogger):
                import wandb

                logger.log_metrics({name: wandb.Histogram(values.tolist())}, step=step)  # type: ignore[dict-item]
        except Exception as error:
            log.warning("%s could not log the histogram %s: %s", type(logger).__name__, name, error)


def wandb_login() -> bool:
    """Whether W&B credentials exist: ``WANDB_API_KEY``, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(cfg: WandbConfig, run_dir: Path, run_id: str, recipe: dict[str, Any]) -> WandbLogger | None:
    mode = cfg.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_login() else "offline")
    if mode == "online" and not wandb_login():
        log.warning("logging.wandb.mode=online, but there is no W&B login; continuing offline")
        mode = "offline"
    modes = ["online", "offline"] if mode == "online" else [mode]
    for attempt in modes:
        try:
            return _start(cfg, attempt, run_dir, run_id, recipe)
        except Exception as error:  # not installed, logged out, unreachable, a full disk: never fatal
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            after = "continuing offline" if attempt != modes[-1] else "continuing without it"
            log.warning("W&B (%s) could not start: %s; %s", attempt, reason, after)
    return None


def _start(cfg: WandbConfig, mode: str, run_dir: Path, run_id: str, recipe: dict[str, Any]) -> WandbLogger:
    import wandb

    logger = WandbLogger(
        project=cfg.project,
        name=f"{run_dir.parent.name}/{run_id}",
        id=run_id,
        save_dir=str(run_dir),
        entity=cfg.entity,
        tags=list(cfg.tags) or None,
        config=recipe,
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(init_timeout=ONLINE_TIMEOUT, silent=True),
    )
    _ = logger.experiment  # connect now, while errors can be handled; a dummy on ranks other than 0
    return logger
