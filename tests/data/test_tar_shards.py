"""Tar shards behave as the folder with the same images, and what is wrong with them is named."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sslzoo.data import kept, tar_shards
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import DataError
from sslzoo.data.sources import ImageSource, UnreadableImageError
from sslzoo.recipe.sections import SourceConfig
from tests.images import assert_equal_to_folder, data_module, photos, write_photos

Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def picture(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def labelled(*labels: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of images with these labels."""
    return [
        member
        for i, label in enumerate(labels, start)
        for member in ((f"{i:04}.cls", str(label).encode()), (f"{i:04}.png", picture(i)))
    ]


def opened(root: Path, split: str = "train", **changes: Any) -> ImageSource:
    return open_source(SourceConfig(dataset="webdataset", root=str(root), split=split, **changes))


def test_views_equal_the_folders(tmp_path: Path) -> None:
    """In five shards of three formats, with labels in files of their own or in the descriptions."""
    folder, root = tmp_path / "folder", tmp_path / "shards"
    write_photos(folder)
    for split in ("train", "val"):
        found = photos(folder / split)
        for k in range(5):
            members = []
            for name, label, content in found[k * len(found) // 5 : (k + 1) * len(found) // 5]:
                stem = name.partition(".")[0]
                own = (f"{stem}.cls", f"{label}\n".encode())
                described = (f"{stem}.json", json.dumps({"label": label, "width": 3}).encode())
                members += [own if k % 2 else described, (name, content), (f"{stem}.txt", b"a caption")]
            form = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)[k % 3]
            write_tar(root / split / f"{k:03}.tar", members, form)
    (root / "classes.txt").write_text("cat\ndog\n")
    assert_equal_to_folder(folder, "webdataset", root)
    assert opened(root).class_names == ("cat", "dog")
    assert opened(root).where(39) == f"{root}/train/004.tar: dog/19.png"
    dogs = opened(root, classes=("dog",))
    assert len(dogs) == 20 and dogs.labels is not None and not dogs.labels.any()
    assert torch.equal(dogs.read(3), opened(root).read(23))


def test_shards_of_several_splits_in_one_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "in1k-train-0001.tar", labelled(2, 0, start=2))
    write_tar(tmp_path / "in1k-train-0000.tar", labelled(1, 1))
    write_tar(tmp_path / "in1k-validation-00.tar", labelled(2))
    write_tar(tmp_path / "in1k-retrain-0000.tar", labelled(1, 1))
    for suffix in ("md5", "sha256", "idx", "part"):
        (tmp_path / f"in1k-train-0000.tar.{suffix}").touch()
        (tmp_path / f"in1k-train-0000.tar.gz.{suffix}").touch()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/readme.txt").touch()
    (tmp_path / "in1k-train-folder").mkdir()
    assert tar_shards.shard_splits(tmp_path) == ("train", "validation")
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert train.labels is not None and train.labels.tolist() == [1, 1, 2, 0] and len(test) == 1
    assert train.class_names == test.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"no tar files of the split other\. Expected under .*KEY\.cls"):
        opened(tmp_path, "other")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_tar(tmp_path / f"train/{name}.tar", [(f"{name}.png", picture()), (f"{name}.cls", b"0")])
    source = opened(tmp_path)
    assert source.read(0).shape == (3, 30, 20) and len(source.fingerprint) > 0
    assert source.where(0) == rf"{tmp_path}/train/caf\xe9.tar: caf\xe9.png"


def test_the_same_images_in_other_shards_are_the_same_samples(tmp_path: Path) -> None:
    members = labelled(0, 1, 1, 0)
    write_tar(tmp_path / "a/train/0.tar", members)
    write_tar(tmp_path / "b/train/x.tar", members[:4])
    write_tar(tmp_path / "b/train/y.tar", members[4:])
    write_tar(tmp_path / "c/train/0.tar", members[4:] + members[:4])
    first, again, other = (opened(tmp_path / name).fingerprint for name in "abc")
    assert first == again != other


def test_a_slow_disk_is_asked_for_several_shards_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(5):
        write_tar(tmp_path / f"train/{k}.tar", labelled(k, start=k))
    alone = opened(tmp_path)
    original, met = tar_shards._index_shard, threading.Barrier(4, timeout=20)

    def slow(path: Path) -> Any:
        if path.name == "0.tar":
            time.sleep(0.1)
        else:
            met.wait()  # until four threads are here
        return original(path)

    monkeypatch.setattr(tar_shards, "_index_shard", slow)
    together = opened(tmp_path)
    assert together.fingerprint == alone.fingerprint and together.where(4) == alone.where(4)


def test_images_without_labels(tmp_path: Path) -> None:
    members = [
        ("a.jpg", picture(1)),
        ("a.json", b'{"caption": "x", "label": ["cat", "dog"]}'),
        ("b.txt", b""),
        ("._c.png", b""),
    ]
    write_tar(
        tmp_path / "train/0.tar", [*members, ("__MACOSX/d.png", b""), ("e/f.seg.png", b""), ("e/f.webp", b"")]
    )
    source = opened(tmp_path)
    assert source.labels is None and len(source) == 2 and source.where(1).endswith("0.tar: e/f.webp")
    with pytest.raises(ValueError, match="classes cannot be selected"):
        opened(tmp_path, classes=("a",))
    with pytest.raises(UnreadableImageError, match="empty"):
        source.read(1)


def test_unreadable_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = labelled(*[0, 1] * 20)
    members[5] = (members[5][0], members[5][1][:40])
    shard = write_tar(tmp_path / "train/0.tar", members)
    module = data_module("webdataset", tmp_path, bad=0.05)

    def train() -> None:
        for raw in module.train_dataloader():
            module.finish(raw)

    with caplog.at_level(logging.WARNING, "sslzoo"):
        train()
    assert module.unreadable == 1 and f"unreadable image: {shard}: 0002.png (" in caplog.text
    size = shard.stat().st_size
    with shard.open("r+b") as file:  # what a full disk leaves of a copy
        file.truncate(size // 2)
    with pytest.raises(UnreadableImageError, match="the file has ended after 0 of its"):
        module.train_source.read(39)
    with pytest.raises(DataError, match="cannot be read"):
        train()


# -- the kept index ----------------------------------------------------------------------------------------


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "WORTH_KEEPING", 3)
    read: list[str] = []
    original = tar_shards._index_shard
    monkeypatch.setattr(tar_shards, "_index_shard", lambda path: (read.append(path.name), original(path))[1])
    folder = tmp_path / "train"

    def age(changed: int = 1_000_000_000) -> None:  # seconds
        for path in (*folder.iterdir(), folder):
            os.utime(path, (changed, changed))

    write_tar(folder / "0.tar", labelled(0, 1))
    write_tar(folder / "1.tar", labelled(1, start=2))
    age()
    first = opened(tmp_path)
    assert sorted(read) == ["0.tar", "1.tar"]
    assert [path.name.split(".")[-2:] for path in tmp_path.iterdir() if path.is_file()] == [["index", "npz"]]
    again = opened(tmp_path)
    assert len(read) == 2 and again.fingerprint == first.fingerprint and again.where(2) == first.where(2)
    assert torch.equal(again.read(2), first.read(2))

    write_tar(folder / "1.tar", labelled(1, 0, start=2))
    age(1_000_000_001)
    assert len(opened(tmp_path)) == 4 and len(read) == 4
    write_tar(folder / "2.tar", labelled(1, start=4))
    assert len(opened(tmp_path)) == 5 and len(read) == 7
    now = time.time()
    monkeypatch.setattr(kept.time, "time", lambda: now + 2 * kept.UNCERTAIN)  # it had just changed
    opened(tmp_path)
    assert len(read) == 10
    opened(tmp_path)
    assert len(read) == 10


# -- mistakes ----------------------------------------------------------------------------------------------


def refused(root: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # its words are compared by the caller
        opened(root, **changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [*labelled(0), ("0001.png", b"")],
            "1 of 2 images have no label, such as 0001.png in ROOT/train/0.tar; give",
        ),
        (
            [*labelled(0), ("0000.jpg", b"")],
            "two images have the key 0000: 0000.png and 0000.jpg; give each its own",
        ),
        (
            [*labelled(0), ("0000.png", b"")],
            "two images have the key 0000: 0000.png and 0000.png; give each its own",
        ),
        ([*labelled(0), ("0000.cls", b"1")], "there are two of 0000.cls; keep one"),
        ([*labelled(0), ("a/b.cls", b"1")], "a/b.cls has no image; add a/b.jpg or remove it"),
        *(
            (
                [("a.png", b""), ("a.cls", label)],
                f'0.tar: a.cls must be the number of a class, 0 to 1,000,000, or its name, but is "{label.decode()}"',
            )
            for label in (b"", b"-1", b"2.5", b"nan", b"3000000")
        ),
        ([("a.png", b""), ("a.cls", b"\xff")], "0.tar: a.cls is no text in UTF-8 (invalid start byte)"),
        ([("a.png", b""), ("a.json", b'{"label": ')], "a.json is no JSON ("),
        *(
            (
                [("a.png", b""), ("a.json", b'{"label": %s}' % label)],
                '0.tar: "label" in a.json must be the number of a class, 0 to 1,000,000, or its name, but is '
                + label.decode(),
            )
            for label in (
                b"3000000",
                b"-1",
                b'"-1"',
                b"2.5",
                b'"2.5"',
                b"true",
                b'" "',
                rb'"a\nb"',
                rb'"\ud800"',
            )
        ),
        *(
            (
                [*labelled(0), ("b.png", b""), other],
                "0.tar: the label of 0000.png is a number, and that of b.png a name; label all images by numbers, or",
            )
            for other in (("b.cls", b"cat"), ("b.json", b'{"label": "cat"}'))
        ),
        (
            [("a.png", b""), ("a.cls", b"cat"), ("b.png", b"")],
            "1 of 2 images have no label, such as b.png in ROOT/train/0.tar; give",
        ),
        ([("a.1.png", b"")], "the key of a.1.png ends at its first dot, and a has no other image; rename it"),
        ([("a.txt", b"")], "the 1 shards in ROOT/train contain no images. Expected under data.root="),
        ([], "contain no images"),
    ],
)
def test_wrong_members_are_named(tmp_path: Path, members: Members, message: str) -> None:
    write_tar(tmp_path / "train/0.tar", members)
    said = refused(tmp_path)
    assert message.replace("ROOT", str(tmp_path)) in said and f"{tmp_path}/train" in said


def test_labels_in_descriptions(tmp_path: Path) -> None:
    """Numbers may be text; a file with the class comes first, whatever the description is."""
    members = [("a.png", picture()), ("a.json", b'{"label": "3"}'), ("b.png", picture()), ("b.cls", b"1")]
    write_tar(tmp_path / "train/0.tar", [*members, ("b.json", b'{"label": ')])
    source = opened(tmp_path)
    assert source.labels is not None and source.labels.tolist() == [3, 1]


@pytest.mark.parametrize("form", ["cls", "json"])
def test_labels_may_be_names_of_classes(tmp_path: Path, form: str) -> None:
    """Sorted as class folders are; classes.txt may say otherwise."""
    for shard, names in enumerate((("dog", "cat"), ("ox", "cat"))):
        members: list[tuple[str, bytes]] = []
        for i, name in enumerate(names):
            label = f"{name}\n" if form == "cls" else json.dumps({"label": name})
            members += [(f"{shard}{i}.png", picture(i)), (f"{shard}{i}.{form}", label.encode())]
        write_tar(tmp_path / f"train/{shard}.tar", members)
    write_tar(tmp_path / "train/00.tar", [])
    source = opened(tmp_path)
    assert source.class_names == ("cat", "dog", "ox") and source.labels is not None
    assert source.labels.tolist() == [1, 0, 2, 0]
    chosen = opened(tmp_path, classes=("ox", "cat"))
    assert chosen.labels is not None and chosen.labels.tolist() == [1, 0, 1]
    (tmp_path / "classes.txt").write_text("ox\nelk\ndog\ncat\n")
    source = opened(tmp_path)
    assert source.class_names == ("ox", "elk", "dog", "cat") and source.labels is not None
    assert source.labels.tolist() == [2, 3, 0, 3]
    (tmp_path / "classes.txt").write_text("ox\ncat\n")
    assert "classes.txt lacks 'dog', by which images of train are labelled; add it on" in refused(tmp_path)
    (tmp_path / "classes.txt").unlink()
    write_tar(tmp_path / "train/2.tar", labelled(0))
    message = f"train/2.tar has numbers as labels, and {tmp_path}/train/0.tar names; label all images by numbers, or"
    assert message in refused(tmp_path)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", labelled(0))
    (tmp_path / "train/1.tar").symlink_to("gone.tar")
    assert "train/1.tar cannot be read (No such file or directory); restore" in refused(tmp_path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", labelled(0))
    shard = write_tar(tmp_path / "train/1.tar", labelled(1, 0))
    whole = shard.read_bytes()
    third = 512 * (2 + 2)  # where the third member begins
    for content, message in (
        (
            whole[: third - 300],
            "1.tar: truncated or damaged (unexpected end of data); make or download it again",
        ),
        (whole[:third], "1.tar: truncated or damaged at byte 2,048; make or download it again"),
        (whole[: third + 80], "1.tar: truncated or damaged at byte 2,048"),
        (whole[:third] + b"\xff" * 512 + whole[third + 512 :], "1.tar: truncated or damaged at byte 2,048"),
        (whole + whole, "1.tar: goes on after its end, as tar files that were joined do"),
        (b"", "1.tar: truncated or damaged (empty file)"),
        (b"no archive" * 100, "1.tar: truncated or damaged ("),
        (
            b"\x1f\x8b" + whole,
            "1.tar: compressed (gzip), so that no image of it can be read alone; decompress it",
        ),
    ):
        shard.write_bytes(content)
        assert message in refused(tmp_path)
    shard.unlink()
    (tmp_path / "train/1.tar.gz").touch()
    assert "train/1.tar.gz is compressed, so that no image of it can be read alone" in refused(tmp_path)


def test_links_are_refused(tmp_path: Path) -> None:
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train/0.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    assert "0.tar: a.png is a link or sparse; pack it as a plain file (tar --dereference)" in refused(
        tmp_path
    )


def test_names_of_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", labelled(0, 2))
    for text, message in (
        (b"a\nb\n", "must have a different name on a line for each of the labels 0 to 2, but has 2 lines"),
        (b"a\nb\nb\n", "but has 3 lines, 2 of them different"),
        (b"a\xff", "classes.txt cannot be read ("),
    ):
        (tmp_path / "classes.txt").write_bytes(text)
        assert message in refused(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    source = opened(tmp_path)
    assert source.class_names == ("a", "b", "c", "d") and source.labels is not None
    assert np.array_equal(source.labels, [0, 2])
