"""The pictures hold what they show: for margins of either sign, wide angles, and embeddings that collapsed."""

from __future__ import annotations

import io
from functools import cache
from math import inf, radians
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sslzoo_methods.margin.analysis.config import margin_name
from sslzoo_methods.margin.analysis.observe import angle_histogram
from sslzoo_methods.margin.analysis.plots import Snapshot, all_plots
from sslzoo_methods.margin.factors import (
    NO_MARGIN,
    Margin,
    Pairs,
    gradient_factors,
    pull_sums,
)

TAU = 0.2
NEGATIVES = torch.linspace(4.0, 8.0, 200, dtype=torch.float64)  # logsumexp of their logits
ANGLES = {
    "near": torch.deg2rad(torch.linspace(3.0, 90.0, 200, dtype=torch.float64)),
    "wide": torch.deg2rad(torch.linspace(20.0, 179.0, 200, dtype=torch.float64)),
    "collapsed": torch.zeros(200, dtype=torch.float64),
}
SIGNS = [(10, 0), (0, 0.1), (-20, 0), (0, -0.1), (0, 0), (-5, 0.1), (45, 0.2), (-170, 0), (0, 5), (0, -5)]
LOGS = {"log_emphasis": 0.3, "log_angle": -0.2, "log_logit": 0.1}


def columns(theta: torch.Tensor, margin: Margin) -> dict[str, np.ndarray]:
    """The per-sample columns that the pictures read."""
    f = gradient_factors(
        Pairs(theta.cos(), theta, NEGATIVES), margin, temperature=TAU, sums=pull_sums(theta, margin)
    )
    table = {
        "theta": torch.rad2deg(theta),
        "p0": f.p0,
        "delta": f.delta,
        "logit_factor": f.logit,
        "positive_gradient": f.one_minus_p * margin.pull(theta).abs() / TAU,
    }
    return {key: value.numpy() for key, value in table.items()}


@cache
def draw(*pairs: tuple[float, float], angles: str = "near", looks: int = 1) -> dict[str, tuple[Figure, str]]:
    """All pictures of these margins, m1 in degrees."""
    theta = ANGLES[angles]
    margins = {margin_name(*pair): Margin(angular=radians(pair[0]), subtractive=pair[1]) for pair in pairs}
    quantiles = np.quantile(np.degrees(theta.numpy()), [0.05, 0.5, 0.95]).tolist()
    stats = dict(zip(("theta_q05", "theta_q50", "theta_q95"), quantiles, strict=True))
    stats |= {"log_emphasis": inf, "log_angle": None} if angles == "collapsed" else LOGS
    counts = angle_histogram(theta).tolist()
    snapshots = [Snapshot(10 * i, i // 3, counts, dict.fromkeys(margins, stats)) for i in range(looks)]
    samples = {name: columns(theta, margin) for name, margin in margins.items()}
    return all_plots(snapshots, margins, columns(theta, NO_MARGIN), samples, TAU)


def render(pictures: dict[str, tuple[Figure, str]]) -> None:
    """As files; pytest turns every warning into an error."""
    for figure, _ in pictures.values():
        figure.savefig(io.BytesIO(), format="png", dpi=40)


def xy(line: Any) -> np.ndarray:
    """The points of a line, (n, 2)."""
    return np.asarray(line.get_xydata())


def inside(axes: Axes, line: Any) -> bool:
    """Whether the axes, the right way up, hold every point of a line."""
    x, y = xy(line).T
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < right and low < high
    return bool((x >= left).all() and (x <= right).all() and (y >= low).all() and (y <= high).all())


@pytest.mark.parametrize("angles", ["near", "wide"])
@pytest.mark.parametrize("pair", SIGNS)
def test_the_logit_factors_axes_hold_samples_curves_and_bounds(
    pair: tuple[float, float], angles: str
) -> None:
    whole, near = draw(pair, angles=angles)["probability_and_logit_factor"][0].axes
    for axes in (whole, near):
        samples, *curves = axes.get_lines()
        assert len(xy(samples)) == 200 and inside(axes, samples)
        assert all(inside(whole, line) for line in curves)
        assert axes.get_ylim()[0] < 1 < axes.get_ylim()[1]
    ends = [xy(line)[-1, 1] for line in whole.get_lines() if str(line.get_label()).startswith("A at")]
    bounds = [xy(line)[0, 1] for line in whole.get_lines() if "exp" in str(line.get_label())]
    assert ends == pytest.approx(bounds)


@pytest.mark.parametrize("pair", [(-20, 0), (10, 0), (90, 0)])
def test_a_repelling_slope_is_in_the_picture_and_marked(pair: tuple[float, float]) -> None:
    axes = draw(pair, angles="wide")["slope_factor"][0].axes[0]
    low, high = axes.get_ylim()
    assert -5 < low < -0.9 and 2 <= high < 7
    assert any((xy(line)[:, 1] == 0).all() for line in axes.get_lines())
    assert [p.get_label() for p in axes.patches if p.get_hatch()] == ["B < 0: pushed apart"]
    assert xy(axes.get_lines()[0])[:, 1].min() < 0


def test_a_slope_that_only_pulls_has_no_mark() -> None:
    axes = draw((10, 0.1), (20, 0))["slope_factor"][0].axes[0]
    assert not [p for p in axes.patches if p.get_hatch()] and axes.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("pair", "angles", "repels"),
    [
        ((-20, 0), "near", True),
        ((10, 0), "near", False),
        ((10, 0), "wide", True),
        ((0, -0.1), "wide", False),
    ],
)
def test_the_surface_holds_the_samples_and_marks_repulsion(
    pair: tuple[float, float], angles: str, repels: bool
) -> None:
    axes = draw(pair, angles=angles)["factor_surface"][0].axes[0]
    samples = axes.get_lines()[-1]
    assert len(xy(samples)) == 200 and inside(axes, samples)
    assert axes.get_xlim()[1] == (180 if angles == "wide" else 120)
    hatched = [c for c in axes.collections if any(getattr(c, "hatches", None) or [])]
    assert bool(hatched) == repels == ("A·B < 0" in axes.get_title())
    if repels:
        edges = np.concatenate([path.vertices for path in hatched[0].get_paths()])[:, 0]
        zero = -pair[0] if pair[0] < 0 else 180 - pair[0]
        assert np.abs(edges - zero).min() < 0.1
        assert edges.max() < zero + 0.1 if pair[0] < 0 else edges.min() > zero - 0.1


@pytest.mark.parametrize("pair", SIGNS)
def test_captions_claim_nothing_that_the_sign_forbids(pair: tuple[float, float]) -> None:
    pictures = draw(pair)
    caption = pictures["slope_factor"][1]
    assert ("positive m₁" in caption) == (pair[0] > 0) and ("negative m₁" in caption) == (pair[0] < 0)
    assert "pull or push" in pictures["positive_gradient"][1]
    for name in ("probability_and_logit_factor", "positive_gradient", "effects_by_epoch", "factor_surface"):
        assert "τ = 0.2" in pictures[name][0].axes[0].get_title()


def test_twelve_margins_have_twelve_strokes() -> None:
    pictures = draw(*((m, 0) for m in range(-25, 35, 5) if m), (40, 0))
    for name in ("slope_factor", "positive_gradient"):
        figure = pictures[name][0]
        lines = [line for line in figure.axes[0].get_lines() if "m_1" in str(line.get_label())]
        strokes = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}  # type: ignore[attr-defined]
        assert len(strokes) == len(lines) == 12


@pytest.mark.parametrize("looks", [1, 60])
def test_legends_are_in_the_picture_and_beside_the_axes(looks: int) -> None:
    pictures = draw(*((m, 0) for m in (5, 10, 20, 30, 45, -10, -20)), looks=looks)
    render(pictures)
    for name, (figure, _) in pictures.items():
        assert len(figure.legends) == (name not in ("angles", "factor_surface"))
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert not any(axes.get_tightbbox().overlaps(box) for axes in figure.axes if axes.axison)  # type: ignore[union-attr]


def test_the_median_reads_on_every_cell() -> None:
    line = draw((10, 0), looks=5)["angles_over_training"][0].axes[0].get_lines()[0]
    assert line.get_color() == "white" and line.get_path_effects()


@pytest.mark.parametrize("angles", ["near", "collapsed"])
@pytest.mark.parametrize("pair", [(0, 0), (-20, 0), (0, -5), (-170, 0.1)])
def test_every_margin_is_drawn_without_a_warning(pair: tuple[float, float], angles: str) -> None:
    render(draw(pair, angles=angles))


def test_what_is_not_finite_leaves_a_gap() -> None:
    axes = draw((10, 0), angles="collapsed", looks=7)["effects_by_epoch"][0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["not finite"] * 3
    name, margin = "m1=10deg,m2=0", Margin(angular=0.2, subtractive=0)
    table = {key: np.full(9, np.nan) for key in columns(ANGLES["near"], NO_MARGIN)}
    render(all_plots([Snapshot(0, 0, [0] * 36, {name: {}})], {name: margin}, table, {name: table}, TAU))
