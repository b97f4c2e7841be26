"""The objective of one forward pass, with keys and weights as in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslzoo.distributed import gather, rank
from sslzoo_methods.metaug.banks import MemoryBanks
from sslzoo_methods.metaug.config import BatchKeys, MarginConfig, MetAugConfig, SeparateTerms, UnifiedTerm
from sslzoo_methods.metaug.loss import Contrast, Margin, Objective, bank_objective, batch_objective

ENCODER, INNER, OUTER = range(3)  # the passes of a step


def objective(
    z: Sequence[Tensor],
    generated: Sequence[Tensor],
    cfg: MetAugConfig,
    banks: MemoryBanks | None,
    sample_id: Tensor,
    *,
    call: int,
    step: int,
    ramp: float,
) -> Objective:
    """Equation 5 for the embeddings ``z`` (N, D each) of the M views, followed by local crops, and for the views'
    generated features. ``ramp`` multiplies alpha and beta. Collective. With ``updates: official`` the banks are
    updated here, after the keys of the first term were drawn."""
    views, terms = cfg.views.count, cfg.terms
    original, local = list(z[:views]), z[views:]
    options: dict[str, Any] = {
        "contrast": Contrast(cfg.gamma, cfg.scale, cfg.circle),
        "margin": None if cfg.margin is None else _margin(cfg.margin, ramp, call),
        "generated_weight": terms.generated_weight * ramp if isinstance(terms, SeparateTerms) else 0.0,
        "local": local,
    }
    if isinstance(cfg.keys, BatchKeys):
        same_view = cfg.keys.same_view_negatives
        shared = [*original, *generated] if same_view else original
        keys = gather(torch.stack(shared, dim=1)).transpose(0, 1)  # (M or 2M, G, D)
        options["query_keys"] = keys if same_view else None
        options |= {"unified": isinstance(terms, UnifiedTerm), "offset": rank() * len(sample_id)}
        return batch_objective(original, generated, keys[:views], **options)
    assert banks is not None
    draws = [call * (views + 2) + t for t in range(views + 2)]  # a separate draw for each term
    keys_of_terms = [banks.draw(sample_id, step=step, call=draws[0])]
    if cfg.keys.updates == "official":
        banks.update(sample_id, torch.stack(original).detach())
    keys_of_terms += [banks.draw(sample_id, step=step, call=draw) for draw in draws[1:]]
    official = cfg.margin is not None and cfg.margin.pairs == "official"
    return bank_objective(original, generated, keys_of_terms, official_pairs=official, **options)


def _margin(cfg: MarginConfig, ramp: float, call: int) -> Margin:
    idle = cfg.steps == "generator" and call == ENCODER
    weight = 0.0 if idle else cfg.weight * ramp
    return Margin(weight, cfg.positive_weight, cfg.thresholds, cfg.detach_thresholds)
