"""What data-loader workers run: from positions to uint8 pixels and the drawn parameters of the views, which are applied
on the device, or to finished views."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sslzoo.data.bundling import Layout, bundle
from sslzoo.data.crops import PaddedBox, SampledBox, channels_last, crop_into, evaluation_crop
from sslzoo.data.disk import DataError
from sslzoo.data.photometric import normalize_
from sslzoo.data.sampler import Item, stand_ins
from sslzoo.data.sources import ArraySource, ImageSource, UnreadableImageError
from sslzoo.data.views import (
    ImageDraws,
    applied_together,
    apply_to_image,
    draw_boxes,
    draw_image_boxes,
    draw_images,
    draw_uniforms,
    draw_view,
)
from sslzoo.exits import LEAVE_SIGNALS
from sslzoo.recipe.sections import PlainView, ViewConfig

log = logging.getLogger("sslzoo")

# Decoded images that a worker holds at a time. Decoding and cropping in turn would take longer: each drives the other's
# code out of the caches.
_CHUNK = 32
# Of a loader's patience, so many parts must pass one by one: a process that was suspended meanwhile loses one of them.
_PARTS = 5
_SHOWN = 20  # images that a message names

_Result = TypeVar("_Result")
Bad = tuple[int, str]  # sample_id of an unreadable image, and the reason; empty where it was known to be


class RawBatch(NamedTuple):
    """A training batch as workers hand it over."""

    images: tuple[Tensor, ...]  # uint8: whole images once (array source), or the crops of every view
    draws: Tensor  # the parameters of every view, ViewDraws, bundled according to
    layout: Layout | None  # None: the images are finished views, normalised float32
    sample_id: Tensor  # (N,)
    label: Tensor | None
    bad: tuple[Bad, ...]  # met on the way


class RawEvalBatch(NamedTuple):
    """An evaluation batch as workers hand it over. Unreadable images are left out."""

    image: Tensor  # (N, C, H, W) uint8
    sample_id: Tensor  # (N,)
    label: Tensor | None  # (N,)
    bad: tuple[Bad, ...]


class BadImages:
    """Counts the unreadable images of one source, names each once, and stops a run that has too many."""

    def __init__(self, source: ImageSource, max_fraction: float) -> None:
        self.source, self.max_fraction = source, max_fraction
        self.seen = torch.zeros(len(source), dtype=torch.bool)

    @property
    def count(self) -> int:
        """Images known to be unreadable."""
        return int(self.seen.sum())

    def add(self, bad: Sequence[Bad]) -> None:
        """Log those that are new; ``DataError`` when they are more than the fraction allowed."""
        for position, reason in bad:
            if not self.seen[position]:
                self.seen[position] = True
                why = f" ({reason})" if reason else ""
                log.warning("unreadable image: %s%s", self.source.where(position), why)
        if bad:
            self.check()

    def check(self) -> None:
        """``DataError`` when more images are known to be unreadable than the fraction allowed."""
        if self.count > self.max_fraction * len(self.source):
            shown = [self.source.where(i) for i in self.seen.nonzero()[:_SHOWN, 0].tolist()]
            more = f" and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            raise DataError(
                f"{self.count} of {len(self.source)} images of {self.source.name} cannot be read, more than "
                f"data.max_bad_fraction={self.max_fraction} allows: {', '.join(shown)}{more}; repair or remove them, "
                "or raise data.max_bad_fraction"
            )


class ImageReader:
    """Reads the images of a source, in this process or in ``workers`` forked from it, which share what they know."""

    def __init__(self, source: ImageSource, workers: int = 0) -> None:
        self.source = source
        failed, at = torch.zeros(len(source), dtype=torch.bool), torch.full((workers, 2), -1)
        if workers:
            failed.share_memory_()
            at.share_memory_()
        # An image that has failed is not tried again: on a sick disk that takes many seconds.
        self._failed = failed.numpy()
        # By worker: its process, and the sample_id that it reads at the moment, or -1.
        self._at = at.numpy()

    def read(self, sample_id: int) -> Tensor:
        """The image (C, H, W) uint8; ``UnreadableImageError`` where there is none, ``DataError`` without any disk."""
        (image,) = self.read_all([sample_id])
        if isinstance(image, UnreadableImageError):
            raise image
        return image

    def read_all(self, sample_id: Sequence[int]) -> list[Tensor | UnreadableImageError]:
        """Several, or why one cannot be read. All are fetched before any is decoded: in turn, each would drive the
        other's code out of the caches."""
        fetched = deque(self._attempt(i, partial(self.source.fetch, i)) for i in sample_id)
        images: list[Tensor | UnreadableImageError] = []
        for i in sample_id:
            half = fetched.popleft()  # what was fetched takes no memory once it is decoded
            image = half if isinstance(half, UnreadableImageError) else self._attempt(i, half)
            images.append(image if isinstance(image, UnreadableImageError) else channels_last(image))
        return images

    def _attempt(self, sample_id: int, half: Callable[[], _Result]) -> _Result | UnreadableImageError:
        """The result of one half of reading an image, unless that fails or has failed before."""
        if self._failed[sample_id]:
            return UnreadableImageError()
        worker = get_worker_info()
        if worker is not None:
            self._at[worker.id, 0], self._at[worker.id, 1] = os.getpid(), sample_id
        try:
            return half()
        except UnreadableImageError as error:
            self._failed[sample_id] = True
            return error
        finally:
            if worker is not None:
                self._at[worker.id, 1] = -1

    def described(self) -> str:
        """What the workers are doing, for a message."""
        busy = [(pid, sample_id) for pid, sample_id in self._at.tolist() if sample_id >= 0]
        if busy:
            return ", ".join(f"process {pid} is reading {self.source.where(i)}" for pid, i in busy)
        started = [str(pid) for pid, _ in self._at.tolist() if pid >= 0]
        return (
            f"its workers (processes {', '.join(started)}) are not reading"
            if started
            else "no worker has begun to read"
        )


@dataclass
class Waiting:
    """Time spent waiting for batches; it outlives the loader, and does not keep its workers."""

    seconds: float = 0.0


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _warn_of(workers: int) -> None:
    """Warn, once per process, of more ``workers`` than processors."""
    if workers > (count := processors()):
        log.warning(
            "data.workers=%d on %d processor%s: data.workers=%d is as fast, unless reading waits for the disk",
            workers, count, "s" * (count > 1), count,
        )  # fmt: skip


class WatchedLoader(DataLoader[Any]):
    """A loader that ends the run by a ``DataError`` when its workers give nothing for ``patience`` seconds, or give
    one up themselves. ``waiting`` counts the time that its batches were waited for."""

    def __init__(
        self, dataset: ViewDataset | EvalDataset, *, patience: float, num_workers: int, **options: Any
    ) -> None:
        timeout = patience / _PARTS if num_workers else 0
        super().__init__(dataset, num_workers=num_workers, timeout=timeout, **options)
        self._of, self._patience = dataset, patience
        self.waiting = Waiting()

    def check_worker_number_rationality(self) -> None:
        """Warn once where torch would for every loader, and name the key."""
        _warn_of(self.num_workers)

    def __iter__(self) -> Iterator[Any]:
        """Batches."""
        batches = super().__iter__()
        silent = 0
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                silent += 1
                if silent == _PARTS:
                    raise DataError(
                        f"no images of {self._of.source.name}/{self._of.source.split} came for {self._patience:g} s: "
                        f"{self._of.reader.described()}; see whether the disk answers and the processes run, or raise "
                        "data.timeout"
                    ) from error
                continue
            finally:
                self.waiting.seconds += time.perf_counter() - start
            silent = 0
            if isinstance(batch, DataError):
                raise batch
            yield batch


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of the channels, for images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def _labels(source: ImageSource, sample_id: Tensor) -> Tensor | None:
    return None if source.labels is None else torch.from_numpy(source.labels[sample_id.numpy()])


class _Draws(NamedTuple):
    """What is drawn for a view of N images of files."""

    uniforms: Tensor  # (N, DRAWS)
    boxes: list[SampledBox | PaddedBox]
    colours: list[ImageDraws]  # none where the device applies the view

    def replace(self, row: int, other: _Draws) -> None:
        """Take the one image of ``other`` instead of the one at ``row``."""
        self.uniforms[row] = other.uniforms[0]
        self.boxes[row : row + 1] = other.boxes
        self.colours[row : row + 1] = other.colours


class ViewDataset(Dataset[RawBatch]):
    """Training samples. Indexed by a whole micro-batch of (epoch, sample_id) at a time."""

    def __init__(
        self,
        source: ImageSource,
        views: Sequence[ViewConfig],
        seed: int,
        global_batch_size: int,
        reader: ImageReader | None = None,
        among: Tensor | None = None,
        finish: Normalization | None = None,
    ) -> None:
        """``among``: a mask (N,) of the samples that may stand in for unreadable ones; None: all. ``finish``: apply the
        views to the crops of files too, and normalise them; None: that is left to the device."""
        self.source, self.views, self.seed, self.among = source, tuple(views), seed, among
        self.finish = finish
        self.groups = applied_together(self.views, source.channels)
        self.global_batch_size = global_batch_size
        self.reader = ImageReader(source) if reader is None else reader

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[Item]) -> RawBatch | DataError:
        """The batch of these items, or why there is none. A file is decoded once, and the crops of all views are cut
        from it.

        An unreadable image is replaced by one of :func:`sslzoo.data.sampler.stand_ins`, which then stands in the
        batch under its own sample_id: the size of a batch never changes.
        """
        epoch = items[0][0]
        sample_id = torch.tensor([i for _, i in items])
        if isinstance(self.source, ArraySource):
            height, width = (torch.full((len(sample_id),), side) for side in self.source.size)
            u = [draw_uniforms(self.seed, epoch, k, sample_id) for k in range(len(self.views))]
            boxes = [draw_boxes(view, u[k], height, width) for k, view in enumerate(self.views)]
            return self._batch((self.source.batch(sample_id),), u, boxes, sample_id)
        n = len(sample_id)
        crops = tuple(self._empty(len(group) * n, self.views[group[0]].size) for group in self.groups)
        parts = chain.from_iterable(
            zip(group, part.split(n), strict=True) for group, part in zip(self.groups, crops, strict=True)
        )
        outs = [part.unbind() for _, part in sorted(parts, key=itemgetter(0))]  # by view and row
        drawn = self._draw(epoch, sample_id)
        bad: list[Bad] = []
        # Errors are returned as values: raised in a worker they would arrive as a traceback in words.
        try:
            for start in range(0, n, _CHUNK):
                rows = range(start, min(start + _CHUNK, n))
                images = self._images(epoch, sample_id, rows, drawn, bad)
                for view, draws, out in zip(self.views, drawn, outs, strict=True):
                    for row, image in zip(rows, images, strict=True):
                        self._fill(out[row], view, image, draws, row)
        except DataError as error:
            return error
        except ValueError as error:  # an image that does not suit the view
            return DataError(str(error))
        if self.finish is not None:
            nothing = torch.empty(0, dtype=torch.uint8)
            return RawBatch(crops, nothing, None, sample_id, _labels(self.source, sample_id), tuple(bad))
        return self._batch(crops, [draws.uniforms for draws in drawn], None, sample_id, bad)

    def _images(
        self, epoch: int, sample_id: Tensor, rows: range, drawn: Sequence[_Draws], bad: list[Bad]
    ) -> list[Tensor]:
        """The images of these rows of a batch. One that stands in for another takes its place in ``sample_id`` and
        ``drawn``, too."""
        chosen = sample_id[rows.start : rows.stop].tolist()
        images: list[Tensor] = []
        for row, position, image in zip(rows, chosen, self.reader.read_all(chosen), strict=True):
            if not isinstance(image, UnreadableImageError):
                images.append(image)
                continue
            bad.append((position, str(image)))
            sample_id[row], other = self._stand_in(epoch, position, bad)
            images.append(other)
            for draws, own in zip(drawn, self._draw(epoch, sample_id[row : row + 1]), strict=True):
                draws.replace(row, own)
        return images

    def _draw(self, epoch: int, sample_id: Tensor) -> list[_Draws]:
        """What is drawn for every view of these samples (N,) of files."""
        drawn = []
        for k, view in enumerate(self.views):
            u = draw_uniforms(self.seed, epoch, k, sample_id)
            colours = [] if self.finish is None else draw_images(view, u, self.source.channels)
            drawn.append(_Draws(u, draw_image_boxes(view, u), colours))
        return drawn

    def _empty(self, n: int, size: int) -> Tensor:
        """Memory for a view of ``n`` images: uint8 crops, channels-last, or finished views in float32. A worker's is
        shared with the main process, which spares a copy."""
        dtype = torch.uint8 if self.finish is None else torch.float32
        count = n * size * size * self.source.channels
        if get_worker_info() is None:
            flat = torch.empty(count, dtype=dtype)
        else:
            storage = torch.UntypedStorage._new_shared(count * dtype.itemsize, device="cpu")
            flat = torch.empty(0, dtype=dtype).set_(storage, 0, (count,))  # type: ignore[call-overload]
        if self.finish is None:
            return flat.view(n, size, size, -1).permute(0, 3, 1, 2)
        return flat.view(n, -1, size, size)

    def _fill(self, out: Tensor, view: ViewConfig, image: Tensor, draws: _Draws, row: int) -> None:
        """Write a view of ``image``, drawn by a row of ``draws``, to ``out`` (C, S, S)."""
        box = draws.boxes[row].on(image.shape[1], image.shape[2])
        if self.finish is None:
            crop_into(out, image, box, view.interpolation)
            return
        crop = torch.empty((view.size, view.size, self.source.channels), dtype=torch.uint8).permute(2, 0, 1)
        crop_into(crop, image, box, view.interpolation)
        apply_to_image(view, out.copy_(crop).div_(255), draws.colours[row])
        normalize_(out, self.finish.mean, self.finish.std)

    def _batch(
        self,
        images: tuple[Tensor, ...],
        u: Sequence[Tensor],
        boxes: Sequence[Tensor] | None,
        sample_id: Tensor,
        bad: Sequence[Bad] = (),
    ) -> RawBatch:
        """A batch for the device, from the uniforms ``u`` of every view, and the boxes, if it is to crop too."""
        drawn = [
            draw_view(
                [self.views[k] for k in group],
                [u[k] for k in group],
                self.source.channels,
                None if boxes is None else torch.cat([boxes[k] for k in group]),
            )
            for group in self.groups
        ]
        draws, layout = bundle(tuple(drawn))
        return RawBatch(images, draws, layout, sample_id, _labels(self.source, sample_id), tuple(bad))

    def _stand_in(self, epoch: int, sample_id: int, bad: list[Bad]) -> tuple[int, Tensor]:
        """The sample that stands in for an unreadable one, and its image."""
        others = stand_ins(self.seed, epoch, sample_id, len(self.source), self.global_batch_size)
        tried = 0
        for position in others:
            if self.among is None or self.among[position]:
                try:
                    return position, self.reader.read(position)
                except UnreadableImageError as error:
                    bad.append((position, str(error)))
                    tried += 1
        nor = (
            f"nor can any of the {tried} that may stand in for it in this epoch"
            if tried
            else f"and with a single step an epoch (data.global_batch_size={self.global_batch_size} of "
            f"{len(self.source)} images) no other may stand in for it"
        )
        raise DataError(
            f"{self.source.where(sample_id)} cannot be read, {nor}; see to data.root, repair or remove the images "
            "that are damaged, or lower data.global_batch_size"
        )


class EvalDataset(Dataset[RawEvalBatch]):
    """Samples under the evaluation transform. Indexed by a batch of sample_ids at a time."""

    def __init__(self, source: ImageSource, view: PlainView, reader: ImageReader | None = None) -> None:
        as_it_is = view.resize is None and view.proportion is None
        if isinstance(source, ArraySource) and as_it_is and min(source.size) < view.size:
            raise ValueError(
                f"eval.size={view.size} is larger than the {source.size[0]} px of {source.name}; "
                f"set eval.resize={view.size} or lower eval.size"
            )
        self.source, self.view = source, view
        self.reader = ImageReader(source) if reader is None else reader

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[int]) -> RawEvalBatch | DataError:
        """The batch of these positions, without the unreadable ones; or why there is none."""
        bad: list[Bad] = []
        if isinstance(self.source, ArraySource):
            kept = torch.tensor(items)
            image = evaluation_crop(self.source.batch(kept), self.view)
        else:
            try:
                read = dict(self._read(items, bad))
            except DataError as error:
                return error
            kept = torch.tensor(list(read), dtype=torch.int64)
            empty = torch.empty((0, self.source.channels, self.view.size, self.view.size), dtype=torch.uint8)
            image = torch.stack(list(read.values())) if read else empty
        return RawEvalBatch(image, kept, _labels(self.source, kept), tuple(bad))

    def _read(self, items: list[int], bad: list[Bad]) -> Iterator[tuple[int, Tensor]]:
        for position in items:
            try:
                image = self.reader.read(position)
            except UnreadableImageError as error:
                bad.append((position, str(error)))
                continue
            try:
                image = evaluation_crop(image, self.view)
            except ValueError as error:
                raise DataError(f"{self.source.where(position)}: {error}") from error
            yield position, image


def shard(positions: Tensor, rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This rank's contiguous share in batches, without padding: shares differ by at most one sample."""
    n = len(positions)
    share = positions[rank * n // world_size : (rank + 1) * n // world_size]
    return [batch.tolist() for batch in share.split(batch_size)] if len(share) else []


def leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that a scheduler sends to the whole process group: the death of a worker would end the run
    before it could save. Workers end when their parent tells them to or is gone."""
    for number in (*LEAVE_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
