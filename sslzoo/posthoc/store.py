"""Features of plain images on disk: extracted once, then read by every evaluation of the same weights and data.

Extraction is cut into shards of ``SHARD`` samples, which the ranks share out; a shard is written as soon as it is done,
so that a killed extraction continues with the missing ones. Rank 0 then joins them to one safetensors file, of which
any number of ranks can read contiguous parts. Shards and batches do not depend on the number of ranks, hence neither do
the features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslzoo.data.disk import DataError
from sslzoo.distributed import all_reduce_sum, broadcast_from_zero, rank, world_size
from sslzoo.evaluate.extract import on_device
from sslzoo.evaluate.progress import Report
from sslzoo.evaluate.task import Features
from sslzoo.exits import RunError
from sslzoo.files import atomically

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet, SSLDataModule
    from sslzoo.posthoc.target import Target

log = logging.getLogger(__name__)

SHARD = 1024  # samples
# Bytes of a rank's part of a split that are read into memory. Of more, pages are read from disk when needed.
IN_MEMORY = 2 * 2**30
SUFFIX = ".safetensors"
KEY = "sslzoo_features"  # of the metadata of a joined file
_TYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


class FeatureStore:
    """The features in ``folder``. Methods are collective, except :meth:`trim` and :meth:`size`."""

    def __init__(self, folder: Path, *, keep: float) -> None:
        """``keep``: the number of bytes that :meth:`trim` leaves."""
        self.folder, self.keep = folder, keep

    def paths(self, target: Target, data: SSLDataModule, index: int) -> dict[str, Path]:
        """The file of each layer's features of the ``index``-th of ``data.eval_sets()``; it may not exist yet."""
        return {layer: self.folder / _file_name(target, layer, data, index) for layer in target.layers}

    def fill(
        self,
        target: Target,
        data: SSLDataModule,
        device: torch.device,
        stage: Callable[[str], Report],
    ) -> int:
        """Extract what is missing or damaged of all layers of ``target``, on all labelled data sets; returns the number
        of splits of which something was. ``stage`` starts a stage of the progress display for each of them, and returns
        the function that reports its progress.

        Raises ``DataError`` if too many images are unreadable, ``RunError`` if another process extracts into the same
        folder, and ``OSError`` if it cannot be written.
        """
        extracted = 0
        with self._locked():
            for index, eval_set in enumerate(data.eval_sets()):
                paths = self.paths(target, data, index)
                missing = {layer: path for layer, path in paths.items() if not _is_sound(path, device)}
                if missing:
                    where = f"{eval_set.name or eval_set.source.name}, {eval_set.split}"
                    report = stage(f"{where}: extracting features")
                    _extract(target, data, index, missing, device, report)
                    extracted += 1
                _check_readable(next(iter(paths.values())), eval_set, data.data.max_bad_fraction)
        return extracted

    def read(self, path: Path, device: torch.device) -> Features:
        """This rank's contiguous part of the features in ``path``, as :class:`Features` whose computations run on
        ``device``. Up to ``IN_MEMORY`` bytes are read there, more are memory-mapped."""
        stored = read_stored(path)
        n = stored.shapes["x"][0]
        part = slice(rank() * n // world_size(), (rank() + 1) * n // world_size())
        mapped = {name: stored.map(name)[part] for name in stored.shapes}
        x = torch.from_numpy(mapped["x"])
        if x.numel() * x.element_size() <= IN_MEMORY:
            x = x.clone().to(device)
        label, sample_id = (
            torch.from_numpy(np.array(mapped[name])).to(device) for name in ("label", "sample_id")
        )
        if rank() == 0:
            os.utime(path)
        return Features(x, label, sample_id)

    def trim(self) -> int:
        """Delete the features that were not used for the longest time until at most ``keep`` bytes are left, unless
        another evaluation extracts into the folder; returns the number of bytes deleted. Rank 0 only."""
        total = deleted = 0
        if self.folder.is_dir():
            with suppress(RunError), self._locked():
                for entry in sorted(_entries(self.folder), key=lambda path: -path.stat().st_mtime):
                    size = _bytes_of(entry)
                    total += size
                    if total > self.keep:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                        deleted += size
                if not _entries(self.folder):
                    shutil.rmtree(self.folder)
        return deleted

    def size(self) -> int:
        """Bytes on disk."""
        return sum(map(_bytes_of, _entries(self.folder))) if self.folder.is_dir() else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if rank() > 0:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise RunError(
                f"another evaluation writes to {self.folder}; wait for it, or give --out"
            ) from None


def _entries(folder: Path) -> list[Path]:
    """Files of features, and folders of unfinished extractions."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _bytes_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def _file_name(target: Target, layer: str, data: SSLDataModule, index: int) -> str:
    """A name that is different for other weights, images, samples of these, or preprocessing."""
    s = data.eval_sets()[index]
    what = {
        "weights": target.fingerprints[layer],
        "backbone": repr(target.recipe.backbone),
        "images": s.source.fingerprint,
        "samples": hashlib.sha256(s.sample_id.numpy().tobytes()).hexdigest(),
        "transform": [repr(data.plain), list(data.data.mean), list(data.data.std)],
    }
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    return f"{layer}-{s.name.rpartition(':')[2] or 'data'}-{s.split}-{digest}{SUFFIX}"


def _check_readable(path: Path, eval_set: EvalSet, max_bad_fraction: float) -> None:
    readable, _ = read_stored(path).shapes["x"]
    bad = eval_set.size - readable
    if bad > max_bad_fraction * len(eval_set.source):
        raise DataError(
            f"{bad} of {eval_set.size} images of {eval_set.source.name} could not be read, more than "
            f"data.max_bad_fraction={max_bad_fraction} allows; repair or remove them and delete {path}, or raise "
            "data.max_bad_fraction"
        )


# -- extracting -----------------------------------------------------------------------------------


def _extract(
    target: Target,
    data: SSLDataModule,
    index: int,
    paths: Mapping[str, Path],
    device: torch.device,
    report: Report,
) -> None:
    """Extract the missing shards of the layers in ``paths``, and join all to the files there."""
    sample_id = data.eval_sets()[index].sample_id
    shards = sample_id.split(SHARD)
    if rank() == 0:
        for path in paths.values():
            _folder_of(path).mkdir(exist_ok=True)
    missing = torch.zeros(len(shards), dtype=torch.int64, device=device)
    if rank() == 0:
        for k in range(len(shards)):
            missing[k] = not all(_is_sound_shard(_shard(path, k)) for path in paths.values())
    mine = broadcast_from_zero(missing).nonzero()[:, 0].tolist()[rank() :: world_size()]
    for done, _ in enumerate(_extract_shards(target, data, index, mine, paths, device), 1):
        report(done / len(mine))
    _wait(device)
    if rank() == 0:
        for path in paths.values():
            _join([_shard(path, k) for k in range(len(shards))], path)
            shutil.rmtree(_folder_of(path))
    _wait(device)


@torch.inference_mode()
def _extract_shards(
    target: Target,
    data: SSLDataModule,
    index: int,
    mine: Sequence[int],
    paths: Mapping[str, Path],
    device: torch.device,
) -> Iterator[int]:
    """Compute and write the shards ``mine`` of this rank; yields each when it is on disk."""
    if not mine:
        return
    shards = data.eval_sets()[index].sample_id.split(SHARD)
    batches = {k: [batch.tolist() for batch in shards[k].split(data.eval.batch_size)] for k in mine}
    loader = data.eval_loader(
        data.eval_sets()[index], [batch for of_shard in batches.values() for batch in of_shard]
    )
    read = on_device(loader, data, device, index)
    for k, of_shard in batches.items():
        features: dict[str, list[Tensor]] = {layer: [] for layer in paths}
        labels, ids = [], []
        for _ in of_shard:
            batch = next(read)
            if len(batch.sample_id) == 0:  # all unreadable
                continue
            computed = target.features(batch.image)
            for layer, parts in features.items():
                parts.append(computed[layer].float().cpu())
            assert batch.label is not None
            labels.append(batch.label.cpu())
            ids.append(batch.sample_id.cpu())
        none = torch.zeros(0, dtype=torch.int64)
        for layer, path in paths.items():
            arrays = {
                "x": torch.cat(features[layer]) if labels else torch.zeros(0, 0),
                "label": torch.cat([none, *labels]),
                "sample_id": torch.cat([none, *ids]),
            }
            with atomically(_shard(path, k)) as part:
                save_file(
                    arrays, part, {"crc32": str(_checksum(arrays["label"], arrays["sample_id"], arrays["x"]))}
                )
        yield k


def _folder_of(path: Path) -> Path:
    return path.with_suffix("")


def _shard(path: Path, k: int) -> Path:
    return _folder_of(path) / f"{k:06d}{SUFFIX}"


def _wait(device: torch.device) -> None:
    """Wait for all ranks."""
    all_reduce_sum(torch.zeros(1, device=device)).item()


def _checksum(*arrays: Any) -> int:
    """CRC-32 of arrays or tensors, one after the other."""
    crc = 0
    for array in arrays:
        values = np.ascontiguousarray(array)
        crc = zlib.crc32(values.view(np.uint8).reshape(-1).data if values.size else b"", crc)
    return crc


def _is_sound_shard(path: Path) -> bool:
    try:
        arrays = load_file(path)
        stored = read_stored(path)
        return stored.metadata["crc32"] == str(_checksum(arrays["label"], arrays["sample_id"], arrays["x"]))
    except (OSError, SafetensorError, ValueError, KeyError):
        return False


# -- joined files -----------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Features on disk: where the arrays of a safetensors file are."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    starts: dict[str, int]  # bytes from the start of the file
    types: dict[str, np.dtype[Any]]

    def map(self, name: str) -> np.ndarray[Any, Any]:
        """The array, whose pages are read from disk when needed; changes stay in memory."""
        if math.prod(self.shapes[name]) == 0:
            return np.zeros(self.shapes[name], self.types[name])
        return np.memmap(self.path, self.types[name], "c", self.starts[name], self.shapes[name])


def read_stored(path: Path) -> Stored:
    """Read the header of ``path``; ``ValueError`` if it is damaged or the file is too short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length < size:
                raise ValueError("no header")
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", {})
        starts = {name: 8 + length + of["data_offsets"][0] for name, of in content.items()}
        if size != 8 + length + max(of["data_offsets"][1] for of in content.values()):
            raise ValueError("truncated")
        shapes = {name: tuple(of["shape"]) for name, of in content.items()}
        types = {name: _TYPES[of["dtype"]] for name, of in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return Stored(path, shapes, metadata, starts, types)


def write_stored(path: Path, parts: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """Write the rows of ``parts``, one after the other, to the single file ``path``, atomically."""
    n = sum(part.shapes["x"][0] for part in parts)
    width = max(part.shapes["x"][1] for part in parts)
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, kind, shape in (("label", "I64", [n]), ("sample_id", "I64", [n]), ("x", "F32", [n, width])):
        end = start + math.prod(shape) * _TYPES[kind].itemsize
        content[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with atomically(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ("label", "sample_id", "x"):
            for part in parts:
                file.write(np.ascontiguousarray(part.map(name)).data)
        file.flush()
        os.fsync(file.fileno())


def _join(shards: Sequence[Path], path: Path) -> None:
    """Write the rows of ``shards`` to the single file ``path``, with their checksums."""
    parts = [read_stored(shard) for shard in shards]
    blocks = [[part.shapes["x"][0], int(part.metadata["crc32"])] for part in parts]
    write_stored(path, parts, {KEY: json.dumps({"blocks": blocks})})


def _is_sound(path: Path, device: torch.device) -> bool:
    """Whether ``path`` exists and its checksums are right; the ranks share the checking, and rank 0 deletes a damaged
    file. Collective."""
    exists = torch.tensor([path.is_file() if rank() == 0 else False], dtype=torch.int64, device=device)
    if not broadcast_from_zero(exists).item():
        return False
    wrong = torch.tensor([not _has_right_checksums(path)], dtype=torch.int64, device=device)
    if all_reduce_sum(wrong).item() == 0:
        return True
    if rank() == 0:
        log.warning("%s is damaged; its features are extracted again", path)
        path.unlink()
    return False


def _has_right_checksums(path: Path) -> bool:
    """Whether this rank's share of the blocks in ``path`` has the right checksums."""
    try:
        stored = read_stored(path)
        blocks = json.loads(stored.metadata[KEY])["blocks"]
        arrays = [stored.map(name) for name in ("label", "sample_id", "x")]
        if sum(count for count, _ in blocks) != stored.shapes["x"][0]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    start = 0
    for k, (count, crc) in enumerate(blocks):
        part = slice(start, start + count)
        if k % world_size() == rank() and _checksum(*(array[part] for array in arrays)) != crc:
            return False
        start += count
    return True
