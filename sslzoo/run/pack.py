"""Pack the splits of a data set, and check what was packed."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from rich.filesize import decimal
from rich.progress import MofNCompleteColumn, TaskID
from rich.table import Column
from rich.text import Text

from sslzoo.checks import require
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import legible
from sslzoo.data.huggingface import saved_splits
from sslzoo.data.listing import class_folders, has_images
from sslzoo.data.pack_writer import Packable, PackOptions, Written, write_split
from sslzoo.data.packed import IMAGES, Records
from sslzoo.data.tar_shards import shard_splits
from sslzoo.exits import LEAVE_SIGNALS, Preempted
from sslzoo.processes.departure import end_workers
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.class_lists import CLASS_LISTS
from sslzoo.recipe.packed_info import FILE, PARTIAL, is_packed, split_names
from sslzoo.recipe.sections import DataConfig, SourceConfig
from sslzoo.terminal import ERR, OUT, REFRESH, Bars, duration, redraws

PACKABLE = (
    "imagefolder",
    "folder",
    "imagenet1k",
    "imagenet100",
    "tiny_imagenet",
    "webdataset",
    "huggingface",
)
LINE_EVERY = 60.0  # seconds between lines of progress without a terminal
_WNID = re.compile(r"n\d{8}")
_SPLITS = ("train", "val", "test")  # folders by which a layout is guessed


def pack(
    source: Path,
    dest: Path,
    *,
    dataset: str | None,
    splits: Sequence[str],
    options: PackOptions,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    workers: int,
) -> None:
    """Pack the images of ``source``, of a data set that is named or guessed, into ``dest``: ``splits``, or all found.

    Says on the screen what is done. Raises what :func:`write_split` raises, and ``Preempted`` on a signal; the same
    call then continues.
    """
    require(source.is_dir(), f"{source} is not a folder")
    existing = next(path for path in (dest, *dest.absolute().parents) if path.exists())
    require(existing.is_dir(), f"{existing} is not a folder; choose another DST")
    require(
        not dest.resolve().is_relative_to(source.resolve()),
        f"{dest} lies in {source}, whose images are to be packed; choose a place outside",
    )
    require(not any(map(is_packed, source.iterdir())), f"{source} is packed already")
    name = dataset or guess(source)
    require(name in PACKABLE, f"--dataset must be one of {', '.join(PACKABLE)}, got {name!r}")
    found = splits or splits_in(source, name)
    require(
        bool(found),
        f"{source} has no folder of a split, such as train: {dataset_info(name).layout} is expected",
    )
    classless = dataset is None and name == "folder" and class_folders(source)
    note = f" (no labels; for labels {_for_labels(source)})" if classless else ""
    _say(f"{source}: {name}{note}, split{'s' * (len(found) > 1)} {', '.join(found)}")
    unreadable: list[tuple[Path, Written]] = []
    with _signals():
        # All of them before the first is written: a mistake in the last would be found late.
        for split, images in [(split, _opened(source, name, split, options.channels)) for split in found]:
            own_folder = name != "folder" and images.root.name in split_names(split)
            folder = dest / (images.root.name if own_folder else split)
            with _Progress(split, len(images)) as progress:
                written = write_split(
                    images,
                    folder,
                    options,
                    max_bad_fraction=max_bad_fraction,
                    workers=workers,
                    report=progress.report,
                )
            _say(_summary(folder, written, progress.seconds))
            unreadable += [(folder, written)] if written.unreadable else []
    for folder, written in unreadable:
        _say(
            f"{folder}: {written.unreadable:,} of {written.images:,} images cannot be read; training will put others "
            "in their place:"
        )
        for reason in written.reasons:
            _say(f"  {reason}")
        if written.unreadable > len(written.reasons):
            _say(f"  and {written.unreadable - len(written.reasons):,} more")
    _say(f"use it by: data.dataset=packed data.root={dest}")


def _for_labels(source: Path) -> str:
    """How the classes of ``source``, a folder of class folders, are found."""
    path = source.absolute()
    if path.name in _SPLITS:
        return f"give {source.parent if source.name and source.parent.name else path.parent}"
    return "put the class folders into a folder train"


def _opened(source: Path, dataset: str, split: str, channels: int) -> Packable:
    classes = dataset_info(dataset).class_list or ()
    images = open_source(
        SourceConfig(dataset=dataset, root=str(source), split=split, classes=classes), channels
    )
    assert isinstance(images, Packable)
    return images


def guess(source: Path) -> str:
    """The data set in ``source``, from its layout."""
    if any((source / place / "val/val_annotations.txt").is_file() for place in ("", "tiny-imagenet-200")):
        return "tiny_imagenet"
    splits = [name for name in _SPLITS if (source / name).is_dir()]
    classes = class_folders(source / splits[0]) if splits else ()
    if not classes:
        return "huggingface" if saved_splits(source) else "webdataset" if shard_splits(source) else "folder"
    if set(classes) == set(CLASS_LISTS[dataset_info("imagenet100").class_list].names):
        return "imagenet100"
    expected = dataset_info("imagenet1k").num_classes
    return "imagenet1k" if len(classes) == expected and all(map(_WNID.fullmatch, classes)) else "imagefolder"


def splits_in(source: Path, dataset: str) -> tuple[str, ...]:
    """The splits of ``dataset`` whose images are in ``source``."""
    if dataset == "folder":
        return ("train",)
    if dataset == "webdataset":
        return shard_splits(source)
    if dataset == "huggingface":
        return saved_splits(source)
    if dataset == "imagefolder":
        names = sorted(class_folders(source), key=lambda name: (name != "train", name))
        return tuple(name for name in names if name[0] != "." and _has_classes(source / name))
    inside = source / "tiny-imagenet-200" if (source / "tiny-imagenet-200").is_dir() else source
    return tuple(
        split
        for split in dataset_info(dataset).splits
        if (inside / {"test": "val"}.get(split, split)).is_dir()
    )


def _has_classes(folder: Path) -> bool:
    return any(has_images(folder / name) for name in class_folders(folder))


def verify(dest: Path) -> bool:
    """Read everything in the packed data ``dest``, or in one split of it, and compare checksums; returns whether all is
    as it was written."""
    found = [dest] if is_packed(dest) else sorted(dest.glob("*"))
    found = [path for path in found if (path / FILE).exists() or (path / IMAGES).exists()]
    folders = [path for path in found if not path.name.endswith(PARTIAL)]
    for path in found:
        if path not in folders:
            _say(f"{path}: not finished, not checked; the command that began it continues")
    require(
        bool(folders), f"{dest} holds no packed data; it has a folder for each split, with packed.json in it"
    )
    fine = [folder for folder in folders if _verify_split(folder)]
    return fine == folders


def _verify_split(folder: Path) -> bool:
    damaged = []
    try:
        records = Records(folder)
    except ValueError as error:
        _say(str(error))
        return False
    with _Progress(folder.name, len(records)) as progress:
        size = 0
        for i, problem in enumerate(records.damaged()):
            damaged += [problem] if problem else []
            size += int(records.index["length"][i])
            progress.report(i + 1, size)
    took = f"read in {duration(progress.seconds)}"
    if not damaged:
        _say(f"{folder}: {len(records):,} images as they were written; {took}")
        return True
    _say(f"{folder}: {len(damaged):,} of {len(records):,} images are damaged; {took}")
    for name in damaged:
        _say(f"  {name}")
    options = f" with {records.info.options}" if records.info.options else ""
    _say(f"  delete {folder} and pack it again, from {records.info.source}{options}")
    return False


@contextmanager
def _signals() -> Iterator[None]:
    """Raise ``Preempted`` on a signal that asks to stop, unless it is ignored, as SIGHUP is under nohup."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Preempted(signal.Signals(number).name)

    previous = {
        n: signal.signal(n, leave) for n in LEAVE_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        end_workers()


class _Progress:
    """Images done, their rate and the time left: a bar in a terminal, otherwise a line each minute."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._bars = (
            Bars(MofNCompleteColumn(table_column=Column(no_wrap=True)), console=ERR) if redraws(ERR) else None
        )
        self._row = TaskID(0)
        self._began = self._shown = time.perf_counter()
        self._first: tuple[float, int, int] | None = None  # time, images and bytes of the first report

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    def __enter__(self) -> Self:
        """Open the bar."""
        if self._bars is not None:
            self._row = self._bars.add_task(self._title, total=self._total, text="")
            self._bars.start()
        return self

    def report(self, done: int, size: int) -> None:
        """``done`` images are finished, and ``size`` bytes were read or written."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, done, size
        began, before, read = self._first
        if now == began or now - self._shown < (LINE_EVERY if self._bars is None else REFRESH):
            return
        self._shown = now
        rate, speed = ((x - y) / (now - began) for x, y in ((done, before), (size, read)))
        left = f", {duration((self._total - done) / rate)} left" if rate else ""
        text = f"{rate:,.0f} images/s, {speed / 1e6:,.0f} MB/s{left}"
        if self._bars is None:
            _say(f"{self._title}: {done:,} of {self._total:,} images, {text}")
        else:
            self._bars.show(self._row, completed=done, text=text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar, after filling it unless there was an error."""
        if self._bars is not None:
            if kind is None:
                self._bars.show(self._row, completed=self._total, text=f"done in {duration(self.seconds)}")
            self._bars.stop()


def _summary(folder: Path, written: Written, seconds: float) -> str:
    text = f"{folder}: {written.images:,} images, {decimal(written.size)}"
    if written.before == written.images:
        return f"{text}; was packed already"
    text += f" ({written.added / max(written.read, 1):.2f} of the files' size)"
    if written.before:
        text += f"; {written.before:,} of them were there"
    return (
        f"{text}; {duration(seconds)}, {(written.images - written.before) / max(seconds, 1e-9):,.0f} images/s"
    )


def _say(text: str) -> None:
    OUT.print(Text(legible(text)), soft_wrap=True)
