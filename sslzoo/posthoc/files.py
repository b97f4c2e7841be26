"""Files of features for other programs, with labels and ids of the images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sslzoo.checks import require
from sslzoo.files import atomically
from sslzoo.posthoc.store import Stored, write_stored

CHUNK = 8192  # rows copied at a time


def check_format(name: str) -> None:
    """``ValueError`` if a package that the format needs is not installed."""
    require(
        name != "parquet" or find_spec("pyarrow") is not None,
        "--format parquet needs the package pyarrow: pip install 'sslzoo[parquet]', or write safetensors or npy",
    )


def write_features(stored: Stored, stem: Path, form: str, about: Mapping[str, Any]) -> list[Path]:
    """Write the features of one split and layer to files that begin with ``stem``; returns them.

    safetensors: ``x`` (N, F) float32, ``label`` and ``sample_id`` (N,) int64, and ``about`` as metadata. npy: these in
    three files. parquet: a row per image. Raises ``OSError`` if they cannot be written.
    """
    return _WRITERS[form](stored, stem, about)


def _safetensors(stored: Stored, stem: Path, about: Mapping[str, Any]) -> list[Path]:
    path = stem.with_name(f"{stem.name}.safetensors")
    write_stored(path, [stored], {"sslzoo": json.dumps(about)})
    return [path]


def _npy(stored: Stored, stem: Path, about: Mapping[str, Any]) -> list[Path]:
    del about
    paths = []
    for name, ending in (("x", ""), ("label", ".label"), ("sample_id", ".sample_id")):
        path = stem.with_name(f"{stem.name}{ending}.npy")
        with atomically(path) as part, part.open("wb") as file:
            np.save(file, stored.map(name))
        paths.append(path)
    return paths


def _parquet(stored: Stored, stem: Path, about: Mapping[str, Any]) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    x, label, sample_id = (stored.map(name) for name in ("x", "label", "sample_id"))
    schema = pa.schema(
        [("sample_id", pa.int64()), ("label", pa.int64()), ("x", pa.list_(pa.float32(), x.shape[1]))],
        metadata={"sslzoo": json.dumps(about)},
    )
    path = stem.with_name(f"{stem.name}.parquet")
    with atomically(path) as part, pq.ParquetWriter(part, schema) as writer:
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            values = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(x[rows])), x.shape[1])
            writer.write_table(pa.table([sample_id[rows], label[rows], values], schema=schema))
    return [path]


_WRITERS: dict[str, Callable[[Stored, Path, Mapping[str, Any]], list[Path]]] = {
    "safetensors": _safetensors,
    "npy": _npy,
    "parquet": _parquet,
}
