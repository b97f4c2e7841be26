"""How reports and dashboards show what SCE records."""

from __future__ import annotations

from sslzoo.panels import Curve, Panel, panel

PANELS = (
    Panel(
        title="terms of the loss",
        curves=(
            Curve(key="method/contrastive", label="contrastive"),
            Curve(key="method/relational", label="relational"),
            Curve(key="method/ceil", label="ceiling"),
        ),
        unit="nats",
        note="The three terms before their weights. The ceiling term is small while the prediction leaves "
        "probability to other images than the positive.",
    ),
    panel(
        "method/positive_similarity",
        "similarity of positives",
        "Mean cosine of an online embedding and its positive. It rises during training.",
    ),
    panel(
        "method/target_entropy",
        "entropy of the relational target",
        "0: the target is a single other image; the logarithm of the number of keys: all images alike, which teaches "
        "nothing.",
        unit="nats",
    ),
    panel(
        "method/target_count",
        "effective number of relational targets",
        "exp(entropy): on how many other images the target lies. Tune target_temperature if it is near 1.",
        log_scale=True,
    ),
    panel(
        "method/target_top1",
        "largest probability of the target",
        "Near 100 %, the target is a single image, and the relations are lost.",
        unit="%",
    ),
    panel(
        "method/online_std",
        "spread of the online embeddings",
        "1 if they are spread evenly over the sphere; near 0 they have collapsed to a point.",
    ),
    panel(
        "method/momentum",
        "momentum of the target encoder",
        "The coefficient of its moving average, as the recipe's schedule sets it.",
    ),
)
