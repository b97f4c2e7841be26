"""How reports and dashboards show what MMCL records."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel, panel

PANELS = (
    Panel(
        title="kernel values",
        curves=(
            Curve(key="method/pos_kernel_mean", label="positive pairs"),
            Curve(key="method/neg_kernel_mean", label="negative pairs"),
        ),
        note="Mean kernel of an image's views and of different images. They part while the encoder learns; if both "
        "are near 1, it has collapsed.",
    ),
    panel(
        "method/support",
        "effective number of support vectors",
        "How many negatives count for an image, (Σα)² / Σα². It falls while the negatives become easy.",
    ),
    panel(
        "method/alpha_x",
        "multiplier of the positive",
        "Mean sum of an image's dual variables, which is the weight of its positive in the loss.",
    ),
    Panel(
        title="dual variables at a bound",
        curves=(
            Curve(key="method/frac_zero", label="zero, of all"),
            Curve(key="method/frac_at_C", label="at C, of the positive ones"),
        ),
        unit="%",
        note="Negatives with zero are ignored; if most of the others are at C, raise method.C.",
    ),
    panel(
        "method/kkt",
        "worst residual of the dual problem",
        "0 at the optimum, 1 where the solver has done nothing. The solver inv does not reach the optimum.",
        log_scale=True,
    ),
    panel(
        "method/iterations",
        "iterations of the solver",
        "1 for a solver without iterations; if pgd stops after 1, the dual variables are still the random start.",
    ),
    panel("method/sigma", "bandwidth of the kernel", "As the recipe's schedule sets it."),
    panel(
        "method/bandwidth",
        "bandwidth of the kernel",
        "The median squared distance of the embeddings, where sigma_rule is median. It shrinks with them.",
    ),
)
