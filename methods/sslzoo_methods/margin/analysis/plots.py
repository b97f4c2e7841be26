"""Plots of a margin analysis, for screen and print, with colours that are distinguishable for colour-blind readers
and in greyscale. Missing, None and infinite statistics leave a gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sslzoo_methods.margin.factors import Margin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The Okabe-Ito palette, as in the curves of a run.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
LINES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)))  # 30 combinations with the colours
GREY = "0.78"
REPELLED: dict[str, Any] = {"edgecolor": "0.6", "hatch": "////"}
PAIR_ANGLE = "angle of the positive pair θ (degrees)"
BIN_WIDTH = 5.0
B_AXIS = (-4.0, 6.0)  # maximum range of the axis, because B is unbounded at 0 and 180 degrees
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "savefig.dpi": 200, "hatch.linewidth": 0.6
}  # fmt: skip


class Snapshot(NamedTuple):
    """Statistics at one step of training."""

    step: int
    epoch: float
    histogram: Sequence[int]  # 36 bins of 5 degrees
    statistics: Mapping[str, Mapping[str, float | None]]  # by margin


def label_of(name: str) -> str:
    """The legend's text for a margin name such as ``m1=10deg,m2=0.1``."""
    m1, m2 = (float(part.partition("=")[2].removesuffix("deg")) for part in name.split(",")[:2])
    return f"$m_1$ = {_signed(m1)}°, $m_2$ = {_signed(m2)}"


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _number(value: float | None) -> float:
    """``value``, or NaN if it is missing or not finite."""
    return value if value is not None and np.isfinite(value) else np.nan


def _angle(snapshot: Snapshot, key: str) -> float:
    """A statistic of the angles, which is the same for all margins."""
    return _number(next(iter(snapshot.statistics.values())).get(key))


def _finite(table: Mapping[str, np.ndarray], *keys: str) -> list[np.ndarray]:
    """Columns of ``table``, without rows in which one of them is not finite."""
    columns = np.stack([table[key] for key in keys])
    return list(columns[:, np.isfinite(columns).all(axis=0)])


def _stroke(i: int) -> dict[str, Any]:
    """Colour and line style of the i-th curve."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}


def _figure(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Put the legend below the plot and increase the figure's height accordingly."""
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.18 * ceil(len(labels) / columns) + 0.1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1)


def _shares(histogram: Sequence[int]) -> np.ndarray:
    counts = np.asarray(histogram, dtype=float)
    return 100 * counts / max(counts.sum(), 1)


def _limit(angles: np.ndarray, least: float = 0.0) -> float:
    """Upper limit of an axis for these angles: a multiple of the bin width with some margin, at least ``least``."""
    widest = np.max(angles, initial=0.0, where=np.isfinite(angles))
    return min(180.0, max(least, BIN_WIDTH * ceil(widest / BIN_WIDTH + 0.2)))


def _used(histogram: Sequence[int], share: float = 0.0) -> np.ndarray:
    """Upper edges of the bins with more than ``share`` per cent of the pairs."""
    return BIN_WIDTH * (np.flatnonzero(_shares(histogram) > share) + 1)


def _bars(axes: Axes, histogram: Sequence[int], **style: Any) -> None:
    left = BIN_WIDTH * np.arange(len(histogram))
    axes.bar(left, _shares(histogram), width=BIN_WIDTH, align="edge", **style)


def angle_histogram(snapshot: Snapshot) -> Figure:
    """Histogram of the angles of the positive pairs."""
    figure, axes = _figure()
    limit = _limit(_used(snapshot.histogram))
    _bars(axes, snapshot.histogram, color=SKY, edgecolor="white", linewidth=0.6)
    low, middle, high = (_angle(snapshot, f"theta_q{q}") for q in ("05", "50", "95"))
    if np.isfinite([low, middle, high]).all():
        axes.axvline(middle, color="black", linewidth=1.4)
        axes.axvspan(low, high, color="0.5", alpha=0.12, linewidth=0)
        text = f"median {middle:.1f}°\n5 % to 95 %: {low:.1f}° to {high:.1f}°"
        x, side = (0.97, "right") if middle < limit / 2 else (0.03, "left")  # away from the bars
        axes.text(x, 0.95, text, ha=side, va="top", transform=axes.transAxes)
    _tidy(axes, PAIR_ANGLE, "share of pairs (%)")
    axes.set_xlim(0, limit)
    return figure


def angle_evolution(snapshots: Sequence[Snapshot]) -> Figure:
    """Histogram of the angles over training, one column per snapshot, with equal widths even if intervals differ."""
    figure, axes = _figure(5.6, 3.5)
    shares = np.stack([_shares(s.histogram) for s in snapshots], axis=1)  # (bins, moments)
    limit = _limit(np.concatenate([_used(s.histogram) for s in snapshots]))
    edges = np.arange(len(snapshots) + 1) - 0.5
    mesh = axes.pcolormesh(edges, BIN_WIDTH * np.arange(37), shares, cmap="cividis", vmin=0, rasterized=True)
    medians = [_angle(s, "theta_q50") for s in snapshots]
    outline = [withStroke(linewidth=3.6, foreground="black")]  # white on black reads on every cell
    axes.plot(
        range(len(snapshots)), medians, "o-" if len(snapshots) < 16 else "-", color="white", linewidth=1.6,
        markersize=3, path_effects=outline, clip_on=False, label="median",
    )  # fmt: skip
    figure.legend(loc="outside upper right", frameon=False)
    marks = np.unique(np.linspace(0, len(snapshots) - 1, min(8, len(snapshots))).round().astype(int))
    axes.set_xticks(marks, [f"{snapshots[i].step:,}" for i in marks])
    axes.set(xlabel="optimiser step", ylabel=PAIR_ANGLE.replace("positive pair ", "positive pair\n"))
    axes.set_ylim(0, limit)
    figure.colorbar(mesh, ax=axes, label="share of pairs (%)")
    return figure


def slope_factors(snapshot: Snapshot, margins: Mapping[str, Margin]) -> Figure:
    """B as a function of the angle, with neutral angles, on top of the angles' histogram."""
    figure, axes = _figure()
    shown = _distinct(margins)
    neutral = [float(np.degrees(margin.neutral_angle)) for margin in shown.values()]
    limit = _limit(np.array([*_used(snapshot.histogram), *neutral]), 120.0)
    degrees = np.linspace(0.5, min(limit, 179.5), 720)
    share = axes.twinx()
    _bars(share, snapshot.histogram, color=GREY, alpha=0.7, linewidth=0)
    share.set_ylabel("share of pairs (%, grey bars)")
    share.set_zorder(0)
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    used = _used(snapshot.histogram, 1.0)
    first, last = (max(used[0] - BIN_WIDTH, 2.5), used[-1]) if len(used) else (10.0, limit)
    where_pairs_are = (degrees >= first) & (degrees <= last)
    low, high = 0.0, 2.0
    for i, (name, margin) in enumerate(shown.items()):
        factor = margin.slope_factor(torch.deg2rad(torch.from_numpy(degrees))).numpy()
        low = min(low, factor[where_pairs_are].min(), -1.0 if factor.min() < 0 else 0.0)
        high = max(high, factor[where_pairs_are].max())
        axes.plot(degrees, factor, **_stroke(i), linewidth=1.7, label=f"{name}, θ* = {neutral[i]:g}°")
    axes.plot(
        neutral, np.ones(len(neutral)), "o", markersize=6, color="black", markerfacecolor="white",
        label="neutral angle θ*" if neutral else None,
    )  # fmt: skip
    low, high = max(low, B_AXIS[0]), min(high, B_AXIS[1])
    axes.set_ylim(1.05 * low, 1.05 * high)
    axes.axhline(1.0, color="black", linewidth=0.8, label=None if shown else "B = 1, without angular margin")
    if low < 0:
        axes.axhline(0.0, color="black", linewidth=1.4)
        axes.axhspan(1.05 * low, 0, facecolor="none", linewidth=0, label="B < 0: pushed apart", **REPELLED)
    _tidy(axes, PAIR_ANGLE, "factor on the positive's pull, B(θ)")
    share.spines["top"].set_visible(False)
    axes.set_xlim(0, limit)
    _legend_below(figure, axes, 3)
    return figure


def _distinct(margins: Mapping[str, Margin]) -> dict[str, Margin]:
    """One margin per distinct angular margin, since B does not depend on m2; margins without one are left out."""
    return {
        f"$m_1$ = {_signed(np.degrees(margin.angular))}°": margin
        for margin in margins.values()
        if not margin.keeps_angle
    }


def probability_factor(samples: Mapping[str, np.ndarray], name: str, temperature: float) -> Figure:
    """A against P without margin for each sample, with the curves that bound A; on the right, zoomed to the samples."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    p0, a, delta = _finite(samples, "p0", "logit_factor", "delta")
    drops = {"largest": np.max, "median": np.median, "smallest": np.min} if len(delta) else {}
    drops = {f"the {which} δ": float(f(delta)) for which, f in drops.items()}
    if len(delta) and np.ptp(delta) < 1e-5:
        drops = {"every sample's δ": drops["the median δ"]}
    whole, near = figure.subplots(1, 2)
    right = min(1.02, 1.1 * p0.max(initial=0.01))
    for axes, end in ((whole, 1.02), (near, right)):
        axes.plot(p0, a, ".", color=BLUE, markersize=3, alpha=0.6, rasterized=True, zorder=3, label="samples")
        grid = np.linspace(0, min(end, 1), 800)
        inside = [np.ones(1), a]
        for (which, value), style in zip(drops.items(), ("-", "--", "-."), strict=False):
            bound = np.exp(np.clip(value, -300, 300))
            curve = 1 / (1 - grid + grid / bound)
            text = f"A at {which} = {_signed(round(value, 3))}"
            axes.plot(grid, curve, color=ORANGE, linestyle=style, label=text)
            text = f"its bound exp(δ) = {bound:.3g}"
            axes.axhline(bound, color="black", linestyle=style, linewidth=1.0, label=text)
            inside += [curve] if axes is near else [curve, bound[None]]
        _factor_axis(axes, np.concatenate(inside))
        _tidy(axes, "probability without margin, P⁰", "logit factor A = (1 − P) / (1 − P⁰)")
        axes.set_xlim(0, end)
    whole.set_title(f"{label_of(name)}, τ = {temperature:g}")
    near.set_title("range of the samples")
    _legend_below(figure, whole, 3)
    return figure


def _factor_axis(axes: Axes, values: np.ndarray) -> None:
    """Set the range of a vertical axis for positive factors, with a log2 scale if they span more than a factor of 8."""
    values = values[values > 0]
    low, high = float(values.min()), float(values.max())
    room = max((high / low) ** 0.05, 1.005)
    if high > 8 * low:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_ylim(low / room, high * room)


def factor_surface(
    samples: Mapping[str, np.ndarray], margin: Margin, name: str, temperature: float
) -> Figure:
    """A times B as a function of angle and probability, with the samples as dots."""
    figure, axes = _figure(5.6, 3.7)
    angles, probabilities = _finite(samples, "theta", "p0")
    end = _limit(angles, 120.0)
    degrees = torch.linspace(0.1, min(end, 179.9), 300, dtype=torch.float64)
    theta = torch.deg2rad(degrees)
    p0 = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)[:, None]
    a = 1 / (1 - p0 + p0 * torch.exp(-margin.drop(theta) / temperature).clamp(1e-99, 1e99))
    factor = (a * margin.slope_factor(theta)).numpy()
    octaves = np.log2(factor.clip(min=2.0**-99))
    pulled = np.append(np.abs(octaves[factor > 0]), 1.0)  # 1.0 in case there are none
    limit = max(1.0, min(4.0, float(np.ceil(np.quantile(pulled, 0.98)))))
    levels = np.linspace(-limit, limit, 26)  # 25 bands; the factor 1 is in the middle of one
    filled = axes.contourf(degrees, p0[:, 0], octaves, levels=levels, cmap="PuOr", extend="both")
    marks = "dots: samples"
    if octaves.min() < 0 < octaves.max():
        axes.contour(
            degrees, p0[:, 0], octaves, levels=[0.0], colors="black", linewidths=1.2, linestyles="--"
        )
        marks += "; dashed: A·B = 1"
    if factor.min() < 0:
        repelled = axes.contourf(
            degrees, p0[:, 0], factor, levels=[factor.min() - 1, 0], colors=["0.88"], hatches=[REPELLED["hatch"]]
        )  # fmt: skip
        repelled.set_edgecolor(REPELLED["edgecolor"])
        marks += "; hatched: A·B < 0, pushed apart"
    axes.plot(
        angles, probabilities, "o", color="black", markersize=2.2, markeredgecolor="white", markeredgewidth=0.3,
        alpha=0.6, rasterized=True, clip_on=False, zorder=3,
    )  # fmt: skip
    ticks = np.arange(-limit, limit + 1)
    bar = figure.colorbar(filled, ax=axes, ticks=ticks, label="factor on the positive's gradient, A·B")
    bar.ax.set_yticklabels([f"{2.0**t:g}" for t in ticks])
    axes.set(xlabel=PAIR_ANGLE, ylabel="probability of the positive\nwithout margin, P⁰")
    axes.set_title(f"{label_of(name)}, τ = {temperature:g}\n{marks}")
    axes.set_xlim(0, end)
    return figure


def positive_gradients(
    plain: Mapping[str, np.ndarray], samples: Mapping[str, Mapping[str, np.ndarray]], temperature: float
) -> Figure:
    """Length of the positive part of the gradient against the angle, with and without margins: medians in
    5-degree bins, and the interquartile range for the first two curves."""
    figure, axes = _figure()
    curves = [("no margin", plain), *((label_of(name), table) for name, table in samples.items())]
    for i, (name, table) in enumerate(curves):
        centres, low, middle, high = _binned(*_finite(table, "theta", "positive_gradient"))
        stroke: dict[str, Any] = _stroke(i - 1) if i else {"color": "black", "linestyle": "-"}
        axes.plot(centres, middle, **stroke, marker="os^Dvx"[i % 6], markersize=4, label=name, linewidth=1.5)
        if i < 2:
            axes.fill_between(centres, low, high, color=stroke["color"], alpha=0.15, linewidth=0)
    _tidy(axes, PAIR_ANGLE, "length of the positive part\nof the gradient, |∂L/∂θ| (per radian)")
    axes.set_xlim(0, _limit(plain["theta"], 30.0))
    axes.set_ylim(bottom=0)
    axes.set_title(f"τ = {temperature:g}")
    _legend_below(figure, axes, 3)
    return figure


def _binned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centres, and quartiles of ``y``, (4, bins), for the 5-degree bins with at least five samples."""
    index = np.clip((x // BIN_WIDTH).astype(int), 0, 35)
    rows = [(BIN_WIDTH * (b + 0.5), *np.quantile(y[index == b], [0.25, 0.5, 0.75]))
            for b in range(36) if (index == b).sum() >= 5]  # fmt: skip
    table = np.array(rows or [(90.0, np.nan, np.nan, np.nan)])
    return table.T


def effects_by_epoch(snapshots: Sequence[Snapshot], name: str, temperature: float) -> Figure:
    """Mean logarithms of the three factors of the positives' gradient by epoch, and their sum (diamonds)."""
    by_epoch = {int(s.epoch): s for s in snapshots}  # the last snapshot of each epoch
    chosen = np.unique(np.linspace(0, len(by_epoch) - 1, min(10, len(by_epoch))).round().astype(int))
    shown = [list(by_epoch.values())[i] for i in chosen]
    figure, axes = _figure()
    names = {"log_emphasis": "emphasis, log E₁", "log_angle": "angle, log E₂", "log_logit": "logit, log E₃"}
    values = np.array([[_number(s.statistics[name].get(key)) for s in shown] for key in names])
    places, total = np.arange(len(shown)), values.sum(axis=0)
    for i, label in enumerate(names.values()):
        axes.bar(
            places + (i - 1) * 0.26, values[i], width=0.24, color=(BLUE, YELLOW, GREEN)[i], label=label,
            hatch=("", "//", "..")[i], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    axes.plot(places, total, "D", color="black", markersize=4.5, label="sum of the three")
    for place in places[np.isnan(total)]:
        axes.annotate("not finite", (place, 0), (0, 4), textcoords="offset points", ha="center", rotation=90)
    axes.axhline(0, color="black", linewidth=0.8)
    middle, half = (len(shown) - 1) / 2, max(len(shown) / 2, 1.5)
    axes.set_xlim(middle - half, middle + half)
    axes.set_xticks(places, [str(int(s.epoch)) for s in shown])
    _tidy(axes, "epoch", "mean log factor on positives")
    axes.set_title(f"{label_of(name)}, τ = {temperature:g}")
    _legend_below(figure, axes, 2)
    return figure


def _slope_caption(margins: Mapping[str, Margin]) -> str:
    text = (
        "The factor B(θ) by which angular margins scale the pull on a positive; grey: histogram of the pairs."
    )
    if any(margin.angular > 0 for margin in margins.values()):
        text += " A positive m₁ increases the pull on pairs below its neutral angle θ*."
    if any(margin.angular < 0 for margin in margins.values()):
        text += " A negative m₁ decreases the pull on pairs below its θ* and pushes the closest apart."
    return text + " B is unbounded at 0° and 180°. A subtractive margin alone leaves B = 1."


def course_plots(
    snapshots: Sequence[Snapshot], margins: Mapping[str, Margin], temperature: float
) -> dict[str, tuple[Figure, str]]:
    """Figures with their captions, by name, of what every snapshot holds. The last of ``snapshots`` is the current
    state; plots of a single margin show the first one."""
    from matplotlib import rc_context

    now, first = snapshots[-1], next(iter(margins))
    with rc_context(STYLE):
        return {
            "angles": (angle_histogram(now), "Angles of the positive pairs in bins of 5°; shaded: 5 % to 95 %."),
            "angles_over_training": (
                angle_evolution(snapshots),
                "The same over training, one column per snapshot; the line is the median.",
            ),
            "slope_factor": (slope_factors(now, margins), _slope_caption(margins)),
            "effects_by_epoch": (
                effects_by_epoch(snapshots, first, temperature),
                "Mean logarithm of each effect on the positives' gradient, over the positives that are still "
                "pulled, at the last snapshot of each epoch.",
            ),
        }  # fmt: skip


def all_plots(
    snapshots: Sequence[Snapshot],
    margins: Mapping[str, Margin],
    plain: Mapping[str, np.ndarray],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    temperature: float,
) -> dict[str, tuple[Figure, str]]:
    """Those of :func:`course_plots`, and of the samples of the current state: ``samples`` are per-sample columns by
    margin, ``plain`` those without margin."""
    from matplotlib import rc_context

    first = next(iter(margins))
    with rc_context(STYLE):
        return course_plots(snapshots, margins, temperature) | {
            "probability_and_logit_factor": (
                probability_factor(samples[first], first, temperature),
                "The logit factor A of each sample against its probability without margin: from 1 at P⁰ = 0 to "
                "exp(δ) at P⁰ = 1, where δ is the decrease of the sample's logit.",
            ),
            "factor_surface": (
                factor_surface(samples[first], margins[first], first, temperature),
                "The factor A·B by which the margin scales a positive's gradient, against angle and probability.",
            ),
            "positive_gradient": (
                positive_gradients(plain, samples, temperature),
                "Length of the positive part of the gradient, whether pull or push: medians in bins of 5° with at "
                "least 5 samples; shaded: interquartile range without margin and with the first one.",
            ),
        }  # fmt: skip
