"""What the scalars of the analysis are called, and their units."""

from __future__ import annotations

DEGREES, PERCENT = "°", "%"

# By key: words, and the unit; "" for pure numbers. Shares are fractions and shown as per cent.
WORDS: dict[str, tuple[str, str]] = {
    "theta_mean": ("angle θ of the positive pair: mean", DEGREES),
    "theta_std": ("standard deviation of θ", DEGREES),
    "theta_q05": ("5 % of the angles are below", DEGREES),
    "theta_q25": ("25 % of the angles are below", DEGREES),
    "theta_q50": ("median of θ", DEGREES),
    "theta_q75": ("75 % of the angles are below", DEGREES),
    "theta_q95": ("95 % of the angles are below", DEGREES),
    "p": ("probability P of the positive, with the margin", PERCENT),
    "p0": ("probability P⁰ of the positive, without the margin", PERCENT),
    "delta": ("decrease δ of the positive's logit", ""),
    "negative_multiplier": ("the same as a factor of all negatives: exp δ", ""),
    "saturated_90": ("positives with P⁰ above 90 %", PERCENT),
    "saturated_99": ("positives with P⁰ above 99 %", PERCENT),
    "emphasis": ("emphasis E₁ on positives", ""),
    "beyond_neutral_angle": ("pairs beyond the neutral angle, which are pulled less", PERCENT),
    "beyond_pi": ("pairs whose angle plus margin exceeds 180°", PERCENT),
    "pull_to_push": ("pull of positives relative to the push of negatives", ""),
    "alignment": ("alignment: mean squared distance of positives", ""),
    "uniformity": ("uniformity: log of the mean closeness of negatives, lower is more even", ""),
    "negative_cosine_mean": ("mean cosine of negatives", ""),
    "negative_cosine_max": ("largest cosine of a negative", ""),
    "angle_mean": ("factor E₂ of the angle: mean", ""),
    "angle_std": ("standard deviation of E₂", ""),
    "angle_min": ("smallest E₂", ""),
    "angle_max": ("largest E₂", ""),
    "logit_mean": ("factor A of the logit: mean", ""),
    "logit_std": ("standard deviation of A", ""),
    "logit_min": ("smallest A", ""),
    "logit_max": ("largest A", ""),
    "slope_mean": ("factor B of the slope: mean", ""),
    "slope_std": ("standard deviation of B", ""),
    "slope_min": ("smallest B", ""),
    "slope_max": ("largest B", ""),
    "log_emphasis": ("log E₁, the emphasis's share of the mean log factor", ""),
    "log_angle": ("mean log E₂, the angle's share", ""),
    "log_logit": ("mean log A, the logit's share", ""),
    "without_log": ("samples without a logarithm: B not positive or not finite", ""),
}


def described(key: str) -> str:
    """The words of a scalar, with its unit."""
    words, unit = WORDS[key]
    return f"{words} ({unit})" if unit else words


def formatted(key: str, value: float | None) -> str:
    """A scalar in its unit; ``-`` if it is not finite."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if WORDS[key][1] == PERCENT else f"{value:.4g}"


def titled(margin: str) -> str:
    """A margin's name such as ``m1=10deg,m2=0.1`` for people: m₁ = 10°, m₂ = 0.1."""
    return margin.replace("m1=", "m₁ = ").replace("deg,", "°, ").replace("m2=", "m₂ = ")
