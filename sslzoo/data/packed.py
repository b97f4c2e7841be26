"""Read packed data, which ``sslzoo pack`` writes: the images of a split in one file, with an index and checksums.

The format is described in docs/packing.md. The arrays beside the images are memory-mapped, so that all processes of a
machine share them. Records are read by offset rather than mapped: the cached pages are shared just the same, but a
failing disk raises an error for one image instead of ending the process.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslzoo.data.disk import UnreadableImageError, legible, read_part
from sslzoo.data.sources import EncodedSource, ImageSource
from sslzoo.recipe.packed_info import read_info

IMAGES = "images.bin"  # the records, one after the other
INDEX, NAMES, LABELS = "index.npy", "names.npy", "labels.npy"
# A row of the index. An empty record stands for an image that could not be read when it was packed.
ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("crc", "<u4")])
ROW_OF_PIXELS = np.dtype([*ROW.descr, ("height", "<i4"), ("width", "<i4")])
EMPTY = "it could not be read when it was packed"  # why an image has no record


class Records:
    """The records of one packed split. ``ValueError`` if a file is damaged or incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = info = read_info(folder)
        self.row = ROW_OF_PIXELS if info.content == "pixels" else ROW
        self.index: NDArray[Any] = self._array(INDEX, self.row)
        self.names: NDArray[np.bytes_] = self._array(NAMES, None)
        self.labels: NDArray[np.int64] | None = (
            self._array(LABELS, np.dtype("<i8")) if info.labelled else None
        )
        try:
            self._file = os.open(folder / IMAGES, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{folder / IMAGES} cannot be opened ({error.strerror}); {_AGAIN}") from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size != info.size:
            raise ValueError(f"{folder / IMAGES} has {size:,} of {info.size:,} bytes; {_AGAIN}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files again."""
        return Records, (self.folder,)

    def __len__(self) -> int:
        return len(self.index)

    def _array(self, name: str, dtype: np.dtype[Any] | None) -> NDArray[Any]:
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of many kinds, whatever the bytes are
            raise ValueError(f"{path} is missing or damaged ({legible(error)}); {_AGAIN}") from error
        right = array.dtype.kind == "S" if dtype is None else array.dtype == dtype
        if not right or array.shape != (self.info.images,):
            raise ValueError(
                f"{path} does not have the {self.info.images:,} entries that it should; {_AGAIN}"
            )
        if checksum(array) != self.info.checksums.get(name):
            raise ValueError(f"{path} is damaged: its checksum differs; {_AGAIN}")
        return np.asarray(array)

    def name(self, i: int) -> str:
        """The path of the file that record ``i`` was made of, relative to the folder of the split."""
        return legible(self.names[i].decode("utf-8", "surrogateescape"))

    def read(self, i: int) -> bytearray:
        """The bytes of record ``i``. ``UnreadableImageError`` if it is empty, or is not what was written."""
        row = self.index[i]
        if not row["length"]:
            raise UnreadableImageError(EMPTY)
        record = self._stored(i)
        if zlib.crc32(record) != row["crc"]:
            raise UnreadableImageError(
                f"{_DIFFERS}; sslzoo pack --verify {legible(self.folder.parent)} lists what is damaged"
            )
        return record

    def _stored(self, i: int) -> bytearray:
        return read_part(self._file, self.folder, int(self.index[i]["offset"]), int(self.index[i]["length"]))

    def shape(self, i: int) -> tuple[int, int]:
        """Height and width of record ``i``, if it holds pixels."""
        return int(self.index[i]["height"]), int(self.index[i]["width"])

    def damaged(self) -> Iterator[str]:
        """Read every record; yields for each an empty text, or why it cannot be read. Those that were empty when packed
        are not counted as damaged."""
        for i in range(len(self)):
            try:
                same = zlib.crc32(self._stored(i)) == self.index[i]["crc"]
                yield "" if same else f"{self.name(i)} ({_DIFFERS})"
            except UnreadableImageError as error:
                yield f"{self.name(i)} ({error})"


_DIFFERS = "its checksum differs"
_AGAIN = "delete its folder and pack the split again"


def checksum(array: NDArray[Any]) -> int:
    """CRC-32 of the contents of ``array``."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


class _PackedSource(ImageSource):
    """All records of a packed split, or some."""

    is_array = False

    def __init__(
        self,
        name: str,
        split: str,
        channels: int,
        records: Records,
        chosen: NDArray[np.int64] | None,
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...],
    ) -> None:
        """``chosen``: the records (N,), in order; None: all. ``labels`` (N,) are theirs."""
        super().__init__(name, split, channels, labels, class_names)
        self.records, self._chosen = records, chosen

    def __len__(self) -> int:
        return len(self.records if self._chosen is None else self._chosen)

    def _identity(self) -> bytes:
        """That of the image files, unless they were reduced."""
        names = self.records.names if self._chosen is None else self.records.names[self._chosen]
        reduced = self.records.info.options if self.records.info.short_side is not None else ""
        return b"\0".join(names.tolist()) + (f"\0{reduced}".encode() if reduced else b"")

    def _at(self, sample_id: int) -> int:
        return sample_id if self._chosen is None else int(self._chosen[sample_id])

    def where(self, sample_id: int) -> str:
        return f"{legible(self.records.folder)}: {self.records.name(self._at(sample_id))}"


class PackedFiles(_PackedSource, EncodedSource):
    """Records that are the bytes of image files."""

    def encoded(self, sample_id: int) -> bytearray:
        return self.records.read(self._at(sample_id))


class PackedPixels(_PackedSource):
    """Records that are decoded images, uint8 (H, W, C)."""

    def read(self, sample_id: int) -> Tensor:
        i = self._at(sample_id)
        pixels = torch.frombuffer(self.records.read(i), dtype=torch.uint8)
        return pixels.view(*self.records.shape(i), self.channels).permute(2, 0, 1)
