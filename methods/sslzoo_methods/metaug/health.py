"""Diagnostics of MetAug training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo.nn.measurements import moments
from sslzoo_methods.metaug.loss import Objective
from sslzoo_methods.metaug.meta import MetaGradient


@torch.no_grad()
def health(out: Objective, z: Sequence[Tensor], generated: Sequence[Tensor]) -> dict[str, Tensor]:
    """Diagnostics of the encoder's step, by name; terms and R are unweighted.

    ``generated_cosine`` near 1 means that the generators are close to the identity, ``online_std`` near 0 collapse.
    """
    names = ("positive", "negative", "generated_positive", "generated_negative")
    values = dict(zip((f"{name}_similarity" for name in names), out.similarity, strict=True))
    cosine = torch.stack([(a * b).sum(1).mean() for a, b in zip(z, generated, strict=False)]).mean()
    values["contrast"] = out.terms[0]
    values["generated_contrast"] = out.terms[1:].mean() if len(out.terms) > 1 else out.terms[0]
    if out.regulariser is not None:
        values["margin"] = out.regulariser.value
        values["sigma_pos"] = out.regulariser.sigma_pos.mean()
        values["sigma_neg"] = out.regulariser.sigma_neg.mean()
    return values | {
        "generated_cosine": cosine,
        "online_std": moments(z[0]),
    }


@torch.no_grad()
def meta_health(gradient: Sequence[Tensor], own: MetaGradient) -> dict[str, Tensor]:
    """Norm of the generators' ``gradient``, a mean over ranks, and the share of it that comes through the virtual step.

    The share is the projection of that part on ``gradient``, relative to ``gradient``, and negative where the part
    points the other way. This rank's is computed from its ``own`` part; the mean over ranks is that of all images.
    """
    whole, through = (torch.cat([g.flatten() for g in parts]) for parts in (gradient, own.indirect))
    norm = whole.norm()
    share = torch.dot(through, whole) / norm.square().clamp_min(1e-30)
    return {"generator_gradient": norm, "second_order_share": share}
