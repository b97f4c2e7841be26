"""Diagnostics of the margin method, as a pure function without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslzoo_methods.margin.bases import Term
from sslzoo_methods.margin.config import Isolated, MarginConfig
from sslzoo_methods.margin.factors import NO_MARGIN, Margin, at_pole, gradient_factors
from sslzoo_methods.margin.loss import margin_loss, positive_factor


@torch.no_grad()
def health(
    terms: Sequence[Term],
    margin: Margin,
    sums: Tensor,
    *,
    images: int,
    cfg: MarginConfig,
    temperature: float | Tensor,
) -> dict[str, Tensor]:
    """Means over queries from global crops, and separately, with suffix ``_local``, from local crops, whose angles
    are wider.

    Compare runs with different margins by ``method/loss_without_margin``. ``sums`` (T, 2) are the
    pull_sums of the T terms over all ``images`` of the micro-batch.
    """
    report: dict[str, Tensor] = {}
    for local in (False, True):
        kind = [(t, s) for t, s in zip(terms, sums, strict=True) if t.local == local]
        if not kind:
            continue
        rows: dict[str, list[Tensor]] = {}
        for term, term_sums in kind:
            f = gradient_factors(term.pairs, margin, temperature=temperature, sums=term_sums)
            plain = margin_loss(
                term.pairs, NO_MARGIN, temperature=temperature, beta=cfg.base.beta, detached=False
            )
            values = {
                "theta_degrees": torch.rad2deg(term.pairs.theta),
                "loss_without_margin": plain,
                "beyond_neutral_angle": (term.pairs.theta > margin.neutral_angle).float(),
            }
            if term.negatives:
                values |= {"positive_probability": f.p0, "logit_factor": f.logit}
            if isinstance(cfg.effects, Isolated):
                b, (low, high) = positive_factor(f, cfg.effects), cfg.effects.factor_range
                clamped = ((b < low) | (b > high)) & ~at_pole(term.pairs.theta)
                values["clamped_factors"] = clamped.float()
            for name, value in values.items():
                rows.setdefault(name, []).append(value.mean())
        suffix = "_local" if local else ""
        report |= {f"method/{name}{suffix}": torch.stack(v).mean() for name, v in rows.items()}
        # Mean pulls with and without the margin: a ratio, in the form of sslzoo.nn.measurements.
        report[f"method/emphasis_factor{suffix}"] = torch.stack([s for _, s in kind]).mean(dim=0) / images
    return report
