"""The idx format of the MNIST family."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read the uint8 array in an idx file, which is gzipped if its name ends in ``.gz``.

    Raises ``ValueError`` if the file is not an idx file of unsigned bytes, or is truncated.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if len(raw) < 4 or len(raw) < 4 + 4 * raw[3] or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes; download it again")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], dtype=">u4").astype(int))
    if len(raw) - start != np.prod(shape):
        raise ValueError(f"{path} declares shape {shape} but has {len(raw) - start} bytes; download it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
