"""Every layout on disk, built small, and what is said when it is another one."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslzoo.data.datasets import open_source
from sslzoo.data.idx import read_idx
from sslzoo.data.sources import ArraySource, FileSource, JoinedImages, UnreadableImageError, fake_source
from sslzoo.recipe.catalog import DATASETS, dataset_info
from sslzoo.recipe.class_lists import CLASS_LISTS
from sslzoo.recipe.registry import plugin
from sslzoo.recipe.sections import SourceConfig

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def opened(
    dataset: str,
    root: Path | str = "",
    split: str = "train",
    classes: str | tuple[str, ...] = (),
    channels: int = 0,
):
    return open_source(SourceConfig(dataset=dataset, root=str(root), split=split, classes=classes), channels)


def picture(path: Path, value: int, size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_has_a_reader_and_whole_statistics(name: str) -> None:
    info = DATASETS[name]
    assert callable(plugin(info.reader, "data.dataset"))
    assert len(info.mean) == len(info.std) in (0, 1, 3)
    assert bool(info.mean) == bool(info.sizes)  # of folders nothing is known


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_lists_of_classes(name: str) -> None:
    classes = CLASS_LISTS[name].names
    assert len(set(classes)) == len(classes) == 100
    assert all(len(c) == 9 and c.startswith("n") and c[1:].isdigit() for c in classes)
    assert DATASETS["imagenet100"].nominal_size("train", name) == CLASS_LISTS[name].sizes["train"]


def test_embedded_data() -> None:
    train, test = opened("fashion_mnist_12k"), opened("fashion_mnist_12k", split="test")
    assert isinstance(train, ArraySource)
    assert (len(train), len(test), train.channels, train.size) == (12_000, 2_000, 1, (28, 28))
    for source, count in ((train, 1_200), (test, 200)):
        assert source.labels is not None and source.labels.dtype == np.int64
        assert np.bincount(source.labels).tolist() == [count] * 10
    assert train.num_classes == 10 and train.class_names == test.class_names
    assert train.fingerprint == opened("fashion_mnist_12k").fingerprint != test.fingerprint


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_embedded_data_are_the_images_they_claim_to_be() -> None:
    path = Path(__file__).parents[2] / "sslzoo/data/embedded/fashion_mnist_12k.npz"
    with np.load(path) as data:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            index = data[f"{split}_index"]
            assert len(set(index.tolist())) == len(index)
            full = opened("fashion_mnist", DEBIAN, split)
            assert isinstance(full, ArraySource) and full.labels is not None
            assert np.array_equal(full.images[index][:, 0], data[f"{split}_images"])
            assert np.array_equal(full.labels[index], data[f"{split}_labels"])
            assert len(full) == {"train": 60_000, "t10k": 10_000}[prefix]


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist(tmp_path: Path, place: str, suffix: str) -> None:
    images, labels = noise(6, 28, 28), np.arange(6, dtype=np.uint8)
    write_idx(tmp_path / place / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / place / f"train-labels-idx1-ubyte{suffix}", labels)
    source = opened("fashion_mnist", tmp_path)
    assert isinstance(source, ArraySource)
    assert np.array_equal(source.images[:, 0], images)
    with pytest.raises(ValueError, match="t10k"):
        opened("fashion_mnist", tmp_path, "test")


def test_idx_files_that_are_not_whole(tmp_path: Path) -> None:
    write_idx(tmp_path / "x", noise(4, 3))
    assert read_idx(tmp_path / "x").shape == (4, 3)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="declares shape"):
        read_idx(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(tmp_path / "x")


def cifar_batch(path: Path, data: np.ndarray, labels: list[int], key: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Protocol 2 and byte keys, as the published files.
    path.write_bytes(pickle.dumps({b"data": data, key: labels}, protocol=2))


def test_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    data = noise(10, 3072)
    for i in range(5):
        cifar_batch(folder / f"data_batch_{i + 1}", data[2 * i : 2 * i + 2], [i, i + 1], b"labels")
    cifar_batch(folder / "test_batch", data[:3], [3, 2, 1], b"labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, 2))
    train, test = opened("cifar10", tmp_path), opened("cifar10", folder, "test")
    assert isinstance(train, ArraySource) and train.labels is not None and test.labels is not None
    assert np.array_equal(train.images, data.reshape(10, 3, 32, 32))
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5] and test.labels.tolist() == [3, 2, 1]
    kept = opened("cifar10", tmp_path, classes=("c3", "c1"))
    assert isinstance(kept, ArraySource) and kept.labels is not None
    assert kept.labels.tolist() == [1, 1, 0, 0] and kept.class_names == ("c3", "c1")
    assert np.array_equal(kept.images, train.images[np.array([1, 2, 5, 6])])
    with pytest.raises(ValueError, match="'dog'"):
        opened("cifar10", tmp_path, classes=("dog",))


def test_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    cifar_batch(folder / "train", noise(4, 3072), [99, 0, 1, 2], b"fine_labels")
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"f%d" % i for i in range(100)]}, 2))
    source = opened("cifar100", tmp_path)
    assert source.labels is not None
    assert source.labels.tolist() == [99, 0, 1, 2] and source.num_classes == 100


def damaged(content: bytes) -> list[bytes]:
    """Empty, truncated, a web page, and with one byte changed."""
    return [b"", content[: len(content) // 2], b"<html>not found</html>", b"\x80\x7f" + content[2:]]


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_damaged_cifar_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(5):
        cifar_batch(folder / f"data_batch_{i + 1}", noise(2, 3072), [i, i + 1], b"labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, 2))
    whole = (folder / name).read_bytes()
    others = [
        pickle.dumps(x) for x in ([], {}, {b"data": noise(2, 30), b"labels": [1, 2]}, {b"label_names": 3})
    ]
    for content in (*damaged(whole), *others):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*download it again"):
            opened("cifar10", tmp_path)
    (folder / name).write_bytes(whole)
    cifar_batch(folder / "data_batch_3", noise(2, 3072), [1], b"labels")
    with pytest.raises(ValueError, match="data_batch_3 does not contain images of 32 px with a label each"):
        opened("cifar10", tmp_path)
    cifar_batch(folder / "data_batch_3", noise(2, 3072), [1, 10], b"labels")
    with pytest.raises(ValueError, match="has the labels 0 to 10, but 10 classes"):
        opened("cifar10", tmp_path)


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(images, noise(6, 28, 28))
    write_idx(labels, np.arange(6, dtype=np.uint8))
    whole = labels.read_bytes()
    for content in (*damaged(whole), gzip.compress(b"\0\0\x08\x03")):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz .*download it again"):
            opened("fashion_mnist", tmp_path)
    write_idx(labels, np.arange(5, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has 6 images but 5 labels; download it again"):
        opened("fashion_mnist", tmp_path)


def test_damaged_stl10_is_named(tmp_path: Path) -> None:
    for content in (b"", noise(3, 96, 96).tobytes()[:-1]):
        (tmp_path / "train_X.bin").write_bytes(content)
        (tmp_path / "train_y.bin").write_bytes(b"\1")
        with pytest.raises(ValueError, match=r"train_X\.bin is truncated; download it again"):
            opened("stl10", tmp_path)
    noise(2, 3, 96, 96).tofile(tmp_path / "train_X.bin")
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        opened("stl10", tmp_path)


def test_incomplete_data_get_a_warning_with_both_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(6, 28, 28))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    opened("fashion_mnist", tmp_path)
    assert "is not complete: it has 6 of 60,000 images" in caplog.text
    caplog.clear()
    opened("fashion_mnist", tmp_path, classes=("Bag",))
    opened("fashion_mnist_12k")
    assert not caplog.text


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-python/train"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({b"data": Path("x")}))
    with pytest.raises(ValueError, match="only arrays"):
        opened("cifar100", tmp_path)


def test_stl10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    parts = {
        "train": noise(3, 3, 96, 96),
        "unlabeled": 255 - noise(4, 3, 96, 96),
        "test": noise(2, 3, 96, 96),
    }
    for name, images in parts.items():
        images.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
    np.array([1, 10, 5], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([2, 3], dtype=np.uint8).tofile(folder / "test_y.bin")
    for split in ("unlabeled", "train", "test"):
        source = opened("stl10", tmp_path, split)
        assert isinstance(source, ArraySource)
        assert np.array_equal(source.batch(torch.arange(len(source))).numpy(), parts[split])
    train, test = opened("stl10", tmp_path), opened("stl10", tmp_path, "test")
    assert train.labels is not None and test.labels is not None
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 9, 4], [1, 2])
    assert opened("stl10", tmp_path, "unlabeled").labels is None
    both = opened("stl10", tmp_path, "train+unlabeled")
    assert len(both) == 7 and both.labels is None
    assert isinstance(both, ArraySource) and isinstance(both.images, JoinedImages), "read into memory"
    joined = np.concatenate([parts["train"], parts["unlabeled"]])
    assert np.array_equal(both.read(5).numpy(), parts["unlabeled"][2])
    assert np.array_equal(both.batch(torch.tensor([6, 0, 3, 2, 0])).numpy(), joined[[6, 0, 3, 2, 0]])
    assert both.fingerprint == ArraySource("stl10", "train+unlabeled", joined, None).fingerprint
    with pytest.raises(ValueError, match="no labels"):
        opened("stl10", tmp_path, "unlabeled", classes=("cat",))
    with pytest.raises(ValueError, match=r"splits unlabeled, train\+unlabeled, train, test"):
        opened("stl10", tmp_path, "val")


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(("n02", "n01")):
        for i in range(2):
            picture(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", 100 * k, (64, 64))
        picture(root / f"val/images/val_{k}.JPEG", 100 * k, (64, 64))
    (root / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n"
    )
    train, test = opened("tiny_imagenet", tmp_path), opened("tiny_imagenet", root, "test")
    assert train.labels is not None and test.labels is not None
    assert train.class_names == test.class_names == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [1, 0]
    assert abs(int(train.read(0)[0, 5, 5]) - 100) < 4 and int(test.read(0)[0, 5, 5]) < 4
    for content in (b"val_0.JPEG n02\n", b"\xff\xfe\n"):
        (root / "val/val_annotations.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"val_annotations\.txt is damaged.*download it again"):
            opened("tiny_imagenet", root, "test")
    (root / "val/val_annotations.txt").unlink()
    with pytest.raises(ValueError, match="val_annotations"):
        opened("tiny_imagenet", tmp_path, "test")


def class_folders(root: Path, classes: int) -> Path:
    for split in ("train", "val"):
        for c in range(classes):
            picture(root / split / f"n{c:03}" / "a.png", c)
    return root


def test_imagenet_counts_its_classes(tmp_path: Path) -> None:
    class_folders(tmp_path, 102)
    chosen = tuple(f"n{c:03}" for c in reversed(range(100)))
    source = opened("imagenet100", tmp_path, classes=chosen)
    assert source.class_names == chosen and int(source.read(0)[0, 0, 0]) == 99
    assert opened("imagenet100", tmp_path, "test", chosen).class_names == chosen
    assert opened("imagenet1k", tmp_path, classes=chosen[:3]).num_classes == 3
    with pytest.raises(ValueError, match=r"classes names 'n02869837', which imagenet100 at .* does not have"):
        opened("imagenet100", tmp_path, classes="imagenet100_cmc")
    for name in ("imagenet100", "imagenet1k"):
        with pytest.raises(ValueError, match=r"102 were found.*data\.classes"):
            opened(name, tmp_path)


def test_imagefolder_and_folder(tmp_path: Path) -> None:
    class_folders(tmp_path, 3)
    (tmp_path / "train/n000/notes.txt").write_text("not an image")
    picture(tmp_path / "train/n001/deeper/b.JPG", 9)
    train = opened("imagefolder", tmp_path)
    assert isinstance(train, FileSource) and train.labels is not None
    assert train.labels.tolist() == [0, 1, 1, 2] and train.class_names == ("n000", "n001", "n002")
    assert opened("imagefolder", tmp_path, "test").num_classes == 3  # val/ where there is no test/
    assert opened("imagefolder", tmp_path / "train", ".").num_classes == 3
    everything = opened("folder", tmp_path)
    assert len(everything) == 7 and everything.labels is None and everything.num_classes == 0
    picture(tmp_path / "val/n002/z.png", 1)
    assert opened("folder", tmp_path).fingerprint != everything.fingerprint


@pytest.mark.parametrize("dataset", ["imagefolder", "folder"])
def test_the_same_files_under_another_root_are_the_same_data(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run continues where its images have moved."""
    first, second = (class_folders(tmp_path / name, 3) for name in ("first", "and/second place"))
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    expected = opened(dataset, first).fingerprint
    for root in (second, f"{first}/", "first", "./first/../first", "link"):
        assert opened(dataset, root).fingerprint == expected, root


@pytest.mark.parametrize("dataset", ["imagefolder", "folder"])
@pytest.mark.parametrize("change", ["added", "removed", "renamed", "of another class"])
def test_other_files_are_other_data(dataset: str, change: str, tmp_path: Path) -> None:
    folder = class_folders(tmp_path, 3) / "train"
    picture(folder / "n001" / "b.png", 9)
    before = opened(dataset, tmp_path).fingerprint
    if change == "added":
        picture(folder / "n001" / "c.png", 9)
    elif change == "removed":
        (folder / "n001" / "b.png").unlink()
    else:
        (folder / "n001" / "b.png").rename(folder / ("n001/c.png" if change == "renamed" else "n002/b.png"))
    assert opened(dataset, tmp_path).fingerprint != before


def test_other_classes_or_another_split_are_other_data(tmp_path: Path) -> None:
    class_folders(tmp_path, 3)
    sources = [
        opened("imagefolder", tmp_path),
        opened("imagefolder", tmp_path, "test"),
        opened("imagefolder", tmp_path, classes=("n000", "n001")),
        opened("imagefolder", tmp_path, classes=("n001", "n000")),
        opened("folder", tmp_path),
        opened("folder", tmp_path / "train"),
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)


def test_images_in_memory_are_known_by_themselves_and_their_labels(tmp_path: Path) -> None:
    images, labels = noise(40, 28, 28), np.arange(40, dtype=np.uint8) % 10
    variants = {"same": images, "first": images.copy(), "last": images.copy(), "short": images[:-1]}
    variants["first"][0, 3, 3] ^= 1
    variants["last"][-1, 3, 3] ^= 1
    prints = {}
    for name, pixels in (variants | {"again": images, "labels": images}).items():
        write_idx(tmp_path / name / "train-images-idx3-ubyte", pixels)
        write_idx(
            tmp_path / name / "train-labels-idx1-ubyte",
            (labels[::-1] if name == "labels" else labels)[: len(pixels)],
        )
        prints[name] = opened("fashion_mnist", tmp_path / name).fingerprint
    assert prints.pop("again") == prints["same"]
    assert len(set(prints.values())) == len(prints)


@pytest.mark.parametrize("dataset", [name for name, info in DATASETS.items() if info.layout])
def test_an_empty_or_missing_folder_shows_the_layout(tmp_path: Path, dataset: str) -> None:
    for root in (tmp_path, tmp_path / "nowhere", ""):
        with pytest.raises(ValueError, match="Expected under data") as error:
            opened(
                dataset, root, dataset_info(dataset).splits[0] if dataset_info(dataset).splits else "train"
            )
        assert dataset_info(dataset).layout in str(error.value)
        assert dataset_info(dataset).page in str(error.value)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path, 2)
    (tmp_path / "train/n009").mkdir()
    with pytest.raises(ValueError, match="n009 contains no images"):
        opened("imagefolder", tmp_path)


def test_a_typo_gets_the_right_name() -> None:
    with pytest.raises(ValueError, match="did you mean cifar10"):
        opened("cifar-10")


def test_channels_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 channel"):
        opened("fashion_mnist_12k", channels=3)
    picture(tmp_path / "a.png", 200)
    assert opened("folder", tmp_path, channels=1).read(0).shape == (1, 30, 20)


def test_formats_and_unreadable_files(tmp_path: Path) -> None:
    rgba = Image.fromarray(noise(8, 9, 4))
    grey = Image.fromarray(noise(8, 9))
    rgba.save(tmp_path / "a.png")
    grey.save(tmp_path / "b.jpg")
    grey.save(tmp_path / "c.bmp")
    grey.convert("CMYK").save(tmp_path / "d.jpg")
    Image.fromarray(noise(8, 9).astype(np.uint16) * 257).save(tmp_path / "e.png")
    grey.save(tmp_path / "f.gif", save_all=True, append_images=[grey.rotate(90)])
    grey.save(tmp_path / "g.tif")
    source = opened("folder", tmp_path)
    assert len(source) == 7
    for i in range(7):
        image = source.read(i)
        assert image.dtype == torch.uint8 and image.shape == (3, 8, 9), source.where(i)
    for i in (2, 4, 6):  # lossless
        assert np.array_equal(source.read(i)[0].numpy(), noise(8, 9)), source.where(i)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:200])
    (tmp_path / "c.bmp").unlink()
    (tmp_path / "g.tif").write_text("not a picture")
    for i in (1, 2, 6):
        with pytest.raises(UnreadableImageError):
            source.read(i)


def test_fake_images_are_all_different_and_always_the_same() -> None:
    source = fake_source(50, 3, 32, 5)
    assert source.images.shape == (50, 3, 32, 32) and source.num_classes == 5
    assert len({hashlib.sha256(i.tobytes()).digest() for i in source.images}) == 50
    assert source.fingerprint == fake_source(50, 3, 32, 5).fingerprint
    assert source.sibling("test", 5).fingerprint != source.fingerprint
    assert fake_source(4, 1, 28, 0).labels is None
