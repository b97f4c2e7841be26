"""Image sources: arrays in memory, and files that are decoded on demand."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from sslzoo.data.crops import channels_last
from sslzoo.data.decoding import decode
from sslzoo.data.disk import UnreadableImageError, legible, read_file
from sslzoo.randomness import FAKE, hash64, key

__all__ = [
    "ArraySource",
    "EncodedSource",
    "FakeSource",
    "FileSource",
    "ImageSource",
    "JoinedImages",
    "UnreadableImageError",
    "fake_source",
    "resized",
]


class ImageSource(ABC):
    """N images with or without labels. The index of an image is its ``sample_id``."""

    is_array: ClassVar[bool]  # whether images are in memory and all have the same size

    def __init__(
        self,
        name: str,
        split: str,
        channels: int,
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str],
    ) -> None:
        self.name, self.split, self.channels = name, split, channels
        self.labels, self.class_names = labels, tuple(class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names) if self.labels is not None else 0

    @cached_property  # images never change while a source is open, and every checkpoint holds it
    def fingerprint(self) -> str:
        """Name, split, number of images, and a hash of the samples' order, labels and identity.

        Per-sample state is only valid for the same fingerprint.
        """
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.tobytes())
        digest.update("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        digest.update(self._identity())
        return f"{self.name}/{self.split}/{len(self)}/{digest.hexdigest()[:16]}"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _identity(self) -> bytes:
        """Bytes that distinguish these images from others, without reading all of them."""

    @abstractmethod
    def read(self, sample_id: int) -> Tensor:
        """Read one image (C, H, W) uint8; raises ``UnreadableImageError`` with the reason if it cannot be read."""

    def fetch(self, sample_id: int) -> Callable[[], Tensor]:
        """The first half of :meth:`read`: get from the disk what is to be decoded. The second is what is returned."""
        return partial(self.read, sample_id)

    def where(self, sample_id: int) -> str:
        """A description of the sample for log messages."""
        return f"{self.name}/{self.split}[{sample_id}]"


class JoinedImages:
    """Images (N, C, H, W) uint8 in two arrays of one size, which may be memory-mapped, as if they were one."""

    def __init__(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> None:
        self._first, self._second = first, second
        self.shape = (len(first) + len(second), *first.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | NDArray[Any]) -> NDArray[np.uint8]:
        """Copies of the images at ``index``."""
        chosen = np.arange(len(self))[index]
        flat = chosen.reshape(-1)
        images = np.empty((len(flat), *self.shape[1:]), dtype=np.uint8)
        split = len(self._first)
        images[flat < split] = self._first[flat[flat < split]]
        images[flat >= split] = self._second[flat[flat >= split] - split]
        return images.reshape(*chosen.shape, *self.shape[1:])


class ArraySource(ImageSource):
    """Images (N, C, H, W) uint8 in memory or memory-mapped."""

    is_array = True

    def __init__(
        self,
        name: str,
        split: str,
        images: NDArray[np.uint8] | JoinedImages,
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__(name, split, images.shape[1], labels, class_names)
        self.images: Any = images  # indexed as an array

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    def _identity(self) -> bytes:
        return self.images[:16].tobytes() + self.images[-16:].tobytes()

    def read(self, sample_id: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[sample_id]))

    def batch(self, sample_id: Tensor) -> Tensor:
        """Copies of the images (n, C, H, W) uint8 with the ids ``sample_id`` (n,)."""
        return torch.from_numpy(self.images[sample_id.numpy()])


class ResizedImages(ImageSource):
    """The images of another source, with the shorter side resized to ``side`` pixels."""

    is_array = False

    def __init__(self, source: ImageSource, side: int) -> None:
        super().__init__(source.name, source.split, source.channels, source.labels, source.class_names)
        self.source, self.side = source, side

    def __len__(self) -> int:
        return len(self.source)

    def _identity(self) -> bytes:
        return self.source._identity() + str(self.side).encode()

    def where(self, sample_id: int) -> str:
        return self.source.where(sample_id)

    def read(self, sample_id: int) -> Tensor:
        return self.fetch(sample_id)()

    def fetch(self, sample_id: int) -> Callable[[], Tensor]:
        read = self.source.fetch(sample_id)
        return lambda: resize_short_side(read(), self.side)


def resize_short_side(image: Tensor, side: int) -> Tensor:
    """An image (C, H, W) uint8 whose shorter side is resized to ``side`` pixels, bilinear and antialiased."""
    image = channels_last(image)
    return TF.resize_image(image, [side], interpolation=InterpolationMode.BILINEAR, antialias=True)


def resized(source: ImageSource, side: int) -> ImageSource:
    """The images of ``source`` with the shorter side resized to ``side`` pixels."""
    same = isinstance(source, ArraySource) and min(source.size) == side
    return source if same else ResizedImages(source, side)


class EncodedSource(ImageSource):
    """Images that are stored as the bytes of image files, wherever these are, and decoded on demand."""

    is_array = False

    def __init__(
        self,
        name: str,
        split: str,
        channels: int,
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__(name, split, channels, labels, class_names)
        if channels not in (1, 3):
            raise ValueError(f"image files are read with 1 or 3 channels; data.mean has {channels}")

    @abstractmethod
    def encoded(self, sample_id: int) -> bytes | bytearray:
        """The bytes of one image file; raises ``UnreadableImageError`` with the reason if there are none."""

    def read(self, sample_id: int) -> Tensor:
        return decode(self.encoded(sample_id), self.channels)

    def fetch(self, sample_id: int) -> Callable[[], Tensor]:
        if type(self).read is not EncodedSource.read:  # a subclass decodes in a way of its own
            return super().fetch(sample_id)
        return partial(decode, self.encoded(sample_id), self.channels)


class FileSource(EncodedSource):
    """Image files under ``root``; ``paths`` are relative to it, as text or bytes."""

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        paths: Sequence[str] | NDArray[np.bytes_],
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
        channels: int = 3,
        by_class: bool = False,
    ) -> None:
        """``by_class``: the files follow the order of the classes, and that of the classes chosen if these are."""
        super().__init__(name, split, channels, labels, class_names)
        self.root, self.by_class = root, by_class
        # One array of bytes, which forked workers share; a list of strings would gradually be copied to each of them.
        self._paths = (
            paths
            if isinstance(paths, np.ndarray)
            else np.array([p.encode("utf-8", "surrogateescape") for p in paths])
        )

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def paths(self) -> NDArray[np.bytes_]:
        """The files (N,), relative to ``root``."""
        return self._paths

    def _identity(self) -> bytes:
        return b"\0".join(self._paths.tolist())

    def where(self, sample_id: int) -> str:
        return legible(self.path(sample_id))

    def path(self, sample_id: int) -> Path:
        """The file of an image."""
        return self.root / self._paths[sample_id].decode("utf-8", "surrogateescape")

    def encoded(self, sample_id: int) -> bytearray:
        return read_file(self.path(sample_id), self.root)


class FakeSource(ArraySource):
    """Generated images of coarse coloured squares, a function of the split and the sample id."""

    def __init__(self, n: int, channels: int, size: int, num_classes: int, split: str = "train") -> None:
        cells = min(size, 4)
        stream = key(FAKE, *split.encode())
        noise = hash64(stream, torch.arange(n * channels * cells * cells)).numpy().view(np.uint8)[::8]
        coarse = noise.reshape(n, channels, cells, cells)
        at = np.arange(size) * cells // size
        labels = np.arange(n, dtype=np.int64) % num_classes if num_classes else None
        super().__init__(
            "fake", split, coarse[:, :, at][:, :, :, at], labels, tuple(str(c) for c in range(num_classes))
        )

    def sibling(self, split: str, num_classes: int) -> FakeSource:
        """Another split with as many images of the same size."""
        return FakeSource(len(self), self.channels, self.size[0], num_classes, split)


def fake_source(n: int, channels: int, size: int, num_classes: int) -> FakeSource:
    """``n`` generated images of ``size`` x ``size`` pixels, for dry runs and tests; ``num_classes`` 0: no labels."""
    return FakeSource(n, channels, size, num_classes)
