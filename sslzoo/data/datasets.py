"""Open data sets by name, with one reader per layout on disk.

Nothing is downloaded. For an empty folder or a wrong layout, a ``ValueError`` shows the expected layout.
"""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sslzoo.data.disk import legible
from sslzoo.data.idx import read_idx
from sslzoo.data.listing import EXTENSIONS, class_folders, image_files
from sslzoo.data.packed import PackedFiles, PackedPixels, Records
from sslzoo.data.sources import ArraySource, FileSource, ImageSource, JoinedImages
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.packed_info import is_packed, packed_split, read_info, refuse_unfinished, split_names
from sslzoo.recipe.registry import plugin
from sslzoo.recipe.sections import DataConfig, SourceConfig

__all__ = ["ImageSource", "open_source"]

log = logging.getLogger("sslzoo")


def open_source(cfg: SourceConfig, channels: int = 0) -> ImageSource:
    """Open the data set that ``cfg`` names. A plug-in, ``module:function``, is called with ``cfg`` and the number of
    channels and must return an :class:`ImageSource`.

    ``channels`` is the number of channels, 1 or 3, to which files are decoded; 0: as many as ``data.mean`` of a
    :class:`DataConfig` has, otherwise the data set's. Raises ``ValueError`` for an unknown name or split, a wrong
    layout, or images with a different number of channels.
    """
    info = dataset_info(cfg.dataset)
    if not channels:
        channels = len(cfg.mean) if isinstance(cfg, DataConfig) else info.channels
    if info.splits and cfg.split not in info.splits:
        raise ValueError(f"{cfg.dataset} has the splits {', '.join(info.splits)}; got split {cfg.split!r}")
    # An empty root would mean the working directory.
    if info.layout and not (cfg.root and Path(cfg.root).is_dir()):
        wrong_layout(cfg, f"{cfg.root!r} is not a folder")
    source = plugin(info.reader, "data.dataset")(cfg, channels)
    if not isinstance(source, ImageSource):
        raise ValueError(f"data.dataset={cfg.dataset!r} returned {type(source).__name__}, not an ImageSource")
    if source.channels != channels:
        raise ValueError(
            f"{cfg.dataset} has {source.channels} channel(s) but data.mean and data.std have {channels}; "
            f"give {source.channels} number(s) there and set backbone.in_channels={source.channels}"
        )
    if source.labels is not None:
        _check_labels(cfg, len(source), source.labels, source.num_classes)
    complete = info.nominal_size(cfg.split, cfg.classes)
    if complete is not None and len(source) != complete:
        log.warning(
            f"{cfg.dataset} split {cfg.split} in {cfg.root or 'the package'} is not complete: it has {len(source):,} "
            f"of {complete:,} images"
            if len(source) < complete
            else f"{cfg.dataset} split {cfg.split} in {cfg.root} has {len(source):,} images instead of {complete:,}"
        )
    return source


def _check_labels(cfg: SourceConfig, images: int, labels: NDArray[Any], classes: int) -> None:
    """``ValueError`` unless there is a label per image, each between 0 and the number of classes."""
    where = f"{cfg.dataset} split {cfg.split} in {cfg.root}"
    if len(labels) != images:
        raise ValueError(f"{where} has {images:,} images but {len(labels):,} labels; download it again")
    if images and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{where} has the labels {labels.min()} to {labels.max()}, but {classes} classes; download it again"
        )


def wrong_layout(cfg: SourceConfig, problem: str) -> NoReturn:
    info = dataset_info(cfg.dataset)
    root = "data.root=PATH" if isinstance(cfg, DataConfig) else "its root"
    public = (
        f", or export SSLZOO_DATA_DIR, under which bundled recipes look ({cfg.dataset} is not downloaded: get it "
        f"from {info.page})"
    )
    raise ValueError(
        f"cannot open {cfg.dataset} (split {cfg.split!r}): {problem}. Expected under data.root={cfg.root!r}: "
        f"{info.layout}; set {root} to the folder that contains it{public if info.page else ''}"
    )


def _found(cfg: SourceConfig, *candidates: str) -> Path:
    """The first candidate path under the root that exists; ``ValueError`` if there is none."""
    for candidate in candidates:
        if (Path(cfg.root) / candidate).exists():
            return Path(cfg.root) / candidate
    refuse_unfinished(Path(cfg.root), *candidates)
    wrong_layout(cfg, f"there is no {' or '.join(candidates)}")


def _class_order(cfg: SourceConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes to keep, in label order, out of ``names``; ``ValueError`` for an unknown one."""
    unknown = [c for c in cfg.class_names if c not in names]
    if unknown:
        raise ValueError(
            f"classes names {unknown[0]!r}, which {cfg.dataset} at {cfg.root or 'its package'!r} does not have "
            f"({len(names)} classes, such as {', '.join(names[:3])})"
        )
    return cfg.class_names or names


def _in_memory(
    cfg: SourceConfig,
    images: NDArray[np.uint8] | JoinedImages,
    labels: NDArray[Any] | None,
    names: tuple[str, ...],
) -> ArraySource:
    """An array source restricted to the classes that the recipe keeps."""
    if labels is None:
        if cfg.class_names:
            raise ValueError(
                f"classes cannot be selected in {cfg.dataset} split {cfg.split!r}: it has no labels"
            )
        return ArraySource(cfg.dataset, cfg.split, images, None)
    _check_labels(cfg, len(images), labels, len(names))
    kept, labels, classes = choose_classes(cfg, labels.astype(np.int64), names)
    return ArraySource(cfg.dataset, cfg.split, images if kept is None else images[kept], labels, classes)


def choose_classes(
    cfg: SourceConfig, labels: NDArray[np.int64], names: tuple[str, ...]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64], tuple[str, ...]]:
    """The images of the classes that the recipe keeps, out of ``names``: their indices (None: all), labels and classes.

    ``labels`` are checked to be between 0 and the number of ``names``.
    """
    classes = _class_order(cfg, names)
    if classes == names:
        return None, labels, names
    new_label = np.full(len(names), -1, dtype=np.int64)
    new_label[[names.index(c) for c in classes]] = np.arange(len(classes))
    kept = np.flatnonzero(new_label[labels] >= 0)
    return kept, new_label[labels[kept]], classes


def fashion_mnist_12k(cfg: SourceConfig, channels: int) -> ImageSource:
    with as_file(files("sslzoo.data") / "embedded" / "fashion_mnist_12k.npz") as path, np.load(path) as data:
        images, labels = data[f"{cfg.split}_images"], data[f"{cfg.split}_labels"]
    return _in_memory(cfg, images[:, None], labels, dataset_info(cfg.dataset).class_names)


def fashion_mnist(cfg: SourceConfig, channels: int) -> ImageSource:
    prefix = {"train": "train", "test": "t10k"}[cfg.split]

    def read(name: str) -> NDArray[np.uint8]:
        places = ("", "FashionMNIST/raw/", "raw/")
        return read_idx(_found(cfg, *(f"{p}{prefix}-{name}-ubyte{z}" for p in places for z in ("", ".gz"))))

    return _in_memory(
        cfg, read("images-idx3")[:, None], read("labels-idx1"), dataset_info(cfg.dataset).class_names
    )


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only numpy arrays, because a pickle could otherwise execute any code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module, name) in allowed or (name == "_reconstruct" and module.endswith("core.multiarray")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"a CIFAR file must contain only arrays, but this one asks for {module}.{name}")


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # of many kinds, whatever the bytes are
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no file of CIFAR; download it again")
    return content


def _cifar_batch(path: Path, label_key: bytes) -> tuple[NDArray[np.uint8], list[int]]:
    """Images (n, 3, 32, 32) and their labels."""
    content = _unpickle(path)
    data, labels = content.get(b"data"), content.get(label_key)
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.shape[1:] != (3072,)
        or not isinstance(labels, list)
        or len(labels) != len(data)
    ):
        raise ValueError(f"{path} does not contain images of 32 px with a label each; download it again")
    return data.reshape(-1, 3, 32, 32), labels


def cifar10(cfg: SourceConfig, channels: int) -> ImageSource:
    return _cifar(cfg, ten=True)


def cifar100(cfg: SourceConfig, channels: int) -> ImageSource:
    return _cifar(cfg, ten=False)


def _cifar(cfg: SourceConfig, *, ten: bool) -> ImageSource:
    folder = "cifar-10-batches-py" if ten else "cifar-100-python"
    parts = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    if cfg.split == "test":
        parts = ["test_batch"] if ten else ["test"]
    label_key, name_key = (b"labels", b"label_names") if ten else (b"fine_labels", b"fine_label_names")
    batches = [_cifar_batch(_found(cfg, f"{folder}/{part}", part), label_key) for part in parts]
    meta = _found(cfg, *(f"{place}{'batches.meta' if ten else 'meta'}" for place in (f"{folder}/", "")))
    try:
        names = tuple(name.decode() for name in _unpickle(meta)[name_key])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{meta} does not contain the names of the classes; download it again") from error
    images = np.concatenate([images for images, _ in batches])
    return _in_memory(cfg, images, np.concatenate([labels for _, labels in batches]), names)


def stl10(cfg: SourceConfig, channels: int) -> ImageSource:
    def read(part: str) -> NDArray[np.uint8]:
        path = _found(cfg, f"stl10_binary/{part}_X.bin", f"{part}_X.bin")
        if path.stat().st_size == 0 or path.stat().st_size % (3 * 96 * 96):
            raise ValueError(f"{path} is truncated; download it again")
        # Memory-mapped, because the unlabelled part has 2.8 GB. Images are stored column by column.
        return np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)

    if cfg.split == "train+unlabeled":
        return _in_memory(cfg, JoinedImages(read("train"), read("unlabeled")), None, ())
    if cfg.split == "unlabeled":
        return _in_memory(cfg, read("unlabeled"), None, ())
    labels = np.fromfile(_found(cfg, f"stl10_binary/{cfg.split}_y.bin", f"{cfg.split}_y.bin"), np.uint8)
    return _in_memory(
        cfg, read(cfg.split), labels.astype(np.int64) - 1, dataset_info(cfg.dataset).class_names
    )


def _from_class_folders(cfg: SourceConfig, folder: Path, channels: int, subfolder: str = "") -> ImageSource:
    """Images with one folder per class; labels follow the sorted folder names, or the order of ``classes``."""
    if is_packed(folder):
        return _from_packed(cfg, folder, channels)
    names = class_folders(folder)
    if not names:
        wrong_layout(cfg, f"{folder} has no class folders")
    kept = _class_order(cfg, names)
    paths, counts = image_files(folder, [f"{name}/{subfolder}" if subfolder else name for name in kept])
    for name, count in zip(kept, counts, strict=True):
        if not count:
            wrong_layout(cfg, f"{legible(folder / name / subfolder)} contains no images")
    labels = np.repeat(np.arange(len(kept), dtype=np.int64), counts)
    return FileSource(cfg.dataset, cfg.split, folder, paths, labels, kept, channels, by_class=True)


def _from_packed(cfg: SourceConfig, folder: Path, channels: int) -> ImageSource:
    """The packed images in ``folder``, in the order in which they would be read from files."""
    records = Records(folder)
    if records.info.labelled == (cfg.dataset == "folder"):
        what = "has" if records.info.labelled else "has no"
        raise ValueError(
            f"{folder} was packed from {records.info.dataset} and {what} labels; use data.dataset=packed"
        )
    stored = records.info.channels
    if stored not in (None, channels):
        raise ValueError(
            f"{folder} holds images of {stored} channel(s) but data.mean and data.std have {channels}; pack it again "
            f"with --channels {channels}, or give {stored} number(s) there and set backbone.in_channels={stored}"
        )
    chosen, labels, names = None, records.labels, records.info.classes
    if labels is not None:
        chosen, labels, names = choose_classes(cfg, labels, names)
        if records.info.by_class and chosen is not None:  # as they would be listed
            order = np.argsort(labels, kind="stable")
            chosen, labels = chosen[order], labels[order]
    kind = PackedPixels if records.info.content == "pixels" else PackedFiles
    return kind(cfg.dataset, cfg.split, channels, records, chosen, labels, names)


def packed(cfg: SourceConfig, channels: int) -> ImageSource:
    try:
        folder = packed_split(Path(cfg.root), cfg.split)
    except ValueError as error:
        wrong_layout(cfg, str(error))
    return open_source(replace(cfg, dataset=read_info(folder).dataset), channels)


def tiny_imagenet(cfg: SourceConfig, channels: int) -> ImageSource:
    if cfg.split == "test" and is_packed(Path(cfg.root) / "val"):
        return _from_packed(cfg, Path(cfg.root) / "val", channels)
    train = _found(cfg, "tiny-imagenet-200/train", "train")
    if cfg.split == "train":
        return _from_class_folders(cfg, train, channels, "images")
    kept = _class_order(cfg, class_folders(train))
    folder = train.parent / "val"
    table = folder / "val_annotations.txt"
    if not table.is_file():
        wrong_layout(cfg, f"there is no {table}")
    try:
        lines = [line.split("\t") for line in table.read_text().splitlines() if line]
        rows = sorted((name, wnid) for name, wnid, *_ in lines if wnid in kept)
    except ValueError as error:  # a line without tab, or bytes that are no text
        raise ValueError(
            f"{table} is damaged: it must have lines of a file's name, a tab and its class; download it again"
        ) from error
    if not rows:
        wrong_layout(cfg, f"{table} names no image of the classes")
    labels = np.array([kept.index(wnid) for _, wnid in rows], dtype=np.int64)
    return FileSource(
        cfg.dataset, cfg.split, folder, [f"images/{name}" for name, _ in rows], labels, kept, channels
    )


def imagenet(cfg: SourceConfig, channels: int) -> ImageSource:
    source = _from_class_folders(cfg, _found(cfg, "train" if cfg.split == "train" else "val"), channels)
    expected = dataset_info(cfg.dataset).num_classes
    chosen = cfg.dataset == "imagenet1k" and cfg.class_names
    if source.num_classes != expected and not chosen:
        raise ValueError(
            f"{cfg.dataset} has {expected} classes, but {source.num_classes} were found or listed; list the folder "
            f"names in data.classes, or use data.dataset=imagefolder"
        )
    return source


def imagefolder(cfg: SourceConfig, channels: int) -> ImageSource:
    return _from_class_folders(cfg, _found(cfg, *split_names(cfg.split)), channels)


def folder(cfg: SourceConfig, channels: int) -> ImageSource:
    root = Path(cfg.root)
    if cfg.class_names:
        raise ValueError(
            "classes cannot be selected in data.dataset=folder: it has no labels; use imagefolder"
        )
    if is_packed(root / cfg.split):
        return _from_packed(cfg, root / cfg.split, channels)
    paths = image_files(root).paths
    if not len(paths):
        refuse_unfinished(root, cfg.split)
        wrong_layout(cfg, f"no file in it ends in {', '.join(sorted(EXTENSIONS))}")
    return FileSource(cfg.dataset, cfg.split, root, paths, None, channels=channels)
