"""Whether a run is healthy, judged by the rows of its ``metrics.csv`` alone. Importable without torch.

The thresholds were set by runs that failed on purpose and by healthy ones (``tests/data/verdict``).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["healthy", "watch", "collapsed"]  # from good to bad


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The state of a run at its last evaluation."""

    state: State
    reason: str  # a sentence with the numbers, and the usual causes if the run is not healthy
    since_epoch: int  # the first epoch, from 1, of those up to the last that are judged alike

    @property
    def sentence(self) -> str:
        """State, reason and epoch in one line."""
        since = "" if self.state == "healthy" else f" since epoch {self.since_epoch}"
        return f"{self.state}{since}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one evaluation, and what is compared with those before it."""

    epoch: int  # from 1
    figures: Mapping[str, float]
    first: Mapping[str, float]  # figures of the first evaluation
    least_overlap: float | None  # of all evaluations up to this one; None before the second
    best_spread: float | None  # of embeddings, in the same way; None for a method without any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A kind of trouble at an evaluation."""

    kind: str
    state: State
    reason: str


def judge(rows: Iterable[Mapping[str, str]]) -> Verdict | None:
    """The verdict of ``rows``, as ``csv.DictReader`` gives those of ``metrics.csv``; None before the first evaluation,
    unless the loss is not finite."""
    evaluations, lost = _evaluations(rows)
    if lost is not None:
        causes = "the learning rate is too high, the warm-up too short, or 16-bit numbers overflow"
        reason = f"train/loss is not finite; usual causes: {causes}"
        return Verdict(state="collapsed", reason=reason, since_epoch=lost)
    if not evaluations:
        return None
    findings = [_find(evaluation) for evaluation in evaluations]
    last, since = findings[-1], evaluations[-1].epoch
    for evaluation, finding in zip(reversed(evaluations), reversed(findings), strict=True):
        if (finding and finding.kind) != (last and last.kind):
            break
        since = evaluation.epoch
    if last is None:
        return Verdict(state="healthy", reason=_healthy(evaluations[-1]), since_epoch=since)
    return Verdict(state=last.state, reason=last.reason, since_epoch=since)


def judge_file(metrics: Path) -> Verdict | None:
    """:func:`judge` of a ``metrics.csv``; None if there is no file."""
    with suppress(FileNotFoundError), metrics.open(newline="") as file:
        return judge(csv.DictReader(file))
    return None


def _evaluations(rows: Iterable[Mapping[str, str]]) -> tuple[list[Evaluation], int | None]:
    """The evaluations, and the epoch, from 1, of the first loss that is not finite."""
    found: list[Evaluation] = []
    least = best = None
    for row in rows:
        if None in row.values():  # an incomplete line, of a run that is writing it
            continue
        epoch = int(row["epoch"]) + 1
        if row.get("train/loss") and not math.isfinite(float(row["train/loss"])):
            return found, epoch
        if row.get("repr/std"):
            figures = {
                key: float(cell) for key, cell in row.items() if cell and key.startswith(("val/", "repr/"))
            }
            least = min(_known(least, figures.get("repr/overlap")), default=None)
            best = max(_known(best, figures.get("repr/embedding_std")), default=None)
            first = found[0].figures if found else figures
            found.append(
                Evaluation(epoch=epoch, figures=figures, first=first, least_overlap=least, best_spread=best)
            )
    return found, None


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def _find(evaluation: Evaluation) -> Finding | None:
    """The gravest finding at ``evaluation``; None if there is none."""
    rules = (_no_spread, _no_rank, _views_alike, _unmoved, _falling, _labels_unlike)
    return next((found for rule in rules if (found := rule(evaluation)) is not None), None)


# Spread of normalised vectors, as a fraction of 1/sqrt(width), below which all are alike.
NO_SPREAD = 0.15
NO_SPREAD_OF_FEATURES = 0.05  # which have a common part after a ReLU
NO_RANK, LOW_RANK = 2.5, 15.0  # directions used by embeddings or features: a collapse; by features: few
VIEWS_ALIKE = 0.03  # mean squared distance of two views of an image
# Share of neighbours kept at each evaluation since the first, and change of the spectrum's exponent since then, as a
# fraction of it. Learning encoders keep at most 0.62 at first, and change the exponent by 0.12 or more; frozen ones, in
# which only the statistics of batch norm change, keep 0.8 and change it by 0.03 at most.
UNMOVED, SAME_SPECTRUM = 0.75, 0.08
FALLING = 0.7  # of the spread of embeddings at its best
BY_CHANCE, MIXED = 4.0, 0.02  # top-5 accuracy over top-1, and separation of classes


def _no_spread(evaluation: Evaluation) -> Finding | None:
    figures = evaluation.figures
    for part, of, least in (
        ("embedding_", "embedding", NO_SPREAD),
        ("", "feature", NO_SPREAD_OF_FEATURES),
    ):
        width, spread = figures.get(f"repr/{part}width"), figures.get(f"repr/{part}std")
        if width is not None and spread is not None and spread * width**0.5 < least:
            causes = "no negatives and no predictor, a temperature far too low, or a rate far too high"
            reason = (
                f"{of} deviation {spread:.2g} where {width**-0.5:.2g} is even: complete collapse; "
                f"usual causes: {causes}"
            )
            return Finding(kind="no spread", state="collapsed", reason=reason)
    return None


def _no_rank(evaluation: Evaluation) -> Finding | None:
    """Healthy embeddings may use as few as five directions, features use more."""
    figures = evaluation.figures
    causes = "a rate far too high, or a loss that hardly pushes images apart"
    for part, of, least in (("embedding_", "embeddings", NO_RANK), ("", "features", LOW_RANK)):
        width, rank = figures.get(f"repr/{part}width"), figures.get(f"repr/{part}rankme")
        if width is None or rank is None or rank >= least or width < 4 * least:
            continue
        used = f"{of} use {rank:.1f} of {width:.0f} directions"
        if rank < NO_RANK:
            reason = f"{used}: collapse of dimensions; usual causes: {causes}"
            return Finding(kind="no rank", state="collapsed", reason=reason)
        reason = f"{used}: dimensions may be collapsing; usual causes: {causes}"
        return Finding(kind="low rank", state="watch", reason=reason)
    return None


def _views_alike(evaluation: Evaluation) -> Finding | None:
    distance = evaluation.figures.get("repr/alignment")
    if distance is None or distance >= VIEWS_ALIKE:
        return None
    reason = (
        f"two views of an image lie {distance:.2g} apart, as good as nothing: the task may be trivial; usual causes: "
        "augmentation is off or too weak"
    )
    return Finding(kind="views alike", state="watch", reason=reason)


def _unmoved(evaluation: Evaluation) -> Finding | None:
    """Encoders that learn change most at the beginning, in what lies close together and in their spectrum."""
    kept, figures = evaluation.least_overlap, evaluation.figures
    exponent, at_first = figures.get("repr/alpha"), evaluation.first.get("repr/alpha")
    if kept is None or kept < UNMOVED or exponent is None or not at_first:
        return None
    change = abs(exponent / at_first - 1)
    if change > SAME_SPECTRUM:
        return None
    reason = (
        f"from the beginning, at least {100 * kept:.0f} % of neighbours are those of the evaluation before, and the "
        f"spectrum's exponent is within {100 * change:.0f} % of the first: the encoder hardly changes; usual causes: "
        "the backbone is frozen or gets no gradient, or too low a rate"
    )
    return Finding(kind="unmoved", state="watch", reason=reason)


def _falling(evaluation: Evaluation) -> Finding | None:
    spread, best = evaluation.figures.get("repr/embedding_std"), evaluation.best_spread
    if spread is None or best is None or spread >= FALLING * best:
        return None
    reason = (
        f"embedding deviation has fallen from {best:.2g} to {spread:.2g}: it may be collapsing; usual "
        "causes: the loss no longer pushes images apart, or the rate is too high"
    )
    return Finding(kind="falling", state="watch", reason=reason)


def _labels_unlike(evaluation: Evaluation) -> Finding | None:
    figures = evaluation.figures
    top1, top5 = figures.get("val/linear_top1"), figures.get("val/linear_top5")
    between = figures.get("repr/separation")
    if top1 is None or top5 is None or between is None or top5 < BY_CHANCE * top1 or between >= MIXED:
        return None
    reason = (
        f"classes are mixed (separation {between:.2f}, linear top-1 {100 * top1:.1f} %, top-5 {100 * top5:.1f} %) "
        "while the features are spread: the labels do not match the images; usual causes: labels were shuffled, or "
        "belong to other files"
    )
    return Finding(kind="labels", state="watch", reason=reason)


def _healthy(evaluation: Evaluation) -> str:
    shown = (
        ("repr/embedding_std", "embedding deviation {:.2g}"),
        ("repr/rankme", "effective rank {:.1f}"),
        ("val/linear_top1", "linear top-1 {:.1f} %"),
    )
    figures = {
        key: value * (100 if key.startswith("val/") else 1) for key, value in evaluation.figures.items()
    }
    return ", ".join(form.format(figures[key]) for key, form in shown if key in figures)
