"""CPU time to index tar files, to read a kept index, and to get the bytes of images from them and from a folder.

    python benchmarks/shards.py

All run alternately in the same process, on 20,000 images of 2,000 random bytes: in four tar files with a label each,
and in a folder without labels.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from measure import Result, alternating, ratio, report

from sslzoo.data import tar_shards
from sslzoo.data.datasets import open_source
from sslzoo.data.sources import EncodedSource
from sslzoo.recipe.sections import SourceConfig

SHARDS = 4
READ = 5_000  # images that are read in a round


def make(root: Path, images: int) -> None:
    """Tar files in ``root``/shards/train, which have not changed for long, and a folder ``root``/files."""
    content = os.urandom(2_000)
    (root / "shards/train").mkdir(parents=True)
    (root / "files").mkdir()
    for k in range(SHARDS):
        path = root / f"shards/train/{k:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(k * images // SHARDS, (k + 1) * images // SHARDS):
                (root / f"files/n{k:08d}_{i:08d}.JPEG").write_bytes(content)
                for kind, data in (("cls", b"%d" % k), ("JPEG", content)):
                    member = tarfile.TarInfo(f"n{k:08d}_{i:08d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        os.utime(path, (1e9, 1e9))
    os.utime(root / "shards/train", (1e9, 1e9))


def by_tarfile(folder: Path) -> None:
    """The members, as tarfile finds them, without looking at their names or labels."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.getmembers()


def read(source: EncodedSource) -> None:
    """Some of the images, from all over the files."""
    for i in range(0, len(source), len(source) // READ):
        source.encoded(i)


def measure(images: int = 20_000, rounds: int = 5) -> list[Result]:
    """How many times as long tarfile alone takes, and the folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, images)
        train = root / "shards/train"
        names = sorted(path.name for path in train.iterdir())
        config = SourceConfig(dataset="webdataset", root=str(train.parent))
        shards, files = (
            open_source(config),
            open_source(SourceConfig(dataset="folder", root=str(root / "files"))),
        )
        assert isinstance(shards, EncodedSource) and isinstance(files, EncodedSource)
        assert len(shards) == len(files) == images
        seconds = alternating(
            {
                "tarfile": lambda: by_tarfile(train),
                "new index": lambda: tar_shards._index(train, names),
                "kept index": lambda: open_source(config),
                "folder": lambda: read(files),
                "shards": lambda: read(shards),
            },
            rounds,
        )
    return [
        Result(
            work=f"{work}, {images:,} images in tar files",
            baseline=words,
            value=ratio(seconds, baseline, name),
            unit="x as fast",
            at_least=least,
        )
        for name, work, baseline, words, least in (
            ("new index", "new index", "tarfile", "tarfile alone", 0.75),
            ("kept index", "kept index", "tarfile", "tarfile alone", 200),
            ("shards", "bytes", "folder", "image files", 1),
        )
    ]


if __name__ == "__main__":
    sys.exit(report(measure()))
