"""The objective of one pass, as the recipe has it: which keys, which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslzoo.distributed import gather, rank
from sslzoo_methods.metaug.banks import MemoryBanks
from sslzoo_methods.metaug.config import MetAugConfig
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
    """Equation 5 for the embeddings ``z`` (N, D) of the M views, then of local crops, and the views' generated
    features. ``ramp`` multiplies alpha and beta. Collective; official bank updates happen in here, after the
    first term's keys are drawn."""
    original, local = list(z[: cfg.n_views]), z[cfg.n_views :]
    regularised = cfg.margin_in == "both" or (cfg.margin_in == "generator" and call != ENCODER)
    options: dict[str, Any] = {
        "contrast": Contrast(cfg.gamma, cfg.scale, cfg.weighting, cfg.shift, cfg.m),
        "margin": Margin(cfg.margin, cfg.margin_pos_weight, cfg.detach_sigma),
        "aug_weight": cfg.aug_weight * ramp,
        "margin_weight": cfg.margin_weight * ramp * regularised,
        "local": local,
    }
    if banks is None:
        shared = [*original, *generated] if cfg.same_view_negatives else original
        keys = gather(torch.stack(shared, dim=1)).transpose(0, 1)  # (M or 2M, G, D)
        options["query_keys"] = keys if cfg.same_view_negatives else None
        options |= {"unified": cfg.contrast_set == "unified", "offset": rank() * len(sample_id)}
        return batch_objective(original, generated, keys[: cfg.n_views], **options)
    terms = cfg.n_views + 2
    draws = [call * terms + t for t in range(terms)]  # each term its own
    keys_of_terms = [banks.draw(sample_id, step=step, call=draws[0])]
    if cfg.bank_updates == "official":
        banks.update(sample_id, torch.stack(original).detach())
    keys_of_terms += [banks.draw(sample_id, step=step, call=draw) for draw in draws[1:]]
    official = cfg.margin_pairs == "official"
    return bank_objective(original, generated, keys_of_terms, official_pairs=official, **options)
