"""Make the embedded subset of Fashion-MNIST: 1,200 training and 200 test images per class.

    python sslzoo/data/embedded/make.py /usr/share/datasets/fashion-mnist

The input is the four idx files (Debian package ``dataset-fashion-mnist``). The subset depends only on ``SEED``,
and the npz file contains each image's index in the full set, so that anyone can check it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sslzoo.data.idx import read_idx

SEED = 20170828
PER_CLASS = {"train": ("train", 1200), "test": ("t10k", 200)}
TARGET = Path(__file__).parent / "fashion_mnist_12k.npz"


def main(folder: Path) -> None:
    """Write ``fashion_mnist_12k.npz`` to the folder of this file."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, Any] = {}
    for split, (prefix, per_class) in PER_CLASS.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
        index = np.sort(np.concatenate(chosen))
        arrays |= {
            f"{split}_images": images[index],
            f"{split}_labels": labels[index],
            f"{split}_index": index.astype(np.int32),
        }
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
