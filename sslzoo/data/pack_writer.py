"""Write packed data, which ``packed.py`` reads: one split of images, in a folder that appears once it is complete.

Until then its name ends in ``.partial``. A pack that was interrupted, in whatever way, is continued there: records are
appended to ``images.bin`` and then described in ``index.part``, and the first so many of them are known to be on disk.
Images that could not be read are tried again then, so that their records come after those of other images.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslzoo.data.crops import channels_last
from sslzoo.data.decoding import decode
from sslzoo.data.disk import DataError, UnreadableImageError
from sslzoo.data.huggingface import ArrowSource
from sslzoo.data.loading import leave_signals_to_parent
from sslzoo.data.packed import EMPTY, IMAGES, INDEX, LABELS, NAMES, ROW, ROW_OF_PIXELS, Records, checksum
from sslzoo.data.sources import FileSource, resize_short_side
from sslzoo.data.tar_shards import ShardSource
from sslzoo.files import write_json
from sslzoo.recipe.packed_info import FILE, PARTIAL, PackedInfo, read_info

Packable = FileSource | ShardSource | ArrowSource

QUALITY = 95  # of images that are encoded again, as JPEG
SAVE_EVERY = 10.0  # seconds between times at which what was written is known to be on disk
# Files beside the records until all are written.
_ROWS, _PLAN, _PROGRESS = "index.part", "plan.json", "progress.json"
_SAMPLE = 64  # images from which the space needed is estimated
SHOWN = 20  # unreadable images that are named
_FEW = 5  # of them in one line
_THREADS = 16  # that ask for sizes and times of files
_CHUNK = 2 << 20  # bytes that a worker hands over at a time, about
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What becomes of the images."""

    raw: bool = False  # decoded
    short_side: int | None = None  # pixels to which larger images are reduced; None: none is
    channels: int = 3  # of images that are decoded


class Written(NamedTuple):
    """What one call has done."""

    images: int  # in the split
    before: int  # of these, by earlier calls
    size: int  # bytes in all records
    read: int  # bytes of the files read in this call
    added: int  # bytes of the records of this call
    unreadable: int  # empty records
    reasons: tuple[str, ...]  # the first of these, and why


class _Chunk(NamedTuple):
    """Some records that follow one another."""

    data: bytes
    rows: NDArray[Any]  # (n,) for index.part, with offsets within ``data``
    read: int  # bytes of their files
    bad: tuple[str, ...]  # why some are empty


class Encoder(Dataset[_Chunk]):
    """Makes records of image files. Indexed by several at a time."""

    def __init__(self, source: Packable, options: PackOptions, row: np.dtype[Any]) -> None:
        self.source, self.options, self.row = source, options, row

    def __getitems__(self, ids: Sequence[int]) -> _Chunk | DataError:
        """The records of these images, or why there are none: an error raised in a worker would arrive in words."""
        records, rows, read, bad, end = [], np.zeros(len(ids), self.row), 0, [], 0
        for row, i in zip(rows, ids, strict=True):
            data, shape = b"", (0, 0)
            try:
                encoded = self.source.encoded(i)
                if not encoded:
                    raise UnreadableImageError("empty")
                read += len(encoded)
                data, shape = self._record(encoded)
            except UnreadableImageError as error:
                bad.append(f"{self.source.where(i)} ({error})")
            except DataError as error:
                return error
            row["id"], row["offset"], row["length"], row["crc"] = i, end, len(data), zlib.crc32(data)
            if self.options.raw:
                row["height"], row["width"] = shape
            records.append(data)
            end += len(data)
        return _Chunk(b"".join(records), rows, read, tuple(bad))

    def _record(self, encoded: bytes | bytearray) -> tuple[bytes | bytearray, tuple[int, int]]:
        """The record of an image file, and its height and width if it holds pixels."""
        options = self.options
        if not options.raw and options.short_side is None:
            return encoded, (0, 0)
        image = decode(encoded, options.channels)
        side = options.short_side
        larger = side is not None and min(image.shape[1:]) > side
        small = resize_short_side(image, side) if side is not None and larger else image
        if options.raw:
            return _pixels(small).tobytes(), (small.shape[1], small.shape[2])
        return (_jpeg(small) if larger else encoded), (0, 0)


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) as a contiguous array (H, W, C)."""
    return channels_last(image).permute(1, 2, 0).numpy()


def _jpeg(image: Tensor) -> bytes:
    file = io.BytesIO()
    pixels = _pixels(image)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_split(
    source: Packable,
    folder: Path,
    options: PackOptions,
    *,
    max_bad_fraction: float,
    workers: int = 0,
    report: Callable[[int, int], None] = lambda images, added: None,
) -> Written:
    """Pack ``source`` into ``folder``, or continue a pack of it that was interrupted; ``report`` is called with the
    number of images done and the bytes that this call has written.

    Raises:
        ValueError: the folder holds something else, or another process is writing it.
        OSError: the disk is full, or cannot be written; the same call continues.
        DataError: more than ``max_bad_fraction`` of the images cannot be read, their folder is gone, or a worker was
            ended; the same call continues.
    """
    states = _states_of(source)
    plan = PackedInfo(
        dataset=_dataset_of(source),
        source=str(source.root.absolute()),
        fingerprint=source.fingerprint,
        state=sha256(states.tobytes()).hexdigest()[:16] if isinstance(source, FileSource) else None,
        content="pixels" if options.raw else "files",
        short_side=options.short_side,
        channels=options.channels if options.raw or options.short_side is not None else None,
        images=len(source),
        labelled=source.labels is not None,
        by_class=isinstance(source, FileSource) and source.by_class,
        classes=source.class_names,
        size=0,
        checksums={},
    )
    if folder.exists():
        return _as_it_was(folder, plan)
    partial = _Partial(folder.with_name(folder.name + PARTIAL), plan, source, states)
    try:
        if (partial.folder / FILE).exists():  # it was interrupted at the very end
            _as_it_was(partial.folder, plan)
            partial.rename(folder)
            return _as_it_was(folder, plan)
        partial.resume()
        before, added, read, unreadable = partial.done, 0, 0, 0
        reasons: list[str] = []
        encoder = Encoder(source, options, partial.row)
        if len(partial.left):
            size = _record_size(encoder, partial.left)
            partial.check_space(size)
            for chunk in _chunks(encoder, partial.left, max(1, int(_CHUNK / size)), workers):
                partial.add(chunk)
                added, read = added + len(chunk.data), read + chunk.read
                unreadable += len(chunk.bad)
                reasons += chunk.bad[: SHOWN - len(reasons)]
                if unreadable > max_bad_fraction * len(source):
                    raise DataError(_too_many(partial, unreadable, reasons, max_bad_fraction))
                report(partial.done, added)
        partial.publish(folder)
        return Written(len(source), before, partial.end, read, added, unreadable, tuple(reasons))
    finally:
        partial.close()


def _dataset_of(source: Packable) -> str:
    """The data set as which packed images open: that of the files, or the one that other images would be as files."""
    if isinstance(source, FileSource):
        return source.name
    return "folder" if source.labels is None else "imagefolder"


def _too_many(partial: _Partial, unreadable: int, reasons: Sequence[str], max_bad_fraction: float) -> str:
    more = f" and {unreadable - _FEW} more" if unreadable > _FEW else ""
    return (
        f"{unreadable:,} of {partial.plan.images:,} images in {partial.plan.source} cannot be read, more than "
        f"--max-bad-fraction={max_bad_fraction} allows: {', '.join(reasons[:_FEW])}{more}; repair them and run the "
        "same command again, which continues, or raise --max-bad-fraction; if you remove them instead, delete "
        f"{partial.folder} too"
    )


def _states_of(source: Packable) -> NDArray[np.int64]:
    """Sizes (bytes) and times (ns) of the files (N, 2); zeros where the images have no files of their own."""

    def states(start: int) -> NDArray[np.int64]:
        found = np.zeros((min(1024, len(source) - start), 2), np.int64)
        if isinstance(source, FileSource):
            for i in range(len(found)):
                with suppress(OSError):  # an image that cannot be read, such as a link that leads nowhere
                    status = source.path(start + i).stat()
                    found[i] = status.st_size, status.st_mtime_ns
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.concatenate(list(pool.map(states, range(0, len(source), 1024))))


def _changed(plan: PackedInfo, folder: Path) -> ValueError:
    """The error if ``folder`` was written when files had other sizes or times."""
    return ValueError(
        f"the files in {plan.source} have changed (sizes or times) since {folder} was written; delete it to pack "
        "them again, or choose another DST"
    )


def _as_it_was(folder: Path, plan: PackedInfo) -> Written:
    """What the finished ``folder`` holds, if that is what was planned."""
    if not (folder / FILE).exists():
        raise ValueError(f"{folder} exists and is not packed data; choose another DST, or move it away")
    info = read_info(folder)
    if replace(info, source=plan.source, state=plan.state, size=0, checksums={}) != plan:
        raise ValueError(
            f"{folder} holds other images, or was packed with other options: {_described(info)}; choose another DST, "
            "or delete it"
        )
    if info.state != plan.state:
        raise _changed(plan, folder)
    records = Records(folder)  # its files have their sizes, and the arrays their checksums
    empty = np.flatnonzero(records.index["length"] == 0)
    reasons = tuple(f"{folder}: {records.name(i)} ({EMPTY})" for i in empty[:SHOWN].tolist())
    return Written(info.images, info.images, info.size, 0, 0, len(empty), reasons)


def _described(info: PackedInfo) -> str:
    options = f" with {info.options}" if info.options else ""
    return f"{info.images:,} images of {info.dataset} from {info.source}{options}"


def _record_size(encoder: Encoder, ids: NDArray[np.int64]) -> float:
    """The mean size (bytes) of the records of these images, estimated from some of them."""
    count = min(_SAMPLE, len(ids))
    sizes = []
    for i in ids[np.arange(count) * len(ids) // count].tolist():
        chunk = encoder.__getitems__([i])
        if isinstance(chunk, DataError):
            raise chunk
        sizes.append(len(chunk.data))
    return max(sum(sizes) / count, 1.0)


def _chunks(encoder: Encoder, ids: NDArray[np.int64], size: int, workers: int) -> Iterator[_Chunk]:
    """The records of these images, in order, ``size`` at a time."""
    batches: Any = [ids[i : i + size].tolist() for i in range(0, len(ids), size)]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # more workers than processors are right for a disk that answers slowly
        loader = DataLoader(
            encoder,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=min(workers, len(batches)),
            worker_init_fn=_begin_worker,
            # Its own: the base seed of workers would otherwise be drawn from the global generator.
            generator=torch.Generator(),
        )
    try:
        for chunk in loader:
            if isinstance(chunk, DataError):
                raise chunk
            yield chunk
    except RuntimeError as error:
        if isinstance(error, DataError) or "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a worker was ended from outside, perhaps for want of memory; run the same command again, with fewer "
            "--workers"
        ) from error


def _begin_worker(worker: int) -> None:
    """Leave signals to the main process, and end with it: records are handed over through a pipe, and a worker would
    otherwise wait for a killed process to empty it."""
    leave_signals_to_parent(worker)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(chunk: Any) -> Any:
    return chunk


def row_of(indexed: np.dtype[Any]) -> np.dtype[Any]:
    """A row of ``index.part``: the image, size (bytes) and time (ns) of its file, and what the index has."""
    return np.dtype([("id", "<i8"), ("size", "<i8"), ("time", "<i8"), *indexed.descr])


class _Partial:
    """A split that is being written."""

    def __init__(self, folder: Path, plan: PackedInfo, source: Packable, states: NDArray[np.int64]) -> None:
        self.folder, self.plan, self.source, self._states = folder, plan, source, states
        self._indexed = ROW_OF_PIXELS if plan.content == "pixels" else ROW
        self.row = row_of(self._indexed)
        # Images without a record, or with an empty one, when this call began.
        self.left = np.arange(plan.images)
        self.done = 0  # images with a record
        self._count = self.end = 0  # records, and their bytes
        self._size = 0.0  # of a record (bytes), estimated
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666) for name in (IMAGES, _ROWS)]
        self._images, self._rows = self._files
        self._saved = time.monotonic()
        try:
            # The kernel gives it back however this process ends. Not inherited by workers, which live a little longer.
            fcntl.lockf(self._images, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.close()
            raise ValueError(
                f"{folder} is being written by another process; wait for it, or end it"
            ) from error
        except OSError:  # a file system without locks
            pass

    def resume(self) -> None:
        """Find out which records are there, and drop what comes after them. ``ValueError`` if the folder is one of
        another plan, or files of which records are there have changed."""
        path = self.folder / _PLAN
        if not os.fstat(self._rows).st_size:
            write_json(path, asdict(self.plan))
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            begun["classes"] = tuple(begun["classes"])
            info = PackedInfo(**begun)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is missing or damaged; delete {self.folder}, and pack again") from error
        if replace(info, source=self.plan.source, state=self.plan.state) != self.plan:
            raise ValueError(
                f"{self.folder} was begun with other images or options: {_described(info)}; repeat that command, or "
                "delete the folder"
            )
        rows = np.fromfile(self.folder / _ROWS, self.row)
        ends = rows["length"].cumsum()
        whole = (rows["offset"] == ends - rows["length"]) & (ends <= os.fstat(self._images).st_size)
        whole &= (rows["id"] >= 0) & (rows["id"] < self.plan.images)
        done = len(rows) if whole.all() else int(whole.argmin())
        # What was not known to be on disk may be lost after a power failure.
        for i in range(self._saved_records(), done):
            record = os.pread(self._images, rows["length"][i], rows["offset"][i])
            if zlib.crc32(record) != rows["crc"][i]:
                done = i
                break
        read = rows[:done][rows["length"][:done] > 0]
        if (self._states[read["id"]] != np.stack((read["size"], read["time"]), axis=1)).any():
            raise _changed(self.plan, self.folder)
        self._count, self.end = done, int(ends[done - 1]) if done else 0
        self.left = np.setdiff1d(self.left, read["id"])
        self.done = self.plan.images - len(self.left)
        os.ftruncate(self._images, self.end)
        os.ftruncate(self._rows, self._count * self.row.itemsize)

    def _saved_records(self) -> int:
        """How many records are known to be on disk: none if the file that says it is missing or damaged."""
        try:
            return max(0, int(json.loads((self.folder / _PROGRESS).read_text())["records"]))
        except (OSError, ValueError, TypeError, LookupError):
            return 0

    def check_space(self, size: float) -> None:
        """``OSError`` if the disk has no room for the other images, whose records have ``size`` bytes on average."""
        self._size = size
        free, needed = shutil.disk_usage(self.folder).free, self._needed(size)
        if free < needed:
            raise OSError(
                f"{self.folder} needs about {decimal(int(needed))} more, and its disk has {decimal(free)} free; free "
                "some, choose another DST, or store less with --short-side"
            )

    def _needed(self, size: float) -> float:
        """Bytes that are still to be written, if a record has ``size`` on average."""
        entry = self.row.itemsize + self._indexed.itemsize + self.source.paths.itemsize + 8
        return (self.plan.images - self.done) * (size + entry)

    def add(self, chunk: _Chunk) -> None:
        """Append records."""
        chunk.rows["offset"] += self.end
        chunk.rows["size"], chunk.rows["time"] = self._states[chunk.rows["id"]].T
        try:
            _write(self._images, chunk.data, self.end)
            _write(self._rows, chunk.rows.tobytes(), self._count * self.row.itemsize)
            self.done, self._count = self.done + len(chunk.rows), self._count + len(chunk.rows)
            self.end += len(chunk.data)
            if time.monotonic() - self._saved > SAVE_EVERY:
                self.save()
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in _FULL:
            return error
        needed = self._needed(self.end / self.done if self.done else self._size)
        return OSError(
            f"{error.strerror}: {self.folder} has {self.done:,} of {self.plan.images:,} images and needs about "
            f"{decimal(int(needed))} more; free them and run the same command again, which continues"
        )

    def save(self) -> None:
        """Make sure that what was appended is on disk, and say so there."""
        os.fsync(self._images)
        os.fsync(self._rows)
        write_json(self.folder / _PROGRESS, {"records": self._count})
        self._saved = time.monotonic()

    def publish(self, folder: Path) -> None:
        """Write what readers need, and give the folder its name."""
        rows = np.fromfile(self.folder / _ROWS, self.row)
        rows = rows[rows["length"] > 0]
        index = np.zeros(self.plan.images, self._indexed)
        for name in self._indexed.names or ():
            index[name][rows["id"]] = rows[name]
        arrays: dict[str, NDArray[Any]] = {INDEX: index, NAMES: self.source.paths}
        if self.source.labels is not None:
            arrays[LABELS] = self.source.labels
        try:
            self.save()
            for name, array in arrays.items():
                with (self.folder / name).open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
            checksums = {name: checksum(array) for name, array in arrays.items()}
            replace(self.plan, size=self.end, checksums=checksums).write(self.folder)
        except OSError as error:
            raise self._explained(error) from error
        self.rename(folder)

    def rename(self, folder: Path) -> None:
        """Give the folder its name."""
        for name in (_ROWS, _PROGRESS, _PLAN):
            (self.folder / name).unlink(missing_ok=True)
        _sync(self.folder)
        self.folder.rename(folder)
        _sync(folder.parent)

    def close(self) -> None:
        """Close the files, after an interruption with what was appended on disk."""
        with suppress(OSError):
            if self._count and (self.folder / _ROWS).exists():
                self.save()
        for file in self._files:
            os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
