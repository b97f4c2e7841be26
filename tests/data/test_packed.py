"""Packed images are those of the folder; what is damaged or unfinished is found."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslzoo.batch import Batch
from sslzoo.data import pack_writer
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import UnreadableImageError
from sslzoo.data.pack_writer import PackOptions, Written, write_split
from sslzoo.data.packed import ROW, ROW_OF_PIXELS, Records
from sslzoo.data.sources import EncodedSource, FileSource, ImageSource, resize_short_side
from sslzoo.recipe.class_lists import CLASS_LISTS
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.packed_info import read_info
from sslzoo.recipe.sections import SourceConfig
from sslzoo.run.pack import guess, pack, splits_in, verify
from sslzoo.testing.ranks import run_ranks
from tests.data.test_module import as_tensors, batches, build, colour_data, equal, joined, rank_batches

FILES, RAW = PackOptions(), PackOptions(raw=True)


def opened(dataset: str, root: Path, split: str = "train", classes: tuple[str, ...] = ()) -> ImageSource:
    return open_source(SourceConfig(dataset=dataset, root=str(root), split=split, classes=classes), 3)


def write(
    root: Path,
    folder: Path,
    options: PackOptions = FILES,
    report: Callable[[int, int], None] = lambda images, added: None,
) -> Written:
    """Pack the training split of the class folders in ``root``."""
    source = opened("imagefolder", root)
    assert isinstance(source, FileSource)
    return write_split(source, folder, options, max_bad_fraction=0.1, report=report)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 6 pictures of three classes: JPEG and PNG, grey, on the side (EXIF), and two that are damaged."""
    root = tmp_path_factory.mktemp("photos") / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for c in "abc":
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
                image = image.resize((int(rng.integers(18, 60)), int(rng.integers(18, 60))))
                image.convert("L" if i == 3 else "RGB").save(
                    root / split / c / f"{i}.{'jpg' if i % 3 else 'png'}",
                    exif=_on_its_side() if i == 4 else b"",
                )
    whole = (root / "train/b/2.jpg").read_bytes()
    (root / "train/b/2.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "val/c/1.jpg").write_bytes(b"")
    return root


def _on_its_side() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[PackOptions], Path]:
    """``packed(options)``: the pictures, packed."""
    made: dict[PackOptions, Path] = {}

    def get(options: PackOptions) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("packed") / "here"
            pack(
                photos,
                made[options],
                dataset=None,
                splits=(),
                options=options,
                max_bad_fraction=0.2,
                workers=0,
            )
        return made[options]

    return get


@pytest.mark.parametrize(("options", "workers"), [(FILES, 0), (RAW, 0), (RAW, 2)])
def test_batches_are_those_of_the_folder(
    photos: Path, packed: Callable[[PackOptions], Path], options: PackOptions, workers: int
) -> None:
    allowed = {"max_bad_fraction": 0.5, "workers": workers}
    folder = build(colour_data(root=photos, **allowed))
    stores = [build(colour_data(name, packed(options), **allowed)) for name in ("packed", "imagefolder")]
    for store in stores[: 2 if workers == 0 else 1]:
        assert store.fingerprint == folder.fingerprint
        for position in (0, folder.plan.micro_batches_per_epoch):
            folder.position = store.position = position
            pairs = list(zip(batches(folder), batches(store), strict=True))
            assert len(pairs) == 2 and all(equal(a, b) for a, b in pairs)
        for mine, theirs in zip(folder.eval_sets(), store.eval_sets(), strict=True):
            assert (mine.split, mine.num_classes) == (theirs.split, theirs.num_classes) == (mine.split, 3)
            for a, b in zip(folder.eval_loader(mine), store.eval_loader(theirs), strict=True):
                assert torch.equal(a.image, b.image) and torch.equal(a.sample_id, b.sample_id)
                assert torch.equal(a.label, b.label) and [i for i, _ in a.bad] == [i for i, _ in b.bad]
    bad = stores[0].bad_images(stores[0].train_source)
    assert bad.count == 1 and bad.source.where(10) == f"{packed(options)}/train: b/2.jpg"


def test_ranks_share_the_batches_of_the_folder(photos: Path, packed: Callable[[PackOptions], Path]) -> None:
    whole = batches(build(colour_data(root=photos, max_bad_fraction=0.5)))
    store = build(colour_data("packed", packed(RAW), max_bad_fraction=0.5), world=2)
    per_rank = run_ranks(2, rank_batches, store)
    for k, batch in enumerate(whole):
        assert equal(batch, joined([Batch(*as_tensors(r[k])) for r in per_rank]))


def test_classes_are_chosen_as_in_the_folder(photos: Path, packed: Callable[[PackOptions], Path]) -> None:
    for split in ("train", "test"):
        folder, store = (
            opened(name, root, split, ("c", "a"))
            for name, root in (("imagefolder", photos), ("packed", packed(FILES)))
        )
        assert folder.labels is not None and store.labels is not None
        assert store.labels.tolist() == folder.labels.tolist() and store.class_names == ("c", "a")
        assert store.fingerprint == folder.fingerprint
        assert torch.equal(store.read(0), folder.read(0))
    with pytest.raises(ValueError, match="classes names 'dog', which imagefolder"):
        opened("packed", packed(FILES), classes=("dog",))


@pytest.mark.parametrize("by_class", [False, True])
def test_tiny_imagenet_and_folders_without_labels(photos: Path, tmp_path: Path, by_class: bool) -> None:
    """The validation images of Tiny ImageNet are listed by name, even if that is by class too."""
    tiny = tmp_path / "tiny/tiny-imagenet-200"
    for i, c in enumerate("abc"):
        shutil.copytree(photos / "train" / c, tiny / "train" / c / "images")
        (tiny / "val/images").mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "val/a/1.jpg", tiny / f"val/images/{2 - i}.JPEG")
    (tiny / "val/val_annotations.txt").write_text(
        "".join(f"{i if by_class else 2 - i}.JPEG\t{c}\n" for i, c in enumerate("abc"))
    )
    for source, name in ((tmp_path / "tiny", "tiny_imagenet"), (photos / "train", "folder")):
        assert guess(source) == name
        dest = tmp_path / f"packed {name}"
        pack(source, dest, dataset=None, splits=(), options=FILES, workers=0)
        for split in splits_in(source, name):
            for classes in ((), ("c", "a")) if name == "tiny_imagenet" else ((),):
                folder, store = opened(name, source, split, classes), opened("packed", dest, split, classes)
                assert (
                    store.fingerprint == folder.fingerprint == opened(name, dest, split, classes).fingerprint
                )
                assert store.class_names == folder.class_names
    with pytest.raises(ValueError, match=r"packed from folder and has no labels; use data\.dataset=packed"):
        opened("imagefolder", tmp_path / "packed folder")
    with pytest.raises(ValueError, match="classes cannot be selected"):
        opened("packed", tmp_path / "packed folder", classes=("a",))


def test_other_folders_are_no_splits(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And all splits are opened before the first is written."""
    shutil.copytree(photos, tmp_path / "in")
    (tmp_path / "in/annotations/a").mkdir(parents=True)
    (tmp_path / "in/annotations/a/1.txt").touch()
    shutil.copytree(photos / "val", tmp_path / "in/.git")
    assert splits_in(tmp_path / "in", "imagefolder") == ("train", "val")
    (tmp_path / "in/val/d").mkdir()
    for dataset in (None, "imagefolder"):
        with pytest.raises(ValueError, match="val/d contains no images"):
            pack(tmp_path / "in", tmp_path / "out", dataset=dataset, splits=(), options=FILES, workers=0)
    assert not (tmp_path / "out").exists()
    for name, advice in (("train", f"give {tmp_path}"), ("all", "put the class folders into a folder train")):
        source = Path(shutil.copytree(photos / "train", tmp_path / name))
        pack(source, tmp_path / f"flat {name}", dataset=None, splits=(), options=FILES, workers=0)
        assert f"{name}: folder (no labels; for labels {advice}), split" in capsys.readouterr().out


def test_empty_files_are_named_and_names_are_legible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9\n")
    root.mkdir()
    (root / "empty.png").touch()
    for _ in range(2):
        pack(root, tmp_path / "out", dataset=None, splits=(), options=FILES, max_bad_fraction=1, workers=0)
    out = capsys.readouterr().out
    assert rf"{tmp_path}/caf\xe9\n: folder, split train" in out
    assert out.count(f"{tmp_path}/out/train: 1 of 1 images cannot be read") == 2
    assert rf"  {tmp_path}/caf\xe9\n/empty.png (empty)" in out
    assert f"  {tmp_path}/out/train: empty.png (it could not be read when it was packed)" in out


def test_layouts_are_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for names, dataset in (
        ([f"n{c:08}" for c in range(1000)], "imagenet1k"),
        (CLASS_LISTS["imagenet100_cmc"].names, "imagenet100"),
        ([f"n{c:08}" for c in range(999)], "imagefolder"),
        ([f"class {c}" for c in range(1000)], "imagefolder"),
        ([], "folder"),
    ):
        monkeypatch.setattr("sslzoo.run.pack.class_folders", lambda folder, names=names: tuple(names))
        assert guess(tmp_path) == dataset
    assert splits_in(tmp_path, "imagenet1k") == ("train", "test")


@pytest.mark.parametrize("raw", [False, True])
def test_larger_images_are_reduced(photos: Path, packed: Callable[[PackOptions], Path], raw: bool) -> None:
    folder, store = (
        opened("imagefolder", photos),
        opened("packed", packed(PackOptions(raw=raw, short_side=32))),
    )
    assert store.fingerprint not in (folder.fingerprint, opened("packed", packed(FILES)).fingerprint)
    reduced = 0
    for i in set(range(len(folder))) - {10}:
        image, kept = folder.read(i), store.read(i)
        if min(image.shape[1:]) > 32:
            reduced += 1
            image = resize_short_side(image, 32)
            assert kept.shape == image.shape and (kept.float() - image.float()).abs().mean() < (
                1e-9 if raw else 6
            )
        else:
            assert torch.equal(kept, image)
            if isinstance(store, EncodedSource) and isinstance(folder, EncodedSource):
                assert store.encoded(i) == folder.encoded(i)
    assert 3 < reduced < 20


def test_channels_are_those_that_were_packed(photos: Path, packed: Callable[[PackOptions], Path]) -> None:
    root = packed(PackOptions(raw=True, channels=1))
    grey = open_source(SourceConfig(dataset="imagefolder", root=str(photos)), 1)
    assert torch.equal(open_source(SourceConfig(dataset="packed", root=str(root)), 1).read(1), grey.read(1))
    for options in (
        PackOptions(raw=True, channels=1),
        PackOptions(short_side=32, channels=1),
        PackOptions(short_side=32),
    ):
        stored, other = options.channels, 4 - options.channels
        said = rf"images of {stored} channel.*pack it again with --channels {other}, or give {stored} number"
        with pytest.raises(ValueError, match=said):
            open_source(SourceConfig(dataset="packed", root=str(packed(options))), other)


@pytest.mark.parametrize("options", [FILES, RAW], ids=["files", "pixels"])
def test_one_flipped_bit_is_found(
    packed: Callable[[PackOptions], Path],
    options: PackOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(packed(options), root)
    assert verify(root)
    row = Records(root / "train").index[5]
    with (root / "train/images.bin").open("r+b") as file:
        file.seek(int(row["offset"] + row["length"] // 2))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    source = opened("packed", root)
    with pytest.raises(UnreadableImageError, match=f"checksum differs; sslzoo pack --verify {root} lists"):
        source.read(5)
    assert len(source.read(4)) == len(source.read(6)) == 3
    capsys.readouterr()
    assert not verify(root)
    out = capsys.readouterr().out
    assert f"{root}/train: 1 of 24 images are damaged" in out and "a/5.jpg (its checksum differs)" in out
    assert f"delete {root}/train and pack it again, from " in out
    assert f"{root}/val: 6 images as they were written" in out


@pytest.mark.parametrize("name", ["index.npy", "labels.npy", "names.npy", "images.bin", "packed.json"])
def test_files_that_are_not_as_written_are_refused(
    packed: Callable[[PackOptions], Path], name: str, tmp_path: Path
) -> None:
    shutil.copytree(packed(FILES) / "train", tmp_path / "train")
    path = tmp_path / "train" / name
    whole = path.read_bytes()
    flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
    for content in (
        (whole[: len(whole) // 2], b"") if name in ("images.bin", "packed.json") else (flipped, b"")
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*pack the split again"):
            opened("packed", tmp_path)
    path.write_bytes(whole)
    (tmp_path / "train/packed.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, and this version of sslzoo reads 2; update sslzoo"):
        opened("packed", tmp_path)


@pytest.mark.parametrize("name", ["index.npy", "packed.json"])
def test_no_byte_of_a_header_may_change(
    packed: Callable[[PackOptions], Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apart from spaces, which are none of the content."""
    root = tmp_path / "copy"
    shutil.copytree(packed(FILES), root)
    path = root / "train" / name
    whole = path.read_bytes()
    for i in range(10, 128) if name == "index.npy" else range(len(whole)):
        if not whole[i : i + 1].isspace():
            path.write_bytes(bytes([*whole[:i], whole[i] ^ (2 if i % 2 else 16), *whole[i + 1 :]]))
            with pytest.raises(ValueError, match=name) as error:
                (Records if name == "index.npy" else read_info)(root / "train")
            assert "\n" not in str(error.value)
    assert not verify(root)
    out = capsys.readouterr().out
    assert name in out and f"{root}/val: 6 images as they were written" in out


def test_what_lacks_a_file_is_not_passed_over(
    packed: Callable[[PackOptions], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(packed(FILES), root)
    shutil.copytree(root / "val", root / "test.partial")
    assert verify(root) and verify(root / "train")
    assert f"{root}/test.partial: not finished, not checked; the command that" in capsys.readouterr().out
    (root / "train/packed.json").unlink()
    assert not verify(root)
    out = capsys.readouterr().out
    assert f"{root}/train/packed.json is damaged" in out and f"{root}/val: 6 images as they" in out


def test_a_damaged_split_is_not_taken_for_a_packed_one(
    photos: Path, packed: Callable[[PackOptions], Path], tmp_path: Path
) -> None:
    shutil.copytree(packed(FILES) / "train", tmp_path / "train")
    (tmp_path / "train/images.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images\.bin has 0 of .* bytes; delete its folder and pack"):
        write(photos, tmp_path / "train")


def test_files_that_have_changed_are_not_taken_for_those_packed(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    write(root, tmp_path / "train")
    os.utime(root / "train/a/1.jpg", (1, 1))
    with pytest.raises(ValueError, match=r"have changed .* since .*/train was written; delete it"):
        write(root, tmp_path / "train")
    (tmp_path / "train").rename(tmp_path / "train.partial")  # interrupted at its very end
    with pytest.raises(ValueError, match=r"since .*/train\.partial was written"):
        write(root, tmp_path / "train")


class Stopped(Exception):
    """An interruption."""


@pytest.mark.parametrize("options", [FILES, RAW], ids=["files", "pixels"])
def test_an_interrupted_pack_continues(
    photos: Path, packed: Callable[[PackOptions], Path], options: PackOptions, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pack_writer, "_CHUNK", 1)

    def stop(images: int, added: int) -> None:
        if images == 15:
            raise Stopped

    dest = tmp_path / "train"
    with pytest.raises(Stopped):
        write(photos, dest, options, report=stop)
    partial = tmp_path / "train.partial"
    assert partial.is_dir() and not dest.exists()
    for name in ("packed", "imagefolder"):
        with pytest.raises(
            ValueError, match=r"train\.partial is not finished; wait for sslzoo pack, or run the same"
        ):
            opened(name, tmp_path)
    with pytest.raises(
        ValueError, match="was begun with other images or options: 24 images of imagefolder from"
    ):
        write(photos, dest, PackOptions(short_side=20))
    with monkeypatch.context() as changed:
        changed.setattr(pack_writer, "_states_of", lambda source: np.ones((len(source), 2), np.int64))
        with pytest.raises(ValueError, match="have changed"):
            write(photos, dest, options)
    # As after a power failure: of what was known to be on disk nothing is lost, but of the rest.
    (partial / "progress.json").write_text('{"records": 12}')
    rows = np.fromfile(partial / "index.part", pack_writer.row_of(ROW_OF_PIXELS if options.raw else ROW))
    with (partial / "images.bin").open("r+b") as file:
        file.seek(int(rows["offset"][13]))
        file.write(bytes(10))
    if options.raw:  # every record is looked at then
        (partial / "progress.json").write_text("{")
    written = write(photos, dest, options)
    # What could not be read is tried again.
    assert (written.images, written.before) == (24, 12 if options.raw else 13) and not partial.exists()
    assert contents(dest) == contents(packed(options) / "train")
    assert write(photos, dest, options).before == 24
    with pytest.raises(ValueError, match=r"was packed with other options.*choose another DST, or delete it"):
        write(photos, dest, PackOptions(short_side=20))


def test_interrupted_at_the_very_end(
    photos: Path, packed: Callable[[PackOptions], Path], tmp_path: Path
) -> None:
    shutil.copytree(packed(FILES) / "train", tmp_path / "train.partial")
    with pytest.raises(ValueError, match="is not finished"):
        opened("packed", tmp_path)
    assert write(photos, tmp_path / "train").added == 0
    assert contents(tmp_path / "train") == contents(packed(FILES) / "train")


def test_another_process_sends_the_open_files_along(packed: Callable[[PackOptions], Path]) -> None:
    source = opened("packed", packed(RAW), classes=("b",))
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(1), source.read(1))


def test_recipes_take_from_the_store_what_they_leave_out(
    photos: Path, packed: Callable[[PackOptions], Path], tmp_path: Path
) -> None:
    shutil.copytree(packed(FILES), tmp_path / "in1k")
    replace(read_info(tmp_path / "in1k/train"), dataset="imagenet1k").write(tmp_path / "in1k/train")
    overrides = ["data.dataset=packed", "data.mean=null", "data.std=null"]
    loaded = load_recipe("sce_in1k", [*overrides, f"data.root={tmp_path}/in1k"])
    assert loaded.recipe.data.dataset == "imagenet1k" and loaded.origins["data.dataset"] == "dataset"
    assert loaded.recipe.data.mean == (0.485, 0.456, 0.406)
    with pytest.raises(RecipeError, match=r"data\.mean: missing key; imagefolder has no known statistics"):
        load_recipe("sce_in1k", [*overrides, f"data.root={packed(FILES)}"])
    with pytest.raises(RecipeError, match=r"data\.root: .*photos.* has no packed images of split 'train'"):
        load_recipe("sce_in1k", [*overrides, f"data.root={photos}"])
