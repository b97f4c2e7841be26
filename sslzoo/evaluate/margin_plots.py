"""Pictures of a margin analysis, for the screen and for print: labelled axes, colours apart for every kind of
colour vision and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from sslzoo.margins import Margin
from sslzoo.report import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PURPLE, YELLOW, SKY = "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
LINES = ("-", "--", "-.", ":")
GREY = "0.78"
PAIR_ANGLE = "angle of the positive pair θ (degrees)"
BIN_WIDTH = 5.0
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "savefig.dpi": 200}


class Snapshot(NamedTuple):
    """What was seen at one moment of training."""

    step: int
    epoch: float
    histogram: Sequence[int]  # 36 bins of 5 degrees
    statistics: Mapping[str, Mapping[str, float]]  # by margin


def label_of(name: str) -> str:
    """``m1=10deg,m2=0.1`` as a legend writes it."""
    m1, m2 = (part.partition("=")[2] for part in name.split(","))
    return f"$m_1$ = {m1.removesuffix('deg')}°, $m_2$ = {m2}"


def _figure(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)


def _shares(histogram: Sequence[int]) -> np.ndarray:
    counts = np.asarray(histogram, dtype=float)
    return 100 * counts / max(counts.sum(), 1)


def _angle_limit(histogram: Sequence[int]) -> float:
    """The upper end of an angle axis: the last bin that holds a pair, and two more."""
    used = np.flatnonzero(np.asarray(histogram))
    return min(180.0, BIN_WIDTH * (int(used[-1]) + 3)) if len(used) else 180.0


def _bars(axes: Axes, histogram: Sequence[int], **style: Any) -> None:
    axes.bar(
        BIN_WIDTH * np.arange(len(histogram)), _shares(histogram), width=BIN_WIDTH, align="edge", **style
    )


def angle_histogram(snapshot: Snapshot) -> Figure:
    """How wide the positives' angles are."""
    figure, axes = _figure()
    _bars(axes, snapshot.histogram, color=SKY, edgecolor="white", linewidth=0.6)
    stats = next(iter(snapshot.statistics.values()))
    axes.axvline(stats["theta_q50"], color="black", linewidth=1.4)
    low, middle, high = (stats[f"theta_q{q}"] for q in ("05", "50", "95"))
    text = f"median {middle:.1f}°\n5 % to 95 %: {low:.1f}° to {high:.1f}°"
    axes.text(0.97, 0.95, text, ha="right", va="top", transform=axes.transAxes)
    axes.axvspan(low, high, color="0.5", alpha=0.12, linewidth=0)
    _tidy(axes, PAIR_ANGLE, "share of pairs (%)")
    axes.set_xlim(0, _angle_limit(snapshot.histogram))
    return figure


def angle_evolution(snapshots: Sequence[Snapshot]) -> Figure:
    """The angles' histogram over training: columns are moments, not to scale where they are uneven."""
    figure, axes = _figure(5.6, 3.5)
    shares = np.stack([_shares(s.histogram) for s in snapshots], axis=1)  # (bins, moments)
    limit = max(_angle_limit(s.histogram) for s in snapshots)
    edges = np.arange(len(snapshots) + 1) - 0.5
    mesh = axes.pcolormesh(edges, BIN_WIDTH * np.arange(37), shares, cmap="cividis", vmin=0, rasterized=True)
    medians = [next(iter(s.statistics.values()))["theta_q50"] for s in snapshots]
    axes.plot(range(len(snapshots)), medians, color="white", linewidth=1.6, marker="o", markersize=3)
    axes.annotate(
        "median",
        (len(snapshots) - 1, medians[-1]),
        (-4, 7),
        textcoords="offset points",
        color="white",
        ha="right",
    )
    marks = np.unique(np.linspace(0, len(snapshots) - 1, min(8, len(snapshots))).round().astype(int))
    axes.set_xticks(marks, [f"{snapshots[i].step:,}" for i in marks])
    axes.set(xlabel="optimiser step", ylabel=PAIR_ANGLE.replace("positive pair ", "positive pair\n"))
    axes.set_ylim(0, limit)
    figure.colorbar(mesh, ax=axes, label="share of pairs (%)")
    return figure


def slope_factors(snapshot: Snapshot, margins: Mapping[str, Margin]) -> Figure:
    """B over the angle, with its neutral angle, over the histogram."""
    figure, axes = _figure()
    limit = max(120.0, _angle_limit(snapshot.histogram))
    degrees = torch.linspace(1.0, min(limit, 179.0), 600, dtype=torch.float64)
    share = axes.twinx()
    _bars(share, snapshot.histogram, color=GREY, alpha=0.7, linewidth=0)
    share.set_ylabel("share of pairs (%, grey bars)")
    share.set_zorder(0)
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    shown = {name: margin for name, margin in margins.items() if not margin.keeps_angle}
    for i, (name, margin) in enumerate(_distinct(shown).items()):
        factor = margin.slope_factor(torch.deg2rad(degrees))
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        axes.plot(degrees, factor, color=colour, linestyle=line, linewidth=1.7, label=name)
        neutral = np.degrees(margin.neutral_angle)
        axes.plot(
            [neutral],
            [1.0],
            marker="o",
            markersize=6,
            markerfacecolor="white",
            color=colour,
            label=f"neutral θ* = {neutral:.1f}°",
            linestyle="",
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    _tidy(axes, PAIR_ANGLE, "factor on the positive's pull, B(θ)")
    share.spines["top"].set_visible(False)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 4)
    if shown:
        axes.legend(frameon=False, loc="upper right")
    return figure


def _distinct(margins: Mapping[str, Margin]) -> dict[str, Margin]:
    """Margins by angular part alone: m2 never enters B."""
    seen: dict[float, tuple[str, Margin]] = {}
    for margin in margins.values():
        label = f"$m_1$ = {np.degrees(margin.angular):g}°"
        seen.setdefault(margin.angular, (label, margin))
    return dict(seen.values())


def probability_factor(samples: Mapping[str, np.ndarray], name: str) -> Figure:
    """P without margin against A, sample by sample, with the curves that bound A; right, where the samples are."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    p0, a, delta = samples["p0"], samples["logit_factor"], samples["delta"]
    whole, near = figure.subplots(1, 2)
    grid = np.linspace(0, 1, 800)
    for axes in (whole, near):
        axes.plot(p0, a, ".", color=BLUE, markersize=2.5, alpha=0.4, rasterized=True, label="samples")
        for value, style, text in (
            (delta.max(), "-", "largest δ"),
            (np.median(delta), "--", "median δ"),
        ):
            axes.plot(
                grid,
                1 / (1 - grid * (1 - np.exp(-value))),
                color=ORANGE,
                linestyle=style,
                label=f"A at the {text}",
            )
            bound = f"bound exp(δ) = {np.exp(value):.2f}"
            axes.axhline(np.exp(value), color="black", linestyle=style, linewidth=1.0, label=bound)
        _tidy(axes, "probability without margin, P⁰", "logit factor A = (1 − P) / (1 − P⁰)")
    whole.set_title(label_of(name))
    whole.legend(frameon=False, loc="upper left")
    top = np.exp(delta.max())
    whole.set_ylim(1 - 0.04 * (top - 1), 1 + 1.7 * (top - 1))
    whole.set_xlim(0, 1.02)
    whole.get_legend().legend_handles[0].set_alpha(1.0)
    right = min(1.02, 1.1 * p0.max())
    near.set_xlim(0, right)
    near.set_ylim(1 - 0.04 * (a.max() - 1), 1 + 1.3 * (a.max() - 1))
    near.set_title("the samples' own range")
    return figure


def factor_surface(
    samples: Mapping[str, np.ndarray], margin: Margin, name: str, temperature: float
) -> Figure:
    """A times B over angle and probability, and where the samples are."""
    figure, axes = _figure(5.6, 3.7)
    degrees = torch.linspace(1.0, 120.0, 240, dtype=torch.float64)
    theta = torch.deg2rad(degrees)
    p0 = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)[:, None]
    a = 1 / (1 - p0 * (1 - torch.exp(-margin.drop(theta) / temperature)))
    factor = np.log2((a * margin.slope_factor(theta)).clamp_min(2**-4).numpy())
    limit = max(1.0, min(4.0, float(np.ceil(np.quantile(np.abs(factor), 0.98)))))
    levels = np.linspace(-limit, limit, 25)
    norm = TwoSlopeNorm(0.0, -limit, limit)
    filled = axes.contourf(degrees, p0[:, 0], factor, levels=levels, cmap="PuOr", norm=norm, extend="both")
    lines = axes.contour(
        degrees, p0[:, 0], factor, levels=[0.0], colors="black", linewidths=1.2, linestyles="--"
    )
    axes.clabel(lines, fmt={0.0: "A·B = 1"}, fontsize=8)
    axes.plot(
        samples["theta"], samples["p0"], ".", color="black", markersize=1.6, alpha=0.35, rasterized=True
    )
    ticks = np.arange(-limit, limit + 1)
    bar = figure.colorbar(filled, ax=axes, ticks=ticks, label="factor on the positive's gradient, A·B")
    bar.ax.set_yticklabels([f"{2.0**t:g}" for t in ticks])
    axes.set(xlabel=PAIR_ANGLE, ylabel="probability of the positive\nwithout margin, P⁰")
    axes.set_title(f"{label_of(name)}, τ = {temperature:g}; dots: samples")
    axes.set_xlim(1, 120)
    return figure


def positive_gradients(
    plain: Mapping[str, np.ndarray], samples: Mapping[str, Mapping[str, np.ndarray]]
) -> Figure:
    """Length of the positive part of the gradient over the angle, without and with margins: medians of
    5-degree bins, and the middle half of the samples for the first two."""
    figure, axes = _figure()
    curves = {"no margin": plain} | {label_of(name): table for name, table in samples.items()}
    for i, (name, table) in enumerate(curves.items()):
        centres, low, middle, high = _binned(table["theta"], table["positive_gradient"])
        colour = "black" if i == 0 else COLOURS[(i - 1) % len(COLOURS)]
        line, marker = LINES[i % len(LINES)], "os^Dvx"[i % 6]
        axes.plot(
            centres, middle, color=colour, linestyle=line, marker=marker, markersize=4, label=name, linewidth=1.5
        )  # fmt: skip
        if i < 2:
            axes.fill_between(centres, low, high, color=colour, alpha=0.15, linewidth=0)
    _tidy(axes, PAIR_ANGLE, "pull on the positive, |∂L/∂θ| (per radian)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centres and quartiles of ``y`` in the 5-degree bins that hold at least five samples."""
    index = np.clip((x // BIN_WIDTH).astype(int), 0, 35)
    rows = [(BIN_WIDTH * (b + 0.5), *np.quantile(y[index == b], [0.25, 0.5, 0.75]))
            for b in range(36) if (index == b).sum() >= 5]  # fmt: skip
    table = np.array(rows or [(90.0, np.nan, np.nan, np.nan)])
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def effects_by_epoch(snapshots: Sequence[Snapshot], name: str) -> Figure:
    """Mean logarithms of the three factors on the positives' gradient at each moment; they add up to the dot."""
    by_epoch = {int(s.epoch): s for s in snapshots}  # the last look of each epoch
    chosen = np.unique(np.linspace(0, len(by_epoch) - 1, min(10, len(by_epoch))).round().astype(int))
    shown = [list(by_epoch.values())[i] for i in chosen]
    figure, axes = _figure()
    names = {"log_emphasis": "emphasis, log E₁", "log_angle": "angle, log E₂", "log_logit": "logit, log E₃"}
    values = np.array([[s.statistics[name].get(k, np.nan) for s in shown] for k in names])
    hatches = ("", "//", "..")
    for i, label in enumerate(names.values()):
        axes.bar(
            np.arange(len(shown)) + (i - 1) * 0.26,
            values[i],
            width=0.24,
            color=(BLUE, YELLOW, GREEN)[i],
            label=label,
            hatch=hatches[i],
            edgecolor="white",
            linewidth=0.5,
        )
    axes.plot(
        range(len(shown)), values.sum(axis=0), "D", color="black", markersize=4.5, label="sum of the three"
    )
    axes.axhline(0, color="black", linewidth=0.8)
    middle, half = (len(shown) - 1) / 2, max(len(shown) / 2, 1.5)
    axes.set_xlim(middle - half, middle + half)
    axes.set_xticks(range(len(shown)), [str(int(s.epoch)) for s in shown])
    _tidy(axes, "epoch", "mean log factor on positives")
    axes.margins(y=0.25)
    axes.set_title(label_of(name))
    axes.legend(frameon=False, ncols=2, loc="upper center")
    return figure


def all_plots(
    snapshots: Sequence[Snapshot],
    margins: Mapping[str, Margin],
    plain: Mapping[str, np.ndarray],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    temperature: float,
) -> dict[str, tuple[Figure, str]]:
    """Every picture with its caption, by file name. The last of ``snapshots`` is the state looked at;
    ``samples`` are per-sample columns by margin, ``plain`` those without one; the first margin is the one
    shown where there is room for one."""
    from matplotlib import rc_context

    now, first = snapshots[-1], next(iter(margins))
    with rc_context(STYLE):
        return {
            "angles": (angle_histogram(now), "Angles of the positive pairs in bins of 5°; shaded: 5 % to 95 %."),
            "angles_over_training": (
                angle_evolution(snapshots),
                "The same over training, a column for each look; white: the median.",
            ),
            "slope_factor": (
                slope_factors(now, margins),
                "The factor B(θ) of angular margins on the pull of a positive: above 1 left of the neutral angle "
                "θ*, below 1 right of it. Grey: where the pairs are. A subtractive margin has B = 1.",
            ),
            "probability_and_logit_factor": (
                probability_factor(samples[first], first),
                "The logit factor A of every sample over its probability without margin. A grows with the "
                "probability and never passes exp(δ).",
            ),
            "factor_surface": (
                factor_surface(samples[first], margins[first], first, temperature),
                "What the margin makes of a positive's gradient, A·B, over angle and probability.",
            ),
            "positive_gradient": (
                positive_gradients(plain, samples),
                "Length of the positive part of the gradient: medians in bins of 5°; shaded: the middle half of "
                "the samples, without margin and with the first.",
            ),
            "effects_by_epoch": (
                effects_by_epoch(snapshots, first),
                "Mean logarithm of each effect on the positives' gradient, at the last look of each epoch.",
            ),
        }  # fmt: skip
