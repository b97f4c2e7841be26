"""Linear evaluation as in the code of MetAug (arXiv:2203.05119)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sslzoo.checks import require
from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

if TYPE_CHECKING:
    from torch import nn

    from sslzoo.method import SSLMethod


def backbones(method: SSLMethod[Any]) -> nn.Module:
    """All backbones of ``method``, with concatenated features."""
    require(
        method.cfg.name == "metaug",
        f"protocol metaug evaluates the backbones of MetAug, not of {method.cfg.name}",
    )
    return method.backbone


METAUG = ViewProtocol(
    name="metaug",
    source="MetAug (arXiv:2203.05119), official code, LinearProbing_MetAug.py",
    summary="SGD, rate 0.1, times 0.2 at epochs 30, 40, 50 of 60, all backbones",
    remarks=(
        "The code concatenates a second half, features of the generators, which is noise: it passes through a random "
        "linear layer that is made anew in each forward pass. It is left out. The authors keep the best test epoch."
    ),
    reported="best",
    view=ViewConfig(size=224, scale=(0.2, 1.0), flip_p=0.5),
    plain=PlainView(size=224, resize=256),
    initial="normal",
    lrs=(0.1,),
    lr_scaling="none",
    schedule="steps",
    milestones=(30, 40, 50),
    gamma=0.2,
    batch_size=256,
    keep_last=True,
    epochs=60,
    test_epochs=1,
    encoder=backbones,
)
