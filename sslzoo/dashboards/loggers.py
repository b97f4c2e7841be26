"""The dashboards of a run: TensorBoard and Weights & Biases. Once a run has started, their errors never end it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

from sslzoo.callbacks.meter import Follower
from sslzoo.dashboards.tensorboard import TensorBoard, write_evaluations
from sslzoo.dashboards.wandb_run import WandB, mode_of, update
from sslzoo.panels import sections
from sslzoo.processes.ending import Ending
from sslzoo.recipe.registry import analysis_class
from sslzoo.recipe.sections import LoggingConfig, Recipe
from sslzoo.records.directory import Run
from sslzoo.records.record import Record

log = logging.getLogger(__name__)
T = TypeVar("T")

# Key under logging, which is also the name of the package it needs -> argument of pip install.
PACKAGES = {"tensorboard": "'sslzoo[tensorboard]'", "wandb": "wandb"}


def require_packages(cfg: LoggingConfig) -> None:
    """Raise ``ValueError`` if a package that ``cfg`` needs is not installed."""
    for name, requirement in PACKAGES.items():
        if getattr(cfg, name) and find_spec(name) is None:
            raise ValueError(
                f"logging.{name} needs the package {name}: pip install {requirement}, or leave it out of the recipe"
            )


@dataclass(frozen=True, kw_only=True)
class Dashboards:
    """Those that a recipe asks for, of one run. Only rank 0 has them."""

    run: Run
    tensorboard: TensorBoard | None = None
    wandb: WandB | None = None

    @property
    def followers(self) -> list[Follower]:
        """What the run's meter tells of new values."""
        return [follower for follower in (self.tensorboard, self.wandb) if follower is not None]

    def end(self, ending: Ending) -> None:
        """Show the evaluations, and that the run has ended."""
        if (board := self.tensorboard) is not None:
            _attempt("TensorBoard", board.end)
            _attempt("TensorBoard", lambda: _write_evaluations(self.run))
        if (wandb := self.wandb) is not None:
            _attempt("W&B", lambda: wandb.end(ending))


def build_dashboards(recipe: Recipe, run: Run) -> Dashboards:
    """The dashboards that ``recipe`` asks for; nothing is written or sent before the training starts."""
    cfg = recipe.logging

    def tensorboard() -> TensorBoard | None:
        if not cfg.tensorboard:
            return None
        analyses = [(analysis.name, analysis_class(analysis.name).panels) for analysis in recipe.analyses]
        return TensorBoard(run.path, sections(recipe.method.name, recipe.method.panels, analyses=analyses))

    def wandb() -> WandB | None:
        mode = "disabled" if cfg.wandb is None else mode_of(cfg.wandb)
        return None if cfg.wandb is None or mode == "disabled" else WandB(run, cfg.wandb, mode)

    return Dashboards(run=run, tensorboard=_attempt("TensorBoard", tensorboard), wandb=_attempt("W&B", wandb))


def show_evaluations(recipe: Recipe, run: Run) -> None:
    """Show the evaluations of a run that has ended before, where its recipe asks for it."""
    if recipe.logging.tensorboard:
        _attempt("TensorBoard", lambda: _write_evaluations(run))
    if (cfg := recipe.logging.wandb) is not None:
        _attempt("W&B", lambda: update(run, cfg))


def _write_evaluations(run: Run) -> None:
    record = Record(run.path)
    if figures := record.accuracies:
        write_evaluations(
            run.path, {f"eval/{key}": value for key, value in figures.items()}, record.last_step
        )


def _attempt(name: str, action: Callable[[], T]) -> T | None:
    """The result of ``action``; None, with a warning, if it fails."""
    try:
        return action()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("%s failed: %s", name, reason)
        return None
