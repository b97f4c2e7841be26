"""How reports and dashboards show what the margin method records."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel


def _both(key: str, title: str, note: str, *, unit: str = "") -> Panel:
    """Means over queries from global crops and, where there are any, from local crops."""
    curves = (
        Curve(key=f"method/{key}", label="global crops"),
        Curve(key=f"method/{key}_local", label="local crops"),
    )
    return Panel(title=title, curves=curves, unit=unit, note=note)


PANELS = (
    _both(
        "loss_without_margin",
        "loss without margin",
        "Compare runs with different margins by this: the value of the loss itself depends on the margin.",
    ),
    _both(
        "theta_degrees",
        "angle of the positive pair",
        "Mean angle between an anchor and its positive. It falls from about 90 degrees while the views become alike.",
        unit="degrees",
    ),
    _both(
        "beyond_neutral_angle",
        "pairs beyond the neutral angle",
        "From that angle on, the margin weakens the pull on the positive instead of strengthening it.",
        unit="%",
    ),
    _both(
        "positive_probability",
        "probability of the positive",
        "Mean softmax probability without margin. Near 100 % the gradient without margin vanishes.",
        unit="%",
    ),
    _both(
        "emphasis_factor",
        "emphasis factor",
        "How much the margin strengthens positives on the whole; 1 is no effect.",
    ),
    _both(
        "logit_factor",
        "logit factor",
        "Mean factor by which the margin keeps the gradient of an anchor from vanishing; 1 is no effect.",
    ),
    _both(
        "clamped_factors",
        "clamped factors",
        "Share of pairs whose factor lies outside factor_range, so that an isolated effect is not exact for them.",
        unit="%",
    ),
    Panel(
        title="angular margin in force",
        curves=(Curve(key="method/angular_margin", label="angular margin"),),
        unit="rad",
        note="As the recipe's schedule sets it.",
    ),
    Panel(
        title="subtractive margin in force",
        curves=(Curve(key="method/subtractive_margin", label="subtractive margin"),),
        note="In units of a cosine, as the recipe's schedule sets it.",
    ),
)
