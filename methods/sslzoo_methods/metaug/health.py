"""Diagnostics of MetAug training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo_methods.metaug.loss import Objective
from sslzoo_methods.metaug.meta import MetaGradient


@torch.no_grad()
def health(out: Objective, z: Sequence[Tensor], generated: Sequence[Tensor]) -> dict[str, Tensor]:
    """Scalar diagnostics of the encoder's step, by name; terms and R are unweighted.

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
        "online_std": z[0].std(dim=0, correction=0).mean() * z[0].shape[1] ** 0.5,
    }


@torch.no_grad()
def meta_health(gradient: Sequence[Tensor], own: MetaGradient) -> dict[str, Tensor]:
    """Norm of the generators' ``gradient``, a mean over ranks, and in this rank's ``own`` the norm of the part through
    the virtual step, relative to the whole: the mean of that part would need another collective."""
    total, through = _norm(own.total), _norm(own.indirect)
    return {"generator_gradient": _norm(gradient), "second_order_share": through / total.clamp_min(1e-30)}


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(parts))).norm()
