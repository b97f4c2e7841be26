"""Checkpoint files: chosen, checked byte by byte, read without running code, and written whole or not at all."""

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
_READER = re.compile("PytorchStreamReader|enforce fail")  # in what torch says of an archive it cannot read
_MAGIC = b"PK\x03\x04"  # of a zip archive, which torch.save writes
_FOLDER = 0x10  # MS-DOS attribute of a record
_CHUNK = 2**20
_KEYS: dict[str, type] = {"state_dict": dict, "optimizer_steps": int}  # what every checkpoint of ours has


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message, one line, says why and what to do."""


class MissingCheckpoint(CheckpointError):
    """There is no such file."""


class DamagedCheckpoint(CheckpointError):
    """The file is not what was once written: cut short, bits flipped, a bad sector."""


class ForeignCheckpoint(CheckpointError):
    """The file is whole, for all one can tell, and sslzoo did not write it."""


class UnsafeCheckpoint(CheckpointError):
    """Loading the file would need code that it names, or more than tensors and plain values."""


# -- choosing one -------------------------------------------------------------------------------


def _number(path: Path) -> int | None:
    match = _STEP_FILE.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in ``folder``, oldest first. Half-written ``.part`` files do not count."""
    found = [(n, p) for p in Path(folder).glob("step=*.ckpt") if (n := _number(p)) is not None]
    return [path for _, path in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, sound or not, or None."""
    return next(reversed(checkpoints(folder)), None)


def newest_sound(folder: Path) -> Path | None:
    """The newest step checkpoint in ``folder`` that is whole, or None where there is none at all.

    Damaged ones before it are skipped, with a warning each; :func:`set_aside` gets them out of the way.

    Raises:
        CheckpointError: all are damaged, or one that had to be looked at is foreign or unsafe.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint:
            damaged.append(path)
            continue
        for worse in damaged:
            log.warning("checkpoint %s is truncated or damaged; taking %s instead", worse, path)
        return path
    if damaged:
        kept = sorted(Path(folder).glob("epoch=*.ckpt"))
        advice = f"try --resume {kept[-1]}" if kept else "start another run with another --out"
        names = ", ".join(path.name for path in damaged)
        raise DamagedCheckpoint(
            f"every step checkpoint in {folder} is truncated or damaged ({names}); {advice}"
        )
    return None


def is_damaged(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that was cut short or changed after it was written."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return isinstance(error, DamagedCheckpoint)
    return False


def set_aside(path: Path) -> Path:
    """Rename the damaged checkpoint ``path`` to ``….ckpt.damaged``, or with a number where that is taken, so
    that nothing takes it for a checkpoint and nobody loses it. Returns the new name; rank 0 only."""
    path = Path(path)
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        aside, count = path.with_name(f"{path.name}.damaged.{count}"), count + 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


# -- reading one --------------------------------------------------------------------------------


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of ``path``, after :func:`verify_checkpoint`, whose errors it raises."""
    path = Path(path)
    verify_checkpoint(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except RuntimeError as error:
        if not _READER.search(str(error)):  # a device that is not there, or full
            raise
        _damaged(path, error)


def verify_checkpoint(path: Path) -> None:
    """Read ``path`` once, a piece at a time, and raise unless it is a whole checkpoint of ours.

    ``torch.load`` ignores the CRC-32 that ``torch.save`` writes for each record: a flipped bit would become a
    weight. ``zipfile`` checks it. Nothing is unpickled before that, and then only tensors and plain types.

    Raises:
        MissingCheckpoint: there is no such file.
        DamagedCheckpoint: it was cut short or changed after it was written; names the one to take instead.
        ForeignCheckpoint: a folder, a file of another kind or of another program.
        UnsafeCheckpoint: its pickle asks for code; named, never imported.
        CheckpointError: it cannot be opened, as where permission is missing.
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
            _foreign(path, "a folder" if path.is_dir() else "no regular file")
        _verify_start(path)
        names = _verify_records(path)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL, None):  # a bad sector; an offset that leads nowhere
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {error.strerror}; repair that and try again"
            ) from error
        _damaged(path, error)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError) as error:
        _damaged(path, error)  # the last three: headers that cannot be true
    files = {name.rpartition("/")[2] for name in names}
    if "data.pkl" not in files or "constants.pkl" in files:
        _foreign(path, "a zip archive of another kind")
    content = _look_inside(path)
    missing = [key for key, kind in _KEYS.items() if not isinstance(content.get(key), kind)]
    if missing:
        _foreign(path, f"written by another program: it has no {' and no '.join(missing)}")


def _verify_start(path: Path) -> None:
    """Tell a damaged archive from a file that never was one."""
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
    # Empty, cut, or zeros: what a power failure leaves of a file whose blocks never reached the disk.
    if _MAGIC.startswith(head.rstrip(b"\0")):
        if head == _MAGIC:
            return
        _damaged(path, "nothing is in it" if not any(head) else "it ends after a few bytes")
    if zipfile.is_zipfile(path):
        _damaged(path, "its first bytes are not those of a checkpoint")
    _foreign(path, "no torch file" if head[:1] != b"\x80" else "a pickle, or a torch file of an old format")


def _verify_records(path: Path) -> list[str]:
    """The names of the archive's records, each of which was read and has the CRC-32 that it should have."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # The CRC-32 covers no attributes, and for a folder torch returns memory that it never filled.
            if record.external_attr & _FOLDER and not record.filename.endswith("/"):
                _damaged(path, f"{record.filename} is marked as a folder")
            with archive.open(record) as stream:
                while stream.read(_CHUNK):
                    pass
        return archive.namelist()


def _look_inside(path: Path) -> dict[Any, Any]:
    """The content with tensors mapped, not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles that are not its own
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if isinstance(error, OSError) or _READER.search(
            str(error)
        ):  # an index that zipfile reads differently
            _damaged(path, error)
        wanted = _asked_for(path)
        names = f"it asks for {', '.join(wanted)}" if wanted else "its pickle is none of torch.save's"
        # Nothing of torch's own words: they advise to switch the protection off.
        raise UnsafeCheckpoint(
            f"{path} is refused: {names}, and a checkpoint of sslzoo holds tensors and plain values only; "
            "give a step=….ckpt file that sslzoo wrote"
        ) from None
    if not isinstance(content, dict):
        _foreign(path, f"written by another program: it holds a {type(content).__name__}")
    return content


def _asked_for(path: Path) -> list[str]:
    """The functions and classes that the pickle in ``path`` names and that torch does not trust."""
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch reads one protocol only
        names = _globals(path)
    # Those that sslzoo's own files name come last, should they be among them.
    ordered = sorted(names, key=lambda name: (name.startswith(("torch.", "collections.")), name))
    shown = ["".join(c if c.isprintable() else "?" for c in name)[:80] for name in ordered]
    return shown[:5] + ["more"] * (len(shown) > 5)


def _globals(path: Path) -> set[str]:
    """Every name in a pickle of any protocol; read, never followed."""
    names: set[str] = set()
    strings: list[str] = []
    memo: list[str | None] = []
    last: str | None = None  # on the stack, if it is a string
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
    own = path.resolve()
    number = _number(own)
    older = [
        p for p in checkpoints(own.parent) if p != own and (number is None or (_number(p) or 0) < number)
    ]
    advice = f"resume from the one before it: --resume {older[-1]}" if older else "no older one is left"
    cause = reason if isinstance(reason, BaseException) else None
    said = (" ".join(str(reason).split()) or type(reason).__name__)[:200]
    raise DamagedCheckpoint(f"checkpoint {path} is truncated or damaged ({said}); {advice}") from cause


def _foreign(path: Path, what: str) -> NoReturn:
    raise ForeignCheckpoint(
        f"{path} is no checkpoint of sslzoo ({what}); give a step=….ckpt file from the checkpoints folder of a run"
    )


# -- writing one --------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _behind(error: BaseException) -> BaseException:
    """What stopped ``torch.save``: closing its unfinished archive it raises an error of its own on top."""
    link: BaseException | None = error
    while isinstance(link, RuntimeError):
        link = link.__context__
    return link if isinstance(link, OSError) or not isinstance(link, Exception | None) else error


class AtomicCheckpointIO(CheckpointIO):
    """Writes ``X.part`` beside ``X``, forces it to disk, and renames it: ``X`` is whole or absent.

    Lightning's own stages the file in ``$TMPDIR``; on another file system its move is a copy, and a
    kill leaves a damaged checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, or leave everything as it was.

        Raises:
            OSError: with the path in it; ``FileNotFoundError`` where the run directory is gone, which is not
                made again: somebody deleted it, or its disk.
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
                    "the run directory is gone, checkpoint not written; start the run anew",
                    str(path),
                ) from raised
            said = f"checkpoint not written: {error.strerror or error}; repair that, then continue with --resume auto"
            raise OSError(error.errno or errno.EIO, said, str(path)) from raised

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As :func:`load_checkpoint`; only tensors and plain types are ever unpickled."""
        return load_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete ``path`` if it is there."""
        Path(path).unlink(missing_ok=True)
