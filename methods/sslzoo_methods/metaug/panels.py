"""How reports and dashboards show what MetAug records."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel, panel

PANELS = (
    Panel(
        title="terms of the loss",
        curves=(
            Curve(key="method/contrast", label="original features"),
            Curve(key="method/generated_contrast", label="with generated features"),
        ),
        note="Contrastive terms before their weights. Both fall; the one with generated features stays higher.",
    ),
    Panel(
        title="similarities",
        curves=(
            Curve(key="method/positive_similarity", label="positives"),
            Curve(key="method/negative_similarity", label="negatives"),
            Curve(key="method/generated_positive_similarity", label="positives, generated"),
            Curve(key="method/generated_negative_similarity", label="negatives, generated"),
        ),
        note="(1 + cosine) / 2. Positives rise above negatives. Generated features are meant to be harder: their "
        "positives less similar, their negatives more.",
    ),
    panel(
        "method/generated_cosine",
        "cosine of generated and original features",
        "Near 1, the generators are close to the identity and add nothing.",
    ),
    panel(
        "method/online_std",
        "spread of the embeddings",
        "1 if they are spread evenly over the sphere; near 0 they have collapsed to a point.",
    ),
    panel("method/margin", "margin regulariser", "Before its weight. It falls while the margin is enforced."),
    Panel(
        title="thresholds of the margin",
        curves=(
            Curve(key="method/sigma_pos", label="positives"),
            Curve(key="method/sigma_neg", label="negatives"),
        ),
        note="The regulariser pushes generated positives below the first and generated negatives above the second.",
    ),
    panel(
        "method/generator_gradient",
        "gradient of the generators",
        "Its norm. 0 means that the generators no longer learn.",
        log_scale=True,
    ),
    panel(
        "method/second_order_share",
        "share of the second-order part",
        "Share of the generators' gradient that comes through the virtual step: 0 at first order, negative where it "
        "points the other way.",
    ),
)
