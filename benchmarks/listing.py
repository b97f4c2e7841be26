"""CPU time to list a folder of images: a kept listing and a new one, compared with ``Path.rglob``.

All run alternately in the same process, on empty files in a temporary folder (by default 100,000 in 100 classes).

    python benchmarks/listing.py [FILES]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import alternating, ratio

from sslzoo.data import listing
from sslzoo.data.listing import EXTENSIONS, class_folders, image_files

CLASSES, ROUNDS = 100, 5


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


def main() -> None:
    """Print CPU microseconds per file, and ratios."""
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "train"
        make(root, files)
        contenders = {
            "rglob": lambda: by_rglob(root),
            "new listing": lambda: listing._walk_all(root, class_folders(root)),
            "kept listing": lambda: image_files(root, class_folders(root)),
        }
        assert [os.fsdecode(p) for p in image_files(root, class_folders(root)).paths.tolist()] == by_rglob(
            root
        )
        seconds = alternating(contenders, ROUNDS)
    for name, values in seconds.items():
        of_rglob = (
            "" if name == "rglob" else f"  rglob takes {ratio(seconds, 'rglob', name):.1f} times as long"
        )
        print(f"{name:14} {1e6 * median(values) / files:7.3f} µs a file{of_rglob}")


if __name__ == "__main__":
    main()
