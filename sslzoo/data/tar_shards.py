"""Images in tar files in WebDataset's layout, read at random.

The files (shards) are indexed once, by the standard library's tarfile: where each image lies, its name and its label.
An image is then read by its place, so that the shards behave as a folder does. The package webdataset reads shards from
front to back, without sample ids, and is not used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslzoo.data.datasets import choose_classes, wrong_layout
from sslzoo.data.disk import legible, read_file
from sslzoo.data.kept import Found, as_bytes, once_per_node, state_of
from sslzoo.data.listing import EXTENSIONS
from sslzoo.data.sources import EncodedSource, ImageSource
from sslzoo.recipe.packed_info import split_names
from sslzoo.recipe.sections import SourceConfig

CLASSES = "classes.txt"  # in the root: the name of class 0, 1, ... on one line each
SPLITS = ("train", "val", "validation", "test")  # that are looked for in the names of tar files
THREADS = 8  # that index shards, because disks answer several at once faster than one after the other
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz)$")
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# The key ends at the first dot of the file's name; folders belong to it. Hidden files have none.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_BROKEN = re.compile(r"[\n\r\0\ud800-\udfff]")  # line breaks, and what is no text
_LARGE = 10**10  # bytes of shards from which on indexing is announced
_LARGEST = 10**6  # number of a class
_ALIKE = "label all images by numbers, or all by names"

log = logging.getLogger("sslzoo")


class ShardSource(EncodedSource):
    """Images in the tar files ``shards`` of ``root``, under the names ``paths``."""

    def __init__(
        self,
        name: str,
        split: str,
        folder: Path,
        shards: NDArray[np.bytes_],
        index: Mapping[str, NDArray[Any]],
        labels: NDArray[np.int64] | None,
        class_names: Sequence[str] = (),
        channels: int = 3,
    ) -> None:
        """``index`` has arrays (N,): ``shard``, number in ``shards``; ``offset`` and ``length`` in it (bytes); and
        ``member``, its name."""
        super().__init__(name, split, channels, labels, class_names)
        self.root, self._shards = folder, shards
        self._shard, self.paths = index["shard"], index["member"]
        self._offset, self._length = index["offset"], index["length"]

    def __len__(self) -> int:
        return len(self._shard)

    def _identity(self) -> bytes:
        # Not the shards: the same images, divided among other files, stay the same samples.
        return self._length.tobytes() + b"\0".join(self.paths.tolist())

    def where(self, sample_id: int) -> str:
        return legible(f"{self._path(sample_id)}: {_text(self.paths, sample_id)}")

    def _path(self, sample_id: int) -> Path:
        return self.root / _text(self._shards, int(self._shard[sample_id]))

    def encoded(self, sample_id: int) -> bytearray:
        place = int(self._offset[sample_id]), int(self._length[sample_id])
        return read_file(self._path(sample_id), self.root, *place)


def _text(names: NDArray[np.bytes_], index: int) -> str:
    return names[index].decode("utf-8", "surrogateescape")


def webdataset(cfg: SourceConfig, channels: int) -> ImageSource:
    """Open the shards of a split. Sample ids follow the sorted names of the shards, and the order in each."""
    folder, names = _shards_of(cfg)
    index = once_per_node(folder, "index", (cfg.split,), lambda: _index(folder, names))
    if not len(index["shard"]):
        wrong_layout(cfg, f"the {len(names)} shards in {legible(folder)} contain no images")
    arrays = {name: index[name] for name in ("shard", "offset", "length", "member")}
    labels, classes = _labels(cfg, index["label"], [name.decode() for name in index["classes"].tolist()])
    if labels is None:
        if cfg.class_names:
            raise ValueError(
                f"classes cannot be selected in {cfg.dataset} split {cfg.split!r}: it has no labels"
            )
    else:
        kept, labels, classes = choose_classes(cfg, labels, classes)
        if kept is not None:
            arrays = {name: array[kept] for name, array in arrays.items()}
    return ShardSource(cfg.dataset, cfg.split, folder, index["shards"], arrays, labels, classes, channels)


def _shards_of(cfg: SourceConfig) -> tuple[Path, list[str]]:
    """The folder of the split's shards, and their sorted names."""
    root = Path(cfg.root)
    for split in split_names(cfg.split):
        folder, files = _files_of(root, split)
        for path in files:
            if _COMPRESSED.search(path.name):
                raise ValueError(
                    f"{legible(path)} is compressed, so that no image of it can be read alone; decompress it to a .tar "
                    "(images take hardly more room) and remove the compressed file"
                )
        shards = sorted(path.name for path in files if path.suffix == ".tar")
        if shards:
            return folder, shards
    return wrong_layout(cfg, f"there are no tar files of the split {' or '.join(split_names(cfg.split))}")


def _files_of(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder in which the tar files of ``split`` lie, and these, also if compressed: all of its own folder, or
    those that it names."""
    own = root / split
    files = _tar_files(own) if own.is_dir() else []
    if files:
        return own, files
    named = re.compile(rf"(^|[-_.]){re.escape(split)}[-_.]")
    return root, [path for path in _tar_files(root) if named.search(path.name)]


def _tar_files(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if path.name[0] != ".")
    return [path for path in visible if path.suffix == ".tar" or _COMPRESSED.search(path.name)]


def shard_splits(root: Path) -> tuple[str, ...]:
    """The splits with tar files in ``root``: its folders, or the usual names."""
    names = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    found = (n for n in {*names, *SPLITS} if any(path.suffix == ".tar" for path in _files_of(root, n)[1]))
    return tuple(sorted(found, key=lambda name: (name != "train", name)))


def _labels(
    cfg: SourceConfig, labels: NDArray[np.int64], found: Sequence[str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names; none if no image has a label. ``found``: the names that ``labels`` number, if the images
    are labelled by names."""
    if labels[0] < 0:
        return None, ()
    largest = int(labels.max())
    table = Path(cfg.root) / CLASSES
    try:
        names = tuple(line.strip() for line in table.read_text(encoding="utf-8").splitlines() if line.strip())
    except FileNotFoundError:
        return labels, tuple(found) or tuple(str(label) for label in range(largest + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{legible(table)} cannot be read ({error}); it must have a class name on each line"
        ) from error
    number = {name: i for i, name in enumerate(names)}
    unknown = [name for name in found if name not in number]
    if unknown:
        raise ValueError(
            f"{legible(table)} lacks {legible(unknown[0])!r}, by which images of {cfg.split} are labelled; add it on a "
            "line of its own, or remove the file"
        )
    if (not found and largest >= len(names)) or len(number) < len(names):
        raise ValueError(
            f"{legible(table)} must have a different name on a line for each of the labels 0 to {largest}, but has "
            f"{len(names)} lines, {len(number)} of them different"
        )
    return (np.array([number[name] for name in found])[labels] if found else labels), names


# -- indexing --------------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    """The images of a shard, in their order."""

    member: NDArray[np.bytes_]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int64]  # -1: none
    classes: tuple[str, ...]  # the sorted names that ``label`` numbers; none if images have numbers


def _index(folder: Path, names: Sequence[str]) -> Found:
    began = time.time()
    paths = ["", *names]
    state = np.array([_state_of(folder / path) for path in paths], dtype=np.int64)
    size = state[1:, 1].sum()
    if size > _LARGE:
        log.info("indexing %d tar files (%.0f GB) in %s, once", len(names), size / 1e9, legible(folder))
    shards = _index_all([folder / name for name in names])
    classes = sorted({name for shard in shards for name in shard.classes})
    number = {name: i for i, name in enumerate(classes)}
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([getattr(shard, name) for shard in shards])
        for name in ("member", "offset", "length")
    }
    arrays |= {
        "label": np.concatenate([_renumbered(shard, number) for shard in shards]),
        "classes": np.array([name.encode() for name in classes], dtype=np.bytes_),
    }
    counts = [len(shard.label) for shard in shards]
    arrays |= {"shard": np.repeat(np.arange(len(names), dtype=np.int32), counts), "shards": as_bytes(names)}
    without = np.flatnonzero(arrays["label"] < 0).tolist()
    if 0 < len(without) < len(arrays["label"]):
        first, shard = os.fsdecode(arrays["member"][without[0]]), names[int(arrays["shard"][without[0]])]
        raise ValueError(
            f"{len(without):,} of {len(arrays['label']):,} images have no label, such as {legible(first)} in "
            f"{legible(folder / shard)}; give every image a .cls with its class, or none"
        )
    kinds = [bool(shard.classes) if len(shard.label) else None for shard in shards]
    if classes and False in kinds:
        one, other = (legible(folder / names[kinds.index(named)]) for named in (False, True))
        raise ValueError(f"{one} has numbers as labels, and {other} names; {_ALIKE}")
    return Found(arrays, as_bytes(paths), state, began)


def _index_all(paths: Sequence[Path]) -> list[_Shard]:
    """The index of each shard: one after the other if the disk answers at once, since threads of Python would only
    wait for one another, and several at once if the first shard showed that most of the time is spent waiting."""
    wall, busy = time.perf_counter(), time.thread_time()
    first = _index_shard(paths[0])
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    with ThreadPoolExecutor(THREADS if wall > 2 * busy else 1) as pool:
        return [first, *pool.map(_index_shard, paths[1:])]


def _renumbered(shard: _Shard, number: Mapping[str, int]) -> NDArray[np.int64]:
    """The labels of a shard, with the ``number`` of each name."""
    if not shard.classes:
        return shard.label
    # No label, -1, takes the last of these, and so stays none.
    return np.array([*(number[name] for name in shard.classes), -1], dtype=np.int64)[shard.label]


def _state_of(path: Path) -> tuple[int, int, int]:
    try:
        return state_of(path.stat())
    except OSError as error:  # such as a link that leads nowhere
        raise ValueError(
            f"{legible(path)} cannot be read ({error.strerror}); restore what it leads to, or remove it"
        ) from error


def _index_shard(path: Path) -> _Shard:
    """Where the images of a shard are, and their labels, from ``KEY.cls`` or else from ``label`` of ``KEY.json``."""
    images: dict[str, tuple[str, int, int]] = {}  # by key: member, offset, length
    classes: dict[str, int | str] = {}
    described: dict[str, tuple[str, bytes]] = {}  # name and content of the JSON members with a label
    ignored: dict[str, str] = {}  # images by their suffix, but not by what follows the first dot
    try:
        with path.open("rb") as file:
            for member in _members(file):
                match = _MEMBER.fullmatch(member.name)
                if match is None or member.isdir() or "__MACOSX/" in member.name:
                    continue
                key, kind = match[1], match[2].lower()
                if f".{kind}" in EXTENSIONS:
                    _check_plain(member)
                    if key in images:
                        both = f"{images[key][0]} and {member.name}"
                        raise ValueError(f"two images have the key {key}: {both}; give each its own")
                    images[key] = member.name, member.offset_data, member.size
                elif kind == "cls":
                    if key in classes:
                        raise ValueError(f"there are two of {member.name}; keep one")
                    classes[key] = _class_of(_text_of(file, member), member.name)
                elif kind == "json":
                    content = _content(file, member)
                    if b'"label"' in content:
                        described[key] = member.name, content
                elif Path(kind).suffix in EXTENSIONS:
                    ignored[key] = member.name
        labels = [_label(key, classes, described) for key in images]
        names = sorted({label for label in labels if isinstance(label, str)})
        if names:
            labels = _numbered(labels, names, [member for member, _, _ in images.values()])
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(legible(f"{path}: {error}")) from error
    for key, name in ignored.items():
        if key not in images:
            problem = f"the key of {name} ends at its first dot, and {key} has no other image; rename it"
            raise ValueError(legible(f"{path}: {problem}"))
    for key in classes:
        if key not in images:
            raise ValueError(legible(f"{path}: {key}.cls has no image; add {key}.jpg or remove it"))
    return _Shard(
        as_bytes([member for member, _, _ in images.values()]),
        np.array([offset for _, offset, _ in images.values()], dtype=np.int64),
        np.array([length for _, _, length in images.values()], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        tuple(names),
    )


def _numbered(labels: Sequence[int | str], names: Sequence[str], members: Sequence[str]) -> list[int]:
    """Numbers of ``names`` instead of these, in labels of ``members``; ``ValueError`` if some are numbers already."""
    number = {name: i for i, name in enumerate(names)}
    for label, member in zip(labels, members, strict=True):
        if isinstance(label, int) and label >= 0:
            named = members[next(i for i, other in enumerate(labels) if isinstance(other, str))]
            raise ValueError(f"the label of {member} is a number, and that of {named} a name; {_ALIKE}")
    return [number[label] if isinstance(label, str) else -1 for label in labels]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file up to its end; ``ValueError`` if that is missing, or not the end of the file."""
    start = file.read(6)
    for magic, codec in _CODECS.items():
        if start.startswith(magic):
            raise ValueError(f"compressed ({codec}), so that no image of it can be read alone; decompress it")
    file.seek(0)
    again = "make or download it again"
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (member := tar.next()) is not None:
            yield member
            tar.members = []  # type: ignore[attr-defined]  # it would remember all
    except tarfile.TarError as error:
        raise ValueError(f"truncated or damaged ({error}); {again}") from error
    # Where a header is damaged or missing, tarfile ends as it does after the last member.
    file.seek(tar.offset)
    end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise ValueError(f"truncated or damaged at byte {tar.offset:,}; {again}")
    while rest := file.read(1 << 20):
        if any(rest):
            raise ValueError(
                "goes on after its end, as tar files that were joined do; pack them into one, or apart"
            )


def _check_plain(member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise ValueError(f"{member.name} is a link or sparse; pack it as a plain file (tar --dereference)")


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    _check_plain(member)
    return os.pread(file.fileno(), member.size, member.offset_data)


def _text_of(file: BinaryIO, member: tarfile.TarInfo) -> str:
    try:
        return _content(file, member).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} is no text in UTF-8 ({error.reason})") from error


def _label(
    key: str, classes: Mapping[str, int | str], described: Mapping[str, tuple[str, bytes]]
) -> int | str:
    """The label of the image with this key, a number or a name; -1: none, or several in one description."""
    if key in classes:
        return classes[key]
    if key not in described:
        return -1
    name, content = described[key]
    try:
        description = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error})") from error
    label = description.get("label") if isinstance(description, dict) else None
    return -1 if isinstance(label, list | dict | None) else _class_of(label, f'"label" in {name}')


def _class_of(label: object, what: str) -> int | str:
    """The number or the name of a class that ``label`` is, with ``what`` in the message if it is neither."""
    text = label.strip() if isinstance(label, str) else ""
    if text and not _is_number(text) and not _BROKEN.search(text):
        return text
    number = int(text) if text.isdecimal() else label
    if type(number) is int and 0 <= number <= _LARGEST:
        return number
    shown = json.dumps(label)
    raise ValueError(
        f"{what} must be the number of a class, 0 to {_LARGEST:,}, or its name, but is "
        f"{shown if len(shown) < 40 else shown[:40] + ' ...'}"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
