"""How reports and dashboards show what SimCLR records."""

from __future__ import annotations

from sslzoo.panels import panel

PANELS = (
    panel(
        "method/positive_similarity",
        "similarity of positives",
        "Mean cosine of two views of an image. It rises while they become alike; 1 from the start means collapse.",
    ),
)
