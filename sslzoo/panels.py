"""What to look at in a run: its metrics, arranged in sections of panels.

Reports, W&B workspaces and TensorBoard are all made from these definitions. Those of every run are in ``FRAMEWORK``;
a method adds its own in ``MethodConfig.panels``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Name = Literal["learning", "evaluation", "representation", "method", "system", "run"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of ``metrics.csv`` or ``system.csv`` in a panel."""

    key: str
    label: str  # in the legend


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot of one or more metrics over the optimiser step."""

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""  # such as "images/s"; "%" if the metrics are fractions, to be shown times 100
    log_scale: bool = False
    note: str = ""  # how to read it, in a sentence


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels under one heading."""

    name: Name
    title: str
    panels: tuple[Panel, ...]


def _one(key: str, title: str, *, unit: str = "", log_scale: bool = False, note: str = "") -> Panel:
    return Panel(
        title=title, curves=(Curve(key=key, label=title),), unit=unit, log_scale=log_scale, note=note
    )


FRAMEWORK = (
    Section(
        name="learning",
        title="Learning",
        panels=(
            _one("train/loss", "pre-training loss"),
            _one("opt/lr", "learning rate"),
        ),
    ),
    Section(
        name="evaluation",
        title="Evaluation",
        panels=(
            _one("val/linear_top1", "linear probe, top-1", unit="%"),
            _one("val/knn_top1", "k-NN, top-1", unit="%"),
            _one("val/online_top1", "online probe, top-1", unit="%"),
        ),
    ),
    Section(
        name="system",
        title="System",
        panels=(
            _one("sys/images_per_s", "throughput", unit="images/s"),
            _one("sys/data_wait", "time spent waiting for data", unit="%"),
            _one("sys/gpu_mem", "peak GPU memory", unit="GiB"),
        ),
    ),
)
ORDER: tuple[Name, ...] = ("learning", "evaluation", "representation", "method", "system", "run")


def sections(method: str, own: Iterable[Panel]) -> tuple[Section, ...]:
    """All sections, in order: the framework's, and one with the panels of ``method``, if it has any."""
    panels = tuple(own)
    of_method = (Section(name="method", title=method, panels=panels),) if panels else ()
    return tuple(sorted((*FRAMEWORK, *of_method), key=lambda section: ORDER.index(section.name)))
