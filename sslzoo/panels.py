"""What to look at in a run: its metrics, arranged in sections of panels.

Reports, W&B workspaces and TensorBoard are all made from these definitions. Those of every run are in ``FRAMEWORK``;
a method adds its own in ``MethodConfig.panels``, an analysis in ``Analysis.panels``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

OF_EPOCHS = "_epoch"  # ending of means over an epoch, which repeat other metrics
Name = Literal["learning", "evaluation", "representation", "method", "analysis", "system", "run"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of ``metrics.csv`` or ``system.csv`` in a panel. It stands also for the same metric elsewhere, whose key
    is longer by ``/`` and where: on another data set, for example."""

    key: str
    label: str  # in the legend

    @property
    def pattern(self) -> str:
        """A regular expression for the keys of the metric, there and elsewhere."""
        return f"^{re.escape(self.key)}(/.*)?$"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot of one or more metrics over the optimiser step."""

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""  # such as "images/s"; "%" if the metrics are fractions, to be shown times 100
    log_scale: bool = False
    note: str = ""  # how to read it, in a sentence

    def lines(self, recorded: Iterable[str]) -> list[tuple[str, str]]:
        """Key and label of every line, by the keys that are ``recorded`` elsewhere: each curve, followed by the same
        metric on other data sets, layers and the like. The label of a panel's only curve is empty."""
        names = [key for key in recorded if not key.endswith(OF_EPOCHS)]
        found: list[tuple[str, str]] = []
        for curve in self.curves:
            of = curve.label if len(self.curves) > 1 else ""
            found.append((curve.key, of))
            for key in names:
                if key.startswith(f"{curve.key}/"):
                    where = key.removeprefix(f"{curve.key}/").replace("/", ", ")
                    found.append((key, f"{of}, {where}" if of else where))
        return found


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels under one heading."""

    name: Name
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number for a whole run, in its summary at W&B."""

    key: str
    title: str
    over_runs: Literal["max", "median"]  # the number of several runs


def panel(key: str, title: str, note: str = "", *, unit: str = "", log_scale: bool = False) -> Panel:
    """A panel with one curve, which has the panel's title as its label."""
    return Panel(
        title=title, curves=(Curve(key=key, label=title),), unit=unit, log_scale=log_scale, note=note
    )


AT_A_GLANCE = (
    Figure(key="best/linear_top1", title="best linear probe, top-1", over_runs="max"),
    Figure(key="best/knn_top1", title="best k-NN, top-1", over_runs="max"),
    Figure(key="verdict/severity", title="worst verdict: 0 healthy, 1 watch, 2 collapsed", over_runs="max"),
    Figure(key="median/images_per_s", title="throughput in images/s, median", over_runs="median"),
)
FRAMEWORK = (
    Section(
        name="learning",
        title="Learning",
        panels=(
            panel(
                "train/loss",
                "pre-training loss",
                "It falls fast, then slowly. Values compare within a method only, and not between batch sizes.",
            ),
            panel("opt/lr", "learning rate", "The rate of the recipe's schedule at each step."),
        ),
    ),
    Section(
        name="evaluation",
        title="Evaluation",
        panels=(
            panel(
                "val/linear_top1",
                "linear probe, top-1",
                "Share of test images that a logistic regression on the frozen features classifies correctly.",
                unit="%",
            ),
            panel(
                "val/knn_top1",
                "k-NN, top-1",
                "Share of test images whose nearest training images, by cosine, have their class. Nothing is fitted.",
                unit="%",
            ),
            panel(
                "val/linear_top5",
                "linear probe, top-5",
                "Share of test images whose class is among the five that the logistic regression finds most likely.",
                unit="%",
            ),
            panel(
                "val/linear_l2",
                "linear probe, penalty",
                "The penalty on weights that was best on held-out training images.",
                log_scale=True,
            ),
            panel(
                "val/online_top1",
                "online probe, top-1",
                "A classifier that learns beside the encoder, on augmented views; it ends below the linear probe.",
                unit="%",
            ),
            panel(
                "val/online_top5",
                "online probe, top-5",
                "Share of test images whose class is among the five that this classifier finds most likely.",
                unit="%",
            ),
            panel(
                "val/online_lr",
                "online probe, rate",
                "The learning rate of that of its classifiers which is best on held-out training images.",
                log_scale=True,
            ),
        ),
    ),
    Section(
        name="representation",
        title="Representation",
        panels=(
            panel(
                "repr/std",
                "feature deviation",
                "Standard deviation of normalised features. Near 0, all images look alike to the encoder; the most is "
                "1/sqrt(width).",
            ),
            panel(
                "repr/rankme",
                "effective rank (RankMe)",
                "About how many directions the features use, of as many as they are wide. It should grow or stay.",
            ),
            panel(
                "repr/lidar",
                "effective rank across views (LiDAR)",
                "About how many directions tell images apart, however they are augmented.",
            ),
            panel(
                "repr/alpha",
                "decay of the spectrum (alpha)",
                "How fast the eigenvalues fall, as a power of their rank. Far above 1, few directions carry all.",
            ),
            panel(
                "repr/uniformity",
                "uniformity",
                "Log of the mean closeness of two images: 0 where all are alike, -4 where they are spread evenly.",
            ),
            panel(
                "repr/alignment",
                "alignment of views",
                "Mean squared distance of two views of an image, normalised: 0 where augmentation does not matter.",
            ),
            panel(
                "repr/overlap",
                "neighbours kept since the last evaluation",
                "Share of each image's ten nearest that were among them before. It rises as the training settles.",
                unit="%",
            ),
            panel(
                "repr/separation",
                "class separation",
                "Share of the spread that lies between classes: 0 where they are mixed, 100 % where each is a point.",
                unit="%",
            ),
            panel(
                "repr/embedding_std",
                "deviation of embeddings",
                "The same of the projector's output, which the loss sees: a collapse shows here first.",
            ),
            panel(
                "repr/embedding_rankme",
                "effective rank of embeddings",
                "About how many directions the projector's output uses. Losses tend to lower it as they fall.",
            ),
            panel(
                "repr/embedding_width", "width of embeddings", "The most that the rank of embeddings can be."
            ),
            panel(
                "repr/width",
                "number of features",
                "The width of the features, and the most their rank can be.",
            ),
        ),
    ),
    Section(
        name="system",
        title="System",
        panels=(
            panel(
                "sys/images_per_s",
                "throughput",
                "Training images per second on all devices, without evaluations and checkpoints.",
                unit="images/s",
            ),
            panel(
                "sys/data_wait",
                "time spent waiting for data",
                "Above a few per cent, more data workers or smaller images speed the run up.",
                unit="%",
            ),
            panel(
                "sys/gpu_mem", "peak GPU memory", "The most that the first GPU has held so far.", unit="GiB"
            ),
        ),
    ),
)
ORDER: tuple[Name, ...] = ("learning", "evaluation", "representation", "method", "analysis", "system", "run")
OURS = ("train", "opt", "val", "repr", "sys", "method")  # beginnings of keys that no analysis has


def sections(
    method: str,
    own: Sequence[Panel],
    recorded: Iterable[str] = (),
    *,
    analyses: Iterable[tuple[str, Sequence[Panel]]] = (),
) -> tuple[Section, ...]:
    """All sections that have panels, in order: the framework's, one with the panels of ``method``, and one for each of
    ``analyses``, which are names and panels.

    ``recorded`` are the keys of a run's metrics. Those of the method and of analyses that are in none of the panels get
    a panel named after them, so that what has no panels is shown too.
    """
    of_analyses = [
        Section(name="analysis", title=f"Analysis: {name}", panels=tuple(panels)) for name, panels in analyses
    ]
    known = [curve.key for panel_ in own for curve in panel_.curves]
    known += [curve.key for of in of_analyses for panel_ in of.panels for curve in panel_.curves]
    rest = [key for key in recorded if not any(key == of or key.startswith(f"{of}/") for of in known)]
    measured = [key for key in rest if key.startswith("method/") and not key.endswith(OF_EPOCHS)]
    analysed = [key for key in rest if "/" in key and not key.startswith(tuple(f"{name}/" for name in OURS))]
    more = (
        Section(name="method", title=method, panels=(*own, *(_plain(key, key[7:]) for key in measured))),
        *of_analyses,
        Section(name="analysis", title="Analyses", panels=tuple(_plain(key, key) for key in analysed)),
    )
    found = (*FRAMEWORK, *(section for section in more if section.panels))
    return tuple(sorted(found, key=lambda section: ORDER.index(section.name)))


def _plain(key: str, name: str) -> Panel:
    return panel(key, name.replace("/", " ").replace("_", " "))
