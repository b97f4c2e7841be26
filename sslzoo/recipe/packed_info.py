"""What a packed split says of itself: the file ``packed.json`` in its folder. Importable without torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sslzoo.files import write_json

FORMAT = 2  # of packed data; raise it when older versions cannot read it
FILE = "packed.json"
_CHECKSUM = "checksum"  # the key in the file under which its own is
PARTIAL = ".partial"  # the end of the folder's name while it is being written


Content = Literal["files", "pixels"]


@dataclass(frozen=True, kw_only=True)
class PackedInfo:
    """One packed split of a data set. The format is described in docs/packing.md."""

    dataset: str  # by which it opens
    source: str  # the folder of images
    fingerprint: str  # of the images in that folder
    state: str | None  # digest of the sizes and times of these files; None: they are no image files
    content: Content  # of a record: the bytes of an image file, or uint8 (H, W, C)
    short_side: int | None  # pixels to which larger images were reduced; None: no image was
    channels: int | None  # to which images were decoded; None: none was
    images: int
    labelled: bool
    by_class: bool  # images follow the order of the classes, whichever are chosen
    classes: tuple[str, ...]  # in label order
    size: int  # bytes of all records
    checksums: dict[str, int]  # CRC-32 of the contents of the arrays, by name

    @property
    def options(self) -> str:
        """The options of ``sslzoo pack`` by which it was written, as typed."""
        parts = [] if self.short_side is None else [f"--short-side {self.short_side}"]
        parts += ["--raw"] if self.content == "pixels" else []
        parts += [f"--channels {self.channels}"] if self.channels not in (None, 3) else []
        return " ".join(parts)

    def write(self, folder: Path) -> None:
        """Write the file to ``folder``."""
        values = {"format": FORMAT} | asdict(self)
        write_json(folder / FILE, values | {_CHECKSUM: _checksum(values)})


def _checksum(values: Mapping[str, Any]) -> int:
    """CRC-32 of the contents of a ``packed.json``."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` is a packed split, and a finished one."""
    return (folder / FILE).is_file() and not folder.name.endswith(PARTIAL)


def read_info(folder: Path) -> PackedInfo:
    """What the packed split ``folder`` says of itself. ``ValueError`` if its file is damaged or of a newer version."""
    path = folder / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
        if version == FORMAT:
            if values.pop(_CHECKSUM) != _checksum(values):
                raise ValueError("its checksum differs")
            if values["content"] not in get_args(Content):
                raise ValueError(f"content {values['content']!r} is unknown")
            values["classes"] = tuple(values["classes"])
            return PackedInfo(**{key: value for key, value in values.items() if key != "format"})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete its folder and pack the split again"
        ) from error
    raise ValueError(
        f"{path} has format {version}, and this version of sslzoo reads {FORMAT}; update sslzoo, or pack again"
    )


def split_names(split: str) -> tuple[str, ...]:
    """The folders that may hold ``split``: ``val`` or ``validation`` stands in for ``test``."""
    return ("test", "val", "validation") if split == "test" else (split,)


def packed_split(root: Path, split: str) -> Path:
    """The folder of ``split`` in the packed data ``root``. ``ValueError`` says why there is none."""
    names = split_names(split)
    for name in names:
        if is_packed(root / name):
            return root / name
    refuse_unfinished(root, *names)
    if is_packed(root):
        raise ValueError(f"{root} is itself a packed split; the root is the folder above it")
    raise ValueError(f"{root} has no packed images of split {split!r}, such as sslzoo pack writes")


def refuse_unfinished(root: Path, *names: str) -> None:
    """``ValueError`` if one of the splits ``names`` of ``root`` is being packed, or was left before it was complete."""
    for name in names:
        path = root / f"{name}{PARTIAL}"
        if path.is_dir():
            raise ValueError(f"{path} is not finished; wait for sslzoo pack, or run the same command again")
