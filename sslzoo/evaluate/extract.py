"""Features of a whole eval set, by several encoders in one pass over the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sslzoo.batch import EvalBatch
from sslzoo.checks import require

if TYPE_CHECKING:
    from sslzoo.data.module import SSLDataModule

Encoder = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> features (N, F)


class Extracted(NamedTuple):
    """This rank's shard of an eval set, M samples."""

    features: dict[str, Tensor]  # by encoder, each (M, F) float32
    label: Tensor  # (M,)
    sample_id: Tensor  # (M,)


def on_device(
    loader: Iterable[Any], datamodule: SSLDataModule, device: torch.device, dataloader_idx: int
) -> Iterator[EvalBatch]:
    """The batches of a validation loader on ``device``, as the encoder sees them."""
    for raw in loader:
        batch = datamodule.on_before_batch_transfer(raw, dataloader_idx)
        batch = datamodule.transfer_batch_to_device(batch, device, dataloader_idx)
        yield datamodule.on_after_batch_transfer(batch, dataloader_idx)


@torch.inference_mode()
def extract(
    encoders: Mapping[str, Encoder],
    loader: Iterable[Any],
    datamodule: SSLDataModule,
    device: torch.device,
    dataloader_idx: int,
) -> Extracted:
    """Run every batch of ``loader`` through every encoder. Modules among them must be in evaluation mode. Collective:
    the ranks add up their unreadable images, and ``DataError`` says so where these are too many.

    ``loader`` is the DataModule's validation loader ``dataloader_idx``, and batches are
    transferred by the DataModule, so they equal those of validation.
    """
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels: list[Tensor] = []
    ids: list[Tensor] = []
    for batch in on_device(loader, datamodule, device, dataloader_idx):
        for name, encode in encoders.items():
            features[name].append(encode(batch.image).float())
        assert batch.label is not None
        labels.append(batch.label)
        ids.append(batch.sample_id)
    datamodule.share_unreadable()
    require(len(labels) > 0, "this process has no sample of an eval set; use fewer devices")
    return Extracted({name: torch.cat(x) for name, x in features.items()}, torch.cat(labels), torch.cat(ids))
