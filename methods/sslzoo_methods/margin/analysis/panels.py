"""How reports and dashboards show what the analysis logs during training."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel, panel


def _several(title: str, note: str, *, unit: str = "", **labels: str) -> Panel:
    curves = tuple(Curve(key=f"margins/{key}", label=label) for key, label in labels.items())
    return Panel(title=title, curves=curves, unit=unit, note=note)


def _factor(key: str, title: str, note: str) -> tuple[Panel, Panel]:
    """The mean of a factor over the pairs, and how far it varies among them."""
    spread = {f"{key}_min": "smallest", f"{key}_max": "largest", f"{key}_std": "standard deviation"}
    return (
        panel(f"margins/{key}_mean", title, f"Mean over the pairs; 1 is no effect. {note}"),
        _several(f"{title}: range", "Over the pairs of a batch.", **spread),
    )


PANELS = (
    _several(
        "angle of the positive pair",
        "Mean and quantiles over a batch. They fall from about 90 degrees while the views of an image become alike.",
        unit="degrees",
        theta_q05="5 % are below",
        theta_q25="25 % are below",
        theta_q50="median",
        theta_mean="mean",
        theta_q75="75 % are below",
        theta_q95="95 % are below",
    ),
    panel(
        "margins/theta_std",
        "spread of the angle",
        "Standard deviation over a batch. Margins treat pairs differently only where their angles differ.",
        unit="degrees",
    ),
    _several(
        "probability of the positive",
        "Mean softmax probability. Near 100 % without margin, the gradient without margin vanishes.",
        unit="%",
        p0="without margin",
        p="with the margin",
    ),
    _several(
        "saturated positives",
        "Share of positives whose probability without margin is above that: their gradient is small.",
        unit="%",
        saturated_90="above 90 %",
        saturated_99="above 99 %",
    ),
    panel("margins/delta", "decrease of the positive's logit", "What the margin takes from it, on average."),
    panel(
        "margins/negative_multiplier",
        "factor of the negatives",
        "The decrease of the logit acts as if there were so many times as many negatives.",
    ),
    panel(
        "margins/emphasis",
        "emphasis factor",
        "How much the margin would strengthen positives on the whole; 1 is no effect.",
    ),
    *_factor(
        "angle",
        "angle factor",
        "What the margin would multiply the pull on a pair by, beyond the emphasis.",
    ),
    *_factor(
        "logit",
        "logit factor",
        "What the margin would multiply the gradient of an anchor by, for its probability.",
    ),
    *_factor("slope", "slope factor", "What the margin would multiply the pull on a pair by, for its angle."),
    _several(
        "parts of the mean log factor",
        "They add up to the mean logarithm of what the margin would multiply the pull on positives by.",
        log_emphasis="emphasis",
        log_angle="angle",
        log_logit="logit",
    ),
    panel(
        "margins/without_log",
        "pairs without a logarithm",
        "Pairs that these parts leave out, because their slope factor is not positive or not finite.",
    ),
    panel(
        "margins/pull_to_push",
        "pull against push",
        "The pull on positives relative to the push of negatives, with the margin.",
    ),
    panel(
        "margins/beyond_neutral_angle",
        "pairs beyond the neutral angle",
        "From that angle on, the margin would weaken the pull on the positive instead of strengthening it.",
        unit="%",
    ),
    panel(
        "margins/beyond_pi",
        "pairs beyond 180 degrees",
        "Share of pairs whose angle and the margin exceed 180 degrees together.",
        unit="%",
    ),
    panel(
        "margins/alignment",
        "alignment of positives",
        "Mean squared distance of normalised positives: 0 where they are the same point.",
    ),
    panel(
        "margins/uniformity",
        "uniformity of negatives",
        "Log of the mean closeness of negatives: 0 where all are alike, lower is more even.",
    ),
    _several(
        "cosine of negatives",
        "Over all negatives of a batch. A largest one near 1 is of two images that look alike.",
        negative_cosine_mean="mean",
        negative_cosine_max="largest",
    ),
)
