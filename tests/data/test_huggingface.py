"""Data sets saved by Hugging Face's datasets behave as the folder with the same images."""

from __future__ import annotations

import io
import pickle
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslzoo.data.datasets import open_source
from sslzoo.data.pack_writer import PackOptions
from sslzoo.data.sources import ImageSource, UnreadableImageError
from sslzoo.recipe.sections import SourceConfig
from sslzoo.run.pack import pack
from tests.images import CLASSES, assert_equal_to_folder, photos, write_photos

datasets: Any = import_module("datasets")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def picture(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def stored(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def table(
    labels: list[Any] | None = None, kind: Any = None, n: int = 4, **more: tuple[Any, list[Any]]
) -> Any:
    """A Dataset of ``n`` pictures; ``more``: type and values of other columns."""
    columns: dict[str, Any] = {"image": [stored(picture(i)) for i in range(n)]}
    types: dict[str, Any] = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], types["label"] = labels, kind or datasets.ClassLabel(names=list(CLASSES))
    for name, (column_type, values) in more.items():
        columns[name], types[name] = values, column_type
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def opened(root: Path, split: str = "train", **changes: Any) -> ImageSource:
    return open_source(SourceConfig(dataset="huggingface", root=str(root), split=split, **changes))


def refused(root: Path, split: str = "train", **changes: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # its words are compared by the caller
        opened(root, split, **changes)
    return str(error.value)


def test_views_equal_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files, without a network, and with nothing written."""
    folder, root = tmp_path / "folder", tmp_path / "saved"
    write_photos(folder)
    parts = {}
    for split in ("train", "val"):
        found = photos(folder / split)
        features = datasets.Features(
            {
                "photo": datasets.Image(),
                "kind": datasets.ClassLabel(names=list(CLASSES)),
                "x": datasets.Value("string"),
            }
        )
        columns = {
            "photo": [stored(c) for *_, c in found],
            "kind": [k for _, k, _ in found],
            "x": ["a"] * len(found),
        }
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(root, num_shards={"train": 3, "val": 1})
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setattr(socket, "getaddrinfo", None)  # no host has an address
    assert_equal_to_folder(folder, "huggingface", root)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    source = opened(root)
    assert source.class_names == CLASSES and source.where(7) == f"{root}/train: row 7"
    sent = pickle.dumps(source)
    assert len(sent) < 5_000, "the images go with it"
    assert torch.equal(pickle.loads(sent).read(7), source.read(7))
    dogs = opened(root, classes=("dog",))
    assert len(dogs) == 20 and dogs.labels is not None and not dogs.labels.any()
    assert torch.equal(dogs.read(3), source.read(23)) and dogs.where(3).endswith("row 23")
    assert dogs.fingerprint != source.fingerprint
    assert "there is no other/state.json. Expected under data.root=" in refused(root, "other")


def test_one_split_alone(tmp_path: Path) -> None:
    table([0, 1, 1, 0]).save_to_disk(tmp_path)
    source = opened(tmp_path)
    assert len(source) == 4 and source.num_classes == 2
    assert "it holds the split train alone" in refused(tmp_path, "test")
    copy = tmp_path / "again/train"
    table([0, 1, 1, 0]).save_to_disk(copy)
    assert opened(copy.parent).fingerprint == source.fingerprint
    table([0, 1, 1, 0]).select([1, 0, 2, 3]).save_to_disk(tmp_path / "other")
    assert opened(tmp_path / "other").fingerprint != source.fingerprint


def test_rows_are_packed_as_their_images(tmp_path: Path) -> None:
    table([0, 1, 1, 0]).save_to_disk(tmp_path / "saved/validation")
    pack(
        tmp_path / "saved",
        tmp_path / "packed",
        dataset=None,
        splits=(),
        options=PackOptions(raw=True),
        workers=0,
    )
    want = opened(tmp_path / "saved", "test")
    got = open_source(SourceConfig(dataset="packed", root=str(tmp_path / "packed"), split="test"))
    assert got.class_names == CLASSES and got.labels is not None and got.labels.tolist() == [0, 1, 1, 0]
    assert all(torch.equal(got.read(i), want.read(i)) for i in range(4))


def test_labels(tmp_path: Path) -> None:
    numbers = datasets.Value("int32")
    for name, saved in {
        "numbers": table([0, 2, 1, 0], numbers),
        "none": table(),
        "secret": table([-1] * 4),
        "null": table([None] * 4),
        "two": table([1, 0, 1, 0], coarse=(datasets.ClassLabel(names=["a"]), [0] * 4)),
    }.items():
        saved.save_to_disk(tmp_path / name)
    source = opened(tmp_path / "numbers")
    assert source.class_names == ("0", "1", "2")
    assert source.labels is not None and source.labels.tolist() == [0, 2, 1, 0]
    assert all(opened(tmp_path / name).labels is None for name in ("none", "secret", "null"))
    assert opened(tmp_path / "two").class_names == CLASSES
    assert "classes cannot be selected" in refused(tmp_path / "none", classes=("cat",))


def test_unreadable_images_have_a_reason(tmp_path: Path) -> None:
    columns = [stored(picture()), None, stored(b"no image"), stored(b"")]
    datasets.Dataset.from_dict(
        {"image": columns}, features=datasets.Features({"image": datasets.Image(decode=False)})
    ).save_to_disk(tmp_path)
    source = opened(tmp_path)
    assert source.read(0).shape == (3, 30, 20)
    for i, reason in enumerate(("no bytes are stored", "in no known format", "empty"), 1):
        with pytest.raises(UnreadableImageError, match=reason):
            source.read(i)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: table([0, 1, -1, 0]),
            "1 of 4 images have no label, such as row 2; give every image a class, or",
        ),
        (
            lambda: table(["a"] * 4, datasets.Value("string")),
            "label is of type string, not a class; convert it by",
        ),
        (
            lambda: table(other=(datasets.Image(), [None] * 4)).rename_column("image", "first"),
            "has 2 columns of images: first, other; call the one to use image (rename_column('first', 'image')) and",
        ),
        (
            lambda: table(
                fine=(datasets.ClassLabel(names=["a"]), [0] * 4),
                coarse=(datasets.ClassLabel(names=["a"]), [0] * 4),
            ),
            "has 2 columns of labels: fine, coarse; call the one to use label",
        ),
        (lambda: datasets.Dataset.from_dict({"x": [1]}), "has no column of images among x; make one by"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make().save_to_disk(tmp_path / "train")
    said = refused(tmp_path)
    assert message in said and f"{tmp_path}/train" in said


def test_paths_instead_of_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    saved = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column(
        "image", datasets.Image()
    )
    saved.save_to_disk(tmp_path / "images")
    assert opened(tmp_path / "images").read(0).shape == (3, 30, 20)  # saving stores them
    (tmp_path / "a.png").unlink()
    monkeypatch.setattr(datasets.Image, "embed_storage", lambda _, storage, *__, **___: storage)
    monkeypatch.setattr(datasets.Dataset, "_estimate_nbytes", lambda _: 1)
    saved.save_to_disk(tmp_path / "paths")
    assert "has paths of images instead of images" in refused(tmp_path / "paths")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    table([0, 1, 1, 0]).save_to_disk(tmp_path / "train")
    arrow = next((tmp_path / "train").glob("*.arrow"))
    content = arrow.read_bytes()
    for damage in (content[:100], b""):
        arrow.write_bytes(damage)
        assert "train is damaged or incomplete (" in refused(tmp_path)
    arrow.unlink()
    assert "train is damaged or incomplete (" in refused(tmp_path)
    (tmp_path / "train/state.json").write_text("{")
    assert "train is damaged or incomplete (" in refused(tmp_path)


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets: pip install 'sslzoo[huggingface]'" in refused(tmp_path)
