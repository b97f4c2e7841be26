"""Linear evaluation for the study of margins (arXiv:2306.11526), whose own protocol was not available to us."""

from __future__ import annotations

from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

MARGIN = ViewProtocol(
    name="margin",
    source="ours, after solo-learn: the paper's own protocol (arXiv:2306.11526) was not available to us",
    summary="SGD, 4 rates, times 0.1 at epochs 60, 80 of 100, chosen on held-out images",
    view=ViewConfig(size=224, scale=(0.08, 1.0), flip_p=0.5),
    plain=PlainView(size=224, resize=256),
    initial="default",
    lrs=(0.1, 0.3, 1.0, 3.0),
    lr_scaling="none",
    schedule="steps",
    milestones=(60, 80),
    batch_size=256,
    keep_last=True,
    epochs=100,
    held_out=True,
)
