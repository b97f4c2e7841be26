"""The two kinds of image source, in memory and decoded on demand, behind one class."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from sslzoo.randomness import FAKE, hash64, key


class UnreadableImageError(OSError):
    """An image file that is missing, cut short or in no known format."""


class ImageSource(ABC):
    """N images, perhaps with labels. A position in it is a ``sample_id``."""

    is_array: ClassVar[bool]  # in memory, all of one size

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
        """0 without labels."""
        return len(self.class_names) if self.labels is not None else 0

    @property
    def fingerprint(self) -> str:
        """Name, split, number of images and a hash of order, labels and identity of the samples.

        State that is kept per sample is worth nothing under another one.
        """
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.tobytes())
        digest.update("\0".join(self.class_names).encode())
        digest.update(self._identity())
        return f"{self.name}/{self.split}/{len(self)}/{digest.hexdigest()[:16]}"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _identity(self) -> bytes:
        """What tells these images from others without reading them all."""

    @abstractmethod
    def read(self, sample_id: int) -> Tensor:
        """One image (C, H, W) uint8; ``UnreadableImageError`` where there is none."""

    def where(self, sample_id: int) -> str:
        """A name for the log."""
        return f"{self.name}/{self.split}[{sample_id}]"


class ArraySource(ImageSource):
    """Images (N, C, H, W) uint8 in memory, or mapped into it."""

    is_array = True

    def __init__(
        self,
        name: str,
        split: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__(name, split, images.shape[1], labels, class_names)
        self.images = images

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
        """Images (n, C, H, W) uint8 of the positions (n,), copied."""
        return torch.from_numpy(self.images[sample_id.numpy()])


class FileSource(ImageSource):
    """Image files, decoded when they are read."""

    is_array = False

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        paths: Sequence[str],
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
        channels: int = 3,
    ) -> None:
        super().__init__(name, split, channels, labels, class_names)
        self.root = root
        # One array of bytes: forked workers share it, where a list of strings would be copied bit by bit.
        self._paths = np.array([p.encode() for p in paths])
        if channels not in (1, 3):
            raise ValueError(f"image files are read with 1 or 3 channels; data.mean has {channels}")

    def __len__(self) -> int:
        return len(self._paths)

    def _identity(self) -> bytes:
        return b"\0".join(self._paths.tolist())

    def where(self, sample_id: int) -> str:
        return str(self.root / self._paths[sample_id].decode())

    def read(self, sample_id: int) -> Tensor:
        path = self.where(sample_id)
        try:
            return _decode_with_torchvision(path, "GRAY" if self.channels == 1 else "RGB")
        except (RuntimeError, ImportError):
            return _decode_with_pil(path, "L" if self.channels == 1 else "RGB")


def _decode_with_torchvision(path: str, mode: str) -> Tensor:
    """Four times as fast as PIL. ``RuntimeError`` for what it cannot read."""
    # Deprecated from 0.29 for a package of its own; where it is gone, PIL decodes.
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        image = decode_image(path, ImageReadMode[mode])
    if image.ndim == 4:  # an animation: its first frame
        image = image[0]
    return image if image.dtype == torch.uint8 else TF.to_dtype(image, torch.uint8, scale=True)


def _decode_with_pil(path: str, mode: str) -> Tensor:
    """The formats that torchvision does not know."""
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path}: {error}") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], len(mode)).permute(2, 0, 1)


class FakeSource(ArraySource):
    """Images drawn from a hash: coarse coloured squares that differ from one sample to the next."""

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
        """Fake images of the same number and size."""
        return FakeSource(len(self), self.channels, self.size[0], num_classes, split)


def fake_source(n: int, channels: int, size: int, num_classes: int) -> FakeSource:
    """``n`` generated images of ``size`` pixels, for dry runs and tests; ``num_classes`` 0: no labels."""
    return FakeSource(n, channels, size, num_classes)
