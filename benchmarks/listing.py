"""CPU time to list a folder of images: a kept listing and a new one, compared with ``Path.rglob``.

    python benchmarks/listing.py

All run alternately in the same process, on empty files in a temporary folder, 100,000 in 100 classes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from measure import Result, alternating, ratio, report

from sslzoo.data import listing
from sslzoo.data.listing import EXTENSIONS, class_folders, image_files

CLASSES = 100


def by_rglob(root: Path) -> list[str]:
    """Relative paths as a data set's reader without :mod:`sslzoo.data.listing` would find them."""
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file()
    )


def make(root: Path, files: int) -> None:
    """Empty files with names as ImageNet's, in folders that have not changed for long."""
    for c in range(CLASSES):
        folder = root / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in range(c, files, CLASSES):
            (folder / f"n{c:08d}_{i:08d}.JPEG").touch()
        os.utime(folder, (1e9, 1e9))


def measure(files: int = 100_000, rounds: int = 5) -> list[Result]:
    """How many times as long ``rglob`` takes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "train"
        make(root, files)
        contenders = {
            "rglob": lambda: by_rglob(root),
            "new listing": lambda: listing._walk_all(root, class_folders(root)),
            "kept listing": lambda: image_files(root, class_folders(root)),
        }
        found = image_files(root, class_folders(root)).paths.tolist()
        assert [os.fsdecode(path) for path in found] == by_rglob(root)
        seconds = alternating(contenders, rounds)
    bounds = {"new listing": 5, "kept listing": 60}
    return [
        Result(
            work=f"{name} of {files:,} files",
            baseline="Path.rglob",
            value=ratio(seconds, "rglob", name),
            unit="x as fast",
            at_least=least,
        )
        for name, least in bounds.items()
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
