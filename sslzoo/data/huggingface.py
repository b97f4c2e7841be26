"""Images saved by ``save_to_disk`` of the package ``datasets`` (Hugging Face), memory-mapped where they lie."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslzoo.data.datasets import choose_classes, wrong_layout
from sslzoo.data.disk import UnreadableImageError, legible
from sslzoo.data.sources import EncodedSource, ImageSource
from sslzoo.recipe.packed_info import split_names
from sslzoo.recipe.sections import SourceConfig

_STATE = "state.json"  # in the folder of each saved Dataset


class ArrowSource(EncodedSource):
    """Images in a column of ``table``, of the package ``datasets``, which processes share through the memory map."""

    def __init__(
        self,
        name: str,
        split: str,
        folder: Path,
        table: Any,
        column: str,
        rows: NDArray[np.int64] | None,
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] = (),
        channels: int = 3,
    ) -> None:
        """``rows``: (N,) of the table; None: all."""
        super().__init__(name, split, channels, labels, class_names)
        self.root, self._rows = folder, rows
        self._place = table, column
        self._column = _bytes_of(*self._place)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files again: a table is pickled as their names, but a column with its content."""
        return {key: value for key, value in vars(self).items() if key != "_column"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._column = _bytes_of(*self._place)

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    @property
    def paths(self) -> NDArray[np.bytes_]:
        """A name (N,) for each image: the number of its row."""
        return np.array([b"%08d" % self._row(i) for i in range(len(self))])

    def _row(self, sample_id: int) -> int:
        return sample_id if self._rows is None else int(self._rows[sample_id])

    def _identity(self) -> bytes:
        lengths = import_module("pyarrow.compute").binary_length(self._column)
        ends = [self._column[i].as_py() or b"" for i in (0, len(self._column) - 1)]
        rows = b"" if self._rows is None else self._rows.tobytes()
        return b"\0".join((lengths.fill_null(-1).to_numpy().astype(np.int64).tobytes(), *ends, rows))

    def where(self, sample_id: int) -> str:
        return f"{legible(self.root)}: row {self._row(sample_id)}"

    def encoded(self, sample_id: int) -> bytes:
        data = self._column[self._row(sample_id)].as_py()
        if data is None:
            raise UnreadableImageError("no bytes are stored")
        return data


def _bytes_of(table: Any, column: str) -> Any:
    """pyarrow's ChunkedArray of the bytes of a column of images, null where there are none."""
    return import_module("pyarrow.compute").struct_field(table.column(column), "bytes")


def huggingface(cfg: SourceConfig, channels: int) -> ImageSource:
    """Open a split. Sample ids are the numbers of the rows; with ``data.classes``, those that are left."""
    library = _library()
    folder = _folder_of(cfg)
    library.disable_progress_bars()
    try:
        saved = library.load_from_disk(str(folder.resolve()), keep_in_memory=False)
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{legible(folder)} is damaged or incomplete ({problem}); save or copy it again"
        ) from error
    if folder == Path(cfg.root) and cfg.split != str(saved.split or "train"):
        wrong_layout(cfg, f"it holds the split {saved.split or 'train'} alone")
    if not len(saved):
        wrong_layout(cfg, f"{legible(folder)} has no rows")
    column = _images(library, saved, folder)
    labels, names = _labels(library, saved, folder)
    rows = None
    if labels is not None:
        rows, labels, names = choose_classes(cfg, labels, names)
    elif cfg.class_names:
        raise ValueError(f"classes cannot be selected in {cfg.dataset} split {cfg.split!r}: it has no labels")
    return ArrowSource(cfg.dataset, cfg.split, folder, saved.data, column, rows, labels, names, channels)


def _library() -> Any:
    try:
        library = import_module("datasets")
        library.load_from_disk  # noqa: B018  # a folder of this name in the working directory has none
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"data.dataset=huggingface needs the package datasets: pip install 'sslzoo[huggingface]' ({error})"
        ) from error
    return library


def _folder_of(cfg: SourceConfig) -> Path:
    """Where the split was saved: in a folder of its name, or alone in the root."""
    root = Path(cfg.root)
    splits = split_names(cfg.split)
    for folder in (*(root / split for split in splits), root):
        if (folder / _STATE).is_file():
            return folder
    return wrong_layout(cfg, f"there is no {' or '.join(f'{split}/{_STATE}' for split in splits)}")


def saved_splits(root: Path) -> tuple[str, ...]:
    """The splits that were saved in ``root``, each in its folder or one alone."""
    found = sorted(path.parent.name for path in root.glob(f"*/{_STATE}"))
    if not found and (root / _STATE).is_file():
        return ("train",)
    return tuple(sorted(found, key=lambda name: name != "train"))


def _one_column(saved: Any, folder: Path, kind: str, found: list[str], usual: str) -> str | None:
    """The column of a kind: the only one, or the one with its usual name."""
    if len(found) < 2 or usual in found:
        return usual if usual in found else next(iter(found), None)
    raise ValueError(
        f"{legible(folder)} has {len(found)} columns of {kind}: {', '.join(found)}; call the one to use {usual} "
        f"(rename_column({found[0]!r}, {usual!r})) and save again"
    )


def _images(library: Any, saved: Any, folder: Path) -> str:
    """The column of the images; ``ValueError`` if there is none, or only paths were saved."""
    found = [name for name, feature in saved.features.items() if isinstance(feature, library.Image)]
    name = _one_column(saved, folder, "images", found, "image")
    if name is None:
        raise ValueError(
            f"{legible(folder)} has no column of images among {', '.join(saved.column_names)}; make one by "
            "cast_column(NAME, datasets.Image()) and save again"
        )
    if _bytes_of(saved.data, name).null_count == len(saved):
        raise ValueError(
            f"{legible(folder)} has paths of images instead of images; load it where these files are and save again: "
            "save_to_disk stores them"
        )
    return name


def _labels(library: Any, saved: Any, folder: Path) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names, from the column of type ClassLabel, or else integers called ``label``."""
    found = [name for name, feature in saved.features.items() if isinstance(feature, library.ClassLabel)]
    name = _one_column(saved, folder, "labels", found, "label")
    feature = saved.features.get(name or "label")
    if feature is None:
        return None, ()
    name = name or "label"
    if not str(feature.dtype).startswith(("int", "uint")):
        raise ValueError(
            f"{legible(folder)}: label is of type {feature.dtype}, not a class; convert it by "
            "class_encode_column('label'), or remove_columns('label'), and save again"
        )
    column = saved.data.column(name)
    labels = column.fill_null(-1).to_numpy().astype(np.int64)
    without = int((labels < 0).sum())
    if without == len(labels):  # as in test sets whose labels are kept secret
        return None, ()
    if without:
        raise ValueError(
            f"{legible(folder)}: {without:,} of {len(labels):,} images have no {name}, such as row "
            f"{int(np.argmax(labels < 0))}; give every image a class, or remove the column"
        )
    names = feature.names if found else [str(i) for i in range(labels.max() + 1)]
    if labels.max() >= len(names):
        raise ValueError(f"{legible(folder)}: {name} has the value {labels.max()}, but {len(names)} names")
    return labels, tuple(names)
