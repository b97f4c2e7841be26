"""How reports and dashboards show what SogCLR records."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel, panel

PANELS = (
    panel(
        "method/objective",
        "estimate of the objective",
        "It falls during training, while the value of the loss has no meaning: only the loss's gradient has.",
    ),
    panel(
        "method/positive_similarity",
        "similarity of positives",
        "Mean cosine of two views of an image. It rises while they become alike.",
    ),
    Panel(
        title="log u of the images in the batch",
        curves=(
            Curve(key="method/log_u_max", label="largest"),
            Curve(key="method/log_u_mean", label="mean"),
            Curve(key="method/log_u_min", label="smallest"),
        ),
        note="The logarithm of each image's running estimate. A maximum that stays apart marks images without good "
        "positives.",
    ),
    panel(
        "method/staleness",
        "staleness of the estimates",
        "Mean |log ĝ - log u| before the table is written. If it stays large, gamma is too small.",
    ),
    panel(
        "method/visited",
        "images with an estimate",
        "Share of the batch's images that an earlier step has seen: 0 in the first epoch, then all but those of "
        "incomplete last batches.",
        unit="%",
    ),
    panel(
        "method/temperature",
        "temperature",
        "Constant, or the mean of what the method has learnt.",
    ),
    panel(
        "method/gamma", "gamma", "Share of the new value in an estimate, as the recipe's schedule sets it."
    ),
)
