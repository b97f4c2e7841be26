"""Checkpoint files: selection, CRC verification, reading without executing code, atomic writing."""

from __future__ import annotations

import errno
import logging
import os
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins import CheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

log = logging.getLogger(__name__)

_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")
_READER = re.compile("PytorchStreamReader|enforce fail")  # in torch's errors about unreadable archives
_MAGIC = b"PK\x03\x04"  # first bytes of a zip archive, the format of torch.save
_FOLDER = 0x10  # MS-DOS attribute that marks a zip record as a folder
_CHUNK = 2**20
_KEYS: dict[str, type] = {
    "state_dict": dict,
    "optimizer_steps": int,
}  # in every checkpoint that sslzoo writes


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the one-line message says why and what to do."""


class MissingCheckpoint(CheckpointError):
    """The file does not exist."""


class DamagedCheckpoint(CheckpointError):
    """The file changed after it was written: truncated, flipped bits, a bad sector."""


class ForeignCheckpoint(CheckpointError):
    """The file seems intact, but sslzoo did not write it."""


class UnsafeCheckpoint(CheckpointError):
    """Unpickling the file would execute code, or create more than tensors and plain values."""


# -- selecting ----------------------------------------------------------------------------------


def _number(path: Path) -> int | None:
    match = _STEP_FILE.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in ``folder``, oldest first. Unfinished ``.part`` files are ignored."""
    numbered = [(n, p) for p in Path(folder).glob("step=*.ckpt") if (n := _number(p)) is not None]
    return [path for _, path in sorted(numbered)]


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in ``folder``, intact or not; None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def newest_sound(folder: Path) -> Path | None:
    """The newest intact step checkpoint in ``folder``; None if there are no step checkpoints.

    Newer damaged ones are skipped with a warning each; :func:`set_aside` renames them.

    Raises:
        CheckpointError: all are damaged, or one of those checked is foreign or unsafe.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint:
            damaged.append(path)
            continue
        for worse in damaged:
            log.warning("checkpoint %s is truncated or damaged; using %s instead", worse, path)
        return path
    if damaged:
        kept = sorted(Path(folder).glob("epoch=*.ckpt"))
        advice = f"try --resume {kept[-1]}" if kept else "start a new run with a different --out"
        names = ", ".join(path.name for path in damaged)
        raise DamagedCheckpoint(
            f"every step checkpoint in {folder} is truncated or damaged ({names}); {advice}"
        )
    return None


def is_damaged(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that was truncated or changed after it was written."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return isinstance(error, DamagedCheckpoint)
    return False


def set_aside(path: Path) -> Path:
    """Rename the damaged checkpoint ``path`` to ``….ckpt.damaged`` (numbered if that exists), so that it is kept
    but never used as a checkpoint. Returns the new path. Call on rank 0 only."""
    path = Path(path)
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        aside, count = path.with_name(f"{path.name}.damaged.{count}"), count + 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


# -- reading ------------------------------------------------------------------------------------


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of ``path`` after :func:`verify_checkpoint`, whose errors it raises."""
    path = Path(path)
    verify_checkpoint(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except RuntimeError as error:
        if not _READER.search(str(error)):  # such as a missing device, or one out of memory
            raise
        _damaged(path, error)


def verify_checkpoint(path: Path) -> None:
    """Read ``path`` once, in chunks, and raise unless it is an intact checkpoint written by sslzoo.

    ``torch.load`` ignores the CRC-32 that ``torch.save`` writes for each record, so a flipped bit would end up in a
    weight; ``zipfile`` checks it. Unpickling happens only after that, restricted to tensors and plain types.

    Raises:
        MissingCheckpoint: the file does not exist.
        DamagedCheckpoint: it was truncated or changed after it was written; the message names one to use instead.
        ForeignCheckpoint: it is a folder, another kind of file, or was written by another program.
        UnsafeCheckpoint: its pickle refers to code, which is named and never imported.
        CheckpointError: it cannot be opened, for example for lack of permission.
    """
    path = Path(path)
    try:
        if not path.exists():
            newest = latest(path.parent)
            hint = (
                f"the newest in that folder is {newest.name}"
                if newest
                else "give a step=….ckpt file of a run"
            )
            raise MissingCheckpoint(f"there is no checkpoint {path}; {hint}")
        if not path.is_file():
            _foreign(path, "a folder" if path.is_dir() else "not a regular file")
        _verify_start(path)
        names = _verify_records(path)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL, None):  # a bad sector; an invalid offset
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {error.strerror}; fix that and try again"
            ) from error
        _damaged(path, error)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError) as error:
        _damaged(path, error)  # the last three types come from corrupt headers
    files = {name.rpartition("/")[2] for name in names}
    if "data.pkl" not in files or "constants.pkl" in files:
        _foreign(path, "a zip archive of another kind")
    content = _look_inside(path)
    missing = [key for key, kind in _KEYS.items() if not isinstance(content.get(key), kind)]
    if missing:
        _foreign(path, f"written by another program: it has no {' and no '.join(missing)}")


def _verify_start(path: Path) -> None:
    """Distinguish a damaged archive from a file that never was an archive."""
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
    # Empty, truncated, or zeros: a power failure leaves such files if their blocks never reached the disk.
    if _MAGIC.startswith(head.rstrip(b"\0")):
        if head == _MAGIC:
            return
        _damaged(path, "it is empty" if not any(head) else "it ends after a few bytes")
    if zipfile.is_zipfile(path):
        _damaged(path, "its first bytes are not those of a checkpoint")
    _foreign(
        path, "not a torch file" if head[:1] != b"\x80" else "a pickle, or a torch file in an old format"
    )


def _verify_records(path: Path) -> list[str]:
    """Read every record of the archive, which checks its CRC-32, and return the names of the records."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # The CRC-32 does not cover attributes, and for a folder torch would return uninitialised memory.
            if record.external_attr & _FOLDER and not record.filename.endswith("/"):
                _damaged(path, f"{record.filename} is marked as a folder")
            with archive.open(record) as stream:
                while stream.read(_CHUNK):
                    pass
        return archive.namelist()


def _look_inside(path: Path) -> dict[Any, Any]:
    """The content, with tensors memory-mapped instead of read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles from other programs
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if isinstance(error, OSError) or _READER.search(
            str(error)
        ):  # an archive index that zipfile accepts and torch does not
            _damaged(path, error)
        code = _unsafe_names(path)
        reason = f"it asks for {', '.join(code)}" if code else "its pickle was not written by torch.save"
        # Torch's own message is not shown: it advises disabling the protection.
        raise UnsafeCheckpoint(
            f"{path} is refused: {reason}, and an sslzoo checkpoint holds only tensors and plain values; "
            "give a step=….ckpt file that sslzoo wrote"
        ) from None
    if not isinstance(content, dict):
        _foreign(path, f"written by another program: it holds a {type(content).__name__}")
    return content


def _unsafe_names(path: Path) -> list[str]:
    """Functions and classes that the pickle in ``path`` refers to and torch does not trust; at most five are named."""
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch reads only one pickle protocol
        names = _globals(path)
    # Names that sslzoo's own files contain come last.
    ordered = sorted(names, key=lambda name: (name.startswith(("torch.", "collections.")), name))
    shown = ["".join(c if c.isprintable() else "?" for c in name)[:80] for name in ordered]
    return shown[:5] + ["more"] * (len(shown) > 5)


def _globals(path: Path) -> set[str]:
    """All names that a pickle of any protocol refers to, found without importing them."""
    names: set[str] = set()
    strings: list[str] = []
    memo: list[str | None] = []
    last: str | None = None  # top of the stack, if it is a string
    with zipfile.ZipFile(path) as archive, suppress(ValueError, EOFError, IndexError):
        (record,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        for opcode, argument, _ in pickletools.genops(archive.read(record)):
            if opcode.name == "MEMOIZE":
                memo.append(last)
                continue
            last = argument if isinstance(argument, str) else None
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", ".", 1))
                last = None
            elif opcode.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif memo and isinstance(argument, int) and opcode.name in ("BINGET", "LONG_BINGET"):
                last = memo[argument]
            if last is not None:
                strings.append(last)
    return names


def _damaged(path: Path, reason: BaseException | str) -> NoReturn:
    real = path.resolve()
    number = _number(real)
    older = [
        p for p in checkpoints(real.parent) if p != real and (number is None or (_number(p) or 0) < number)
    ]
    advice = f"resume from the one before it: --resume {older[-1]}" if older else "there is no older one"
    cause = reason if isinstance(reason, BaseException) else None
    detail = (" ".join(str(reason).split()) or type(reason).__name__)[:200]
    raise DamagedCheckpoint(f"checkpoint {path} is truncated or damaged ({detail}); {advice}") from cause


def _foreign(path: Path, what: str) -> NoReturn:
    raise ForeignCheckpoint(
        f"{path} is not an sslzoo checkpoint ({what}); give a step=….ckpt file from the checkpoints folder of a run"
    )


# -- writing ------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _behind(error: BaseException) -> BaseException:
    """The original cause of an error from ``torch.save``, which raises another one when it closes the archive."""
    link: BaseException | None = error
    while isinstance(link, RuntimeError):
        link = link.__context__
    return link if isinstance(link, OSError) or not isinstance(link, Exception | None) else error


class AtomicCheckpointIO(CheckpointIO):
    """Writes ``X.part`` beside ``X``, flushes it to disk, and renames it, so that ``X`` is complete or absent.

    Lightning's default writes to ``$TMPDIR`` first. If that is another file system, moving the file is a
    copy, and a kill during the copy leaves a damaged checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; on an error nothing changes.

        Raises:
            OSError: with the path; ``FileNotFoundError`` if the run directory is gone, which is not created
                again because it was deleted on purpose or its disk is gone.
        """
        path = Path(path)
        run, part = path.parent.parent, path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
        except BaseException as raised:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            error = _behind(raised)
            if error is raised and not isinstance(error, OSError):
                raise
            if not isinstance(error, OSError):
                raise error from None
            if not run.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT,
                    "the run directory is gone, checkpoint not written; start the run again",
                    str(path),
                ) from raised
            reason = f"checkpoint not written: {error.strerror or error}; fix that, then continue with --resume auto"
            raise OSError(error.errno or errno.EIO, reason, str(path)) from raised

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Like :func:`load_checkpoint`; ``weights_only`` is ignored, since unpickling is always restricted."""
        return load_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete ``path`` if it exists."""
        Path(path).unlink(missing_ok=True)
