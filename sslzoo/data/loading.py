"""What data-loader workers run: from positions to uint8 pixels. Everything else happens on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from sslzoo.data.crops import channels_last, crop_image, evaluation_crop
from sslzoo.data.sampler import Item
from sslzoo.data.sources import ArraySource, ImageSource, UnreadableImageError
from sslzoo.data.views import draw_boxes, draw_uniforms
from sslzoo.recipe.sections import EvalConfig, ViewConfig

log = logging.getLogger("sslzoo")

# Decoded images that a worker holds at a time: boxes are drawn for so many at once.
_CHUNK = 32


class RawBatch(NamedTuple):
    """A training batch as workers hand it over."""

    images: tuple[Tensor, ...]  # uint8: whole images once (array source), or the crops of every view
    sample_id: Tensor  # (N,)
    label: Tensor | None
    epoch: int
    bad: tuple[int, ...]  # positions of unreadable images met on the way


class RawEvalBatch(NamedTuple):
    """An evaluation batch as workers hand it over. Unreadable images are left out."""

    image: Tensor  # (N, C, H, W) uint8
    sample_id: Tensor  # (N,)
    label: Tensor  # (N,)
    bad: tuple[int, ...]


class BadImages:
    """Counts the unreadable images of one source, names each once, and stops a run that has too many."""

    def __init__(self, source: ImageSource, max_fraction: float) -> None:
        self.source, self.max_fraction = source, max_fraction
        self.seen = torch.zeros(len(source), dtype=torch.bool)

    def add(self, positions: Sequence[int]) -> None:
        """Log those that are new; ``RuntimeError`` when they are more than the fraction allowed."""
        for position in positions:
            if not self.seen[position]:
                self.seen[position] = True
                log.warning("unreadable image: %s", self.source.where(position))
        if positions:
            self.check()

    def check(self) -> None:
        """``RuntimeError`` when more images are known to be unreadable than the fraction allowed."""
        count = int(self.seen.sum())
        if count > self.max_fraction * len(self.source):
            named = self.seen.nonzero()[:, 0].tolist()
            shown = "\n  ".join(self.source.where(i) for i in named[:20])
            more = f"\n  and {count - 20} more" if count > 20 else ""
            raise RuntimeError(
                f"{count} of {len(self.source)} images of {self.source.name} cannot be read, more than "
                f"data.max_bad_fraction={self.max_fraction} allows:\n  {shown}{more}\n"
                "repair or remove them, or raise data.max_bad_fraction"
            )


def _labels(source: ImageSource, sample_id: Tensor) -> Tensor | None:
    return None if source.labels is None else torch.from_numpy(source.labels[sample_id.numpy()])


class ViewDataset(Dataset[RawBatch]):
    """Training samples. Indexed by a whole micro-batch of (epoch, sample_id) at a time."""

    def __init__(self, source: ImageSource, views: Sequence[ViewConfig], seed: int) -> None:
        self.source, self.views, self.seed = source, tuple(views), seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[Item]) -> RawBatch:
        """The batch of these items. A file is decoded once, and the crops of all views are cut from it.

        An unreadable image is replaced by the next readable one of the source, which then stands in the
        batch under its own sample_id: the size of a batch never changes.
        """
        epoch = items[0][0]
        sample_id = torch.tensor([i for _, i in items])
        if isinstance(self.source, ArraySource):
            images = (self.source.batch(sample_id),)
            return RawBatch(images, sample_id, _labels(self.source, sample_id), epoch, ())
        crops: list[list[Tensor]] = [[] for _ in self.views]
        kept: list[int] = []
        bad: list[int] = []
        for start in range(0, len(sample_id), _CHUNK):
            read = [self._read(i, bad) for i in sample_id[start : start + _CHUNK].tolist()]
            ids = torch.tensor([i for i, _ in read])
            height = torch.tensor([image.shape[1] for _, image in read])
            width = torch.tensor([image.shape[2] for _, image in read])
            kept += ids.tolist()
            for k, view in enumerate(self.views):
                u = draw_uniforms(self.seed, epoch, k, ids)
                for (_, image), box in zip(read, draw_boxes(view, u, height, width).tolist(), strict=True):
                    crops[k].append(crop_image(image, box, view.size, view.interpolation))
        sample_id = torch.tensor(kept)
        stacked = tuple(torch.stack(crop) for crop in crops)
        return RawBatch(stacked, sample_id, _labels(self.source, sample_id), epoch, tuple(bad))

    def _read(self, sample_id: int, bad: list[int]) -> tuple[int, Tensor]:
        for step in range(len(self.source)):
            position = (sample_id + step) % len(self.source)
            try:
                return position, channels_last(self.source.read(position))
            except UnreadableImageError:
                bad.append(position)
        raise RuntimeError(f"no image of {self.source.name} can be read; check data.root")


class EvalDataset(Dataset[RawEvalBatch]):
    """Labelled samples under the evaluation transform. Indexed by a batch of sample_ids at a time."""

    def __init__(self, source: ImageSource, cfg: EvalConfig) -> None:
        if isinstance(source, ArraySource) and cfg.resize is None and min(source.size) < cfg.size:
            raise ValueError(
                f"eval.size={cfg.size} is larger than the {source.size[0]} px of {source.name}; "
                f"set eval.resize={cfg.size} or lower eval.size"
            )
        self.source, self.cfg = source, cfg

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[int]) -> RawEvalBatch:
        """The batch of these positions, without the unreadable ones."""
        bad: list[int] = []
        if isinstance(self.source, ArraySource):
            kept = torch.tensor(items)
            image = evaluation_crop(self.source.batch(kept), self.cfg.resize, self.cfg.size)
        else:
            read = dict(self._read(items, bad))
            kept = torch.tensor(list(read), dtype=torch.int64)
            empty = torch.empty((0, self.source.channels, self.cfg.size, self.cfg.size), dtype=torch.uint8)
            image = torch.stack(list(read.values())) if read else empty
        label = _labels(self.source, kept)
        assert label is not None, "evaluation needs labels"
        return RawEvalBatch(image, kept, label, tuple(bad))

    def _read(self, items: list[int], bad: list[int]) -> Iterator[tuple[int, Tensor]]:
        for position in items:
            try:
                image = channels_last(self.source.read(position))
            except UnreadableImageError:
                bad.append(position)
                continue
            yield position, evaluation_crop(image, self.cfg.resize, self.cfg.size)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return TF.to_dtype(images.contiguous(), torch.float32, scale=True)


def shard(positions: Tensor, rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This rank's contiguous share in batches, without padding: shares differ by at most one sample."""
    n = len(positions)
    share = positions[rank * n // world_size : (rank + 1) * n // world_size]
    return [batch.tolist() for batch in share.split(batch_size)] if len(share) else []
