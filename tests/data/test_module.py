"""Batches do not depend on workers, ranks or resumes, and evaluation sees each sample once."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from sslzoo.batch import Batch
from sslzoo.data import loading, sources
from sslzoo.data.crops import crop_into
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import DataError
from sslzoo.data.loading import ImageReader
from sslzoo.data.module import EvalSet, SSLDataModule
from sslzoo.data.sources import ArraySource, FileSource, ImageSource, fake_source
from sslzoo.data.views import draw_boxes, draw_uniforms
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, ProbeConfig, SourceConfig, ViewConfig
from sslzoo.testing.ranks import run_ranks

COLOUR: dict[str, Any] = {
    "jitter_p": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_p": 0.2,
    "blur_p": 0.5,
    "flip_p": 0.5,
}
WEAK = ViewConfig(size=16, scale=(0.2, 1.0), flip_p=0.5)
STRONG = ViewConfig(size=16, scale=(0.2, 1.0), solarize_p=0.2, **COLOUR)
EVAL = EvalConfig(every_epochs=1, size=16, knn_k=5, knn_temperature=0.1, batch_size=7)
PROBE = ProbeConfig(lrs=(0.1,))


def build(
    data: DataConfig,
    views: Sequence[ViewConfig] = (WEAK, STRONG),
    source: ImageSource | None = None,
    *,
    world: int = 1,
    accumulate: int = 1,
    eval: EvalConfig = EVAL,
    probe: ProbeConfig = PROBE,
) -> SSLDataModule:
    source = open_source(data) if source is None else source
    plan = TrainingPlan(
        dataset_size=len(source),
        global_batch_size=data.global_batch_size,
        max_epochs=3,
        world_size=world,
        accumulate=accumulate,
    )
    return SSLDataModule(data, views, eval, probe, plan, seed=1, source=source)


def colour_data(dataset: str = "imagefolder", root: Path | str = "", **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"global_batch_size": 12, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return DataConfig(dataset=dataset, root=str(root), **(settings | changes))


def batches(module: SSLDataModule) -> list[Batch]:
    return [module.finish(raw) for raw in module.train_dataloader()]


def equal(a: Batch, b: Batch) -> bool:
    """Whether two batches are the same, bit for bit."""
    same_label = (a.label is None) == (b.label is None) and (
        a.label is None or b.label is None or torch.equal(a.label, b.label)
    )
    pairs = zip(a.global_views + a.local_views, b.global_views + b.local_views, strict=True)
    return torch.equal(a.sample_id, b.sample_id) and same_label and all(torch.equal(x, y) for x, y in pairs)


def joined(parts: Sequence[Batch]) -> Batch:
    """Ranks' batches, one under the other."""
    views = tuple(torch.cat(v) for v in zip(*(p.global_views for p in parts), strict=True))
    labels = [p.label for p in parts if p.label is not None]
    label = torch.cat(labels) if labels else None
    return Batch(views, (), torch.cat([p.sample_id for p in parts]), label)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 + 10 pictures of different sizes, two classes, as JPEG and PNG."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
                suffix = ("jpg", "png")[i % 2]
                Image.fromarray(coarse).resize(size).save(tmp_path / split / c / f"{i:02}.{suffix}")
    return tmp_path


def test_more_workers_than_processors_are_warn_ofed_once(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "processors", lambda: 2)
    loading._warn_of.cache_clear()
    module = build(colour_data(root=photos, workers=4))
    with caplog.at_level(logging.WARNING, "sslzoo"):
        module.train_dataloader()
        module.val_dataloader()
    (record,) = caplog.records
    assert record.getMessage().startswith("data.workers=4 on 2 processors: data.workers=2 is as fast")
    loading._warn_of.cache_clear()


def test_workers_do_not_change_the_batches(photos: Path) -> None:
    alone = batches(build(colour_data(root=photos)))
    for workers in (1, 2):
        module = build(colour_data(root=photos, workers=workers))
        assert all(equal(a, b) for a, b in zip(alone, batches(module), strict=True))
    assert len(alone) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["array", "files"])
def test_ranks_share_the_batches_of_one_process(photos: Path, kind: str, accumulate: int) -> None:
    def module(world: int) -> SSLDataModule:
        if kind == "files":
            return build(colour_data(root=photos), world=world, accumulate=accumulate)
        return build(colour_data(), source=fake_source(40, 3, 24, 5), world=world, accumulate=accumulate)

    whole = batches(module(1))
    for world in (2, 3):
        per_rank = run_ranks(world, rank_batches, module(world))
        for k, batch in enumerate(whole):
            assert equal(batch, joined([Batch(*as_tensors(r[k])) for r in per_rank]))


def rank_batches(rank: int, world: int, module: SSLDataModule) -> list[Any]:
    """As numpy, which travels between processes by value."""
    return [
        (tuple(v.numpy() for v in b.global_views), (), b.sample_id.numpy(), b.label.numpy())
        for b in batches(module)
        if b.label is not None
    ]


def as_tensors(x: Any) -> Any:
    return tuple(as_tensors(v) for v in x) if isinstance(x, tuple) else torch.from_numpy(x)


@pytest.mark.parametrize("position", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_restored_position_continues_the_order(position: int, accumulate: int) -> None:
    def module() -> SSLDataModule:
        return build(colour_data(), source=fake_source(40, 3, 24, 5), accumulate=accumulate)

    running = module()
    everything: list[Batch] = []
    for _ in range(3):
        for batch in batches(running):
            everything.append(batch)
        running.position = len(everything)
    resumed = module()
    resumed.load_state_dict({"position": position})
    assert resumed.state_dict() == {
        "position": position,
        "accumulate": accumulate,
        "fingerprint": resumed.fingerprint,
        "unreadable": [],
    }
    with pytest.raises(ValueError, match="was trained on other images: then fake/train/9/0, now fake/train/"):
        resumed.load_state_dict({"position": 0, "fingerprint": "fake/train/9/0"})
    rest = batches(resumed)
    per_epoch = resumed.plan.micro_batches_per_epoch
    assert len(rest) == per_epoch - position % per_epoch
    assert len(resumed.train_dataloader()) == per_epoch
    assert all(equal(a, b) for a, b in zip(rest, everything[position:], strict=False))


def test_position_counts_with_persistent_workers(photos: Path) -> None:
    module, alone = build(colour_data(root=photos, workers=2)), build(colour_data(root=photos))
    loader = module.train_dataloader()
    for epoch in range(2):
        module.position = alone.position = 3 * epoch
        got = [module.finish(raw) for raw in loader]
        assert all(equal(a, b) for a, b in zip(got, batches(alone), strict=True))


def test_workers_and_device_augment_alike(photos: Path) -> None:
    """And what is left out follows the device."""
    views = (
        WEAK,
        replace(STRONG, solarize_p=0.0, solarize_threshold=0.5),
        replace(WEAK, padding=2, scale=None),
    )

    def module(workers: int, augment_on: Any) -> SSLDataModule:
        return build(colour_data(root=photos, workers=workers, augment_on=augment_on), views)

    alone = module(0, "worker")
    assert alone.augments_in_workers and not module(0, "device").augments_in_workers
    want = batches(alone)
    assert all(equal(a, b) for a, b in zip(batches(module(2, "worker")), want, strict=True))
    for a, b in zip(batches(module(2, "device")), want, strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        for one, other in zip(a.global_views, b.global_views, strict=True):
            assert one.is_contiguous() and (one - other).abs().max() < 1e-4
    left_out = module(0, None)
    assert left_out.augments_in_workers
    left_out.device = torch.device("cuda")
    assert not left_out.augments_in_workers
    memory = build(colour_data(augment_on="worker"), source=fake_source(24, 3, 16, 0))
    assert not memory.augments_in_workers


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    before = torch.get_rng_state()
    batches(build(colour_data(root=photos, workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_show_every_sample_once_and_differ() -> None:
    module = build(colour_data(global_batch_size=8), source=fake_source(40, 3, 24, 5))
    first = torch.cat([b.sample_id for b in batches(module)])
    module.position = 5
    second = torch.cat([b.sample_id for b in batches(module)])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(40))
    assert first.tolist() != second.tolist()


def test_sample_id_and_label_belong_to_the_image(photos: Path) -> None:
    plain = ViewConfig(size=16, scale=(1.0, 1.0), ratio=(1e-3, 1e3))  # no attempt fits: the whole image
    module = build(colour_data(root=photos), [plain])
    source = module.train_source
    for batch in batches(module):
        for k, i in enumerate(batch.sample_id.tolist()):
            image = source.read(i)
            u = draw_uniforms(1, 0, 0, torch.tensor([i]))
            box = draw_boxes(plain, u, *(torch.tensor([s]) for s in image.shape[1:]))[0].tolist()
            crop = torch.empty((3, 16, 16), dtype=torch.uint8)
            crop_into(crop, image, box, "bilinear")
            want = TF.normalize(crop.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
            assert (batch.global_views[0][k] - want).abs().max() < 1.5 / 255 / 0.2
            assert batch.label is not None and source.labels is not None
            assert batch.label[k] == source.labels[i]


def test_multi_crop() -> None:
    sizes = (224, 192, 160, 128, 96)
    views = [
        ViewConfig(
            size=s,
            scale=(0.05, 0.5),
            role="global" if s == 224 else "local",
            count=2 if s == 224 else 1,
            **COLOUR,
        )
        for s in sizes
    ]
    module = build(colour_data(global_batch_size=2), views, fake_source(4, 3, 64, 2))
    batch = module.example_batch(2)
    assert [v.shape[-1] for v in batch.global_views] == [224, 224]
    assert [v.shape[-1] for v in batch.local_views] == [192, 160, 128, 96]
    assert all(
        v.shape[:2] == (2, 3) and v.dtype == torch.float32 for v in batch.global_views + batch.local_views
    )
    assert not torch.equal(batch.global_views[0], batch.global_views[1])


def test_varied_samples_are_of_different_classes() -> None:
    """Of more classes than asked for, from all over their order; of fewer, more of each."""

    def chosen(labels: list[int] | None, classes: int, n: int) -> list[int]:
        images = np.zeros((12, 3, 64, 64), dtype=np.uint8)
        known = None if labels is None else np.array(labels)
        source = ArraySource("x", "train", images, known, [str(c) for c in range(classes)])
        return build(colour_data(global_batch_size=2), source=source).varied_samples(n)

    labels = [c for c in range(6) for _ in range(2)]
    assert chosen(labels, 6, 3) == [0, 4, 8]
    assert chosen([0] * 6 + [1] * 6, 2, 4) == [0, 6, 3, 9]
    assert chosen(None, 0, 4) == [0, 3, 6, 9]
    assert sorted(chosen(labels, 6, 99)) == list(range(12))


def test_views_are_weak_and_strong_as_declared() -> None:
    same: dict[str, Any] = {"size": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    weak = ViewConfig(**same)
    strong = ViewConfig(**same, solarize_p=1.0, solarize_threshold=0.0)
    module = build(colour_data(mean=(0.0,) * 3, std=(1.0,) * 3), [weak, strong], fake_source(20, 3, 16, 2))
    first, second = module.example_batch(12).global_views
    assert torch.allclose(first, 1 - second, atol=1e-6)


def test_grey_images_take_a_colour_policy() -> None:
    data = DataConfig(dataset="fashion_mnist_12k", global_batch_size=256, mean=(0.286,), std=(0.353,))
    batch = build(data, [STRONG]).example_batch(64)
    assert batch.global_views[0].shape == (64, 1, 16, 16)
    assert torch.isfinite(batch.global_views[0]).all()


# -- unreadable images ----------------------------------------------------------------------------


def damage(root: Path) -> set[str]:
    """Break two pictures of the training set: one cut short, one gone after it was listed."""
    broken = {"train/cat/02.jpg", "train/dog/05.png"}
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named_once(
    photos: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage(photos)
    module = build(colour_data(root=photos, global_batch_size=8, workers=workers, max_bad_fraction=0.05))
    missing = {i for i in range(40) if module.train_source.where(i).endswith(("cat/02.jpg", "dog/05.png"))}
    with caplog.at_level(logging.WARNING, "sslzoo"):
        first = batches(module)
        module.position = 5
        batches(module)
    assert all(len(b.sample_id) == 8 for b in first)
    seen = torch.cat([b.sample_id for b in first]).tolist()
    assert not missing & set(seen) and len(set(seen)) == 38
    assert module.unreadable == 2
    named = sorted(r.getMessage().rpartition("/")[2] for r in caplog.records)
    assert [name.partition(" (")[0] for name in named] == ["02.jpg", "05.png"]
    assert all(name.endswith(")") for name in named), "no reason is given"


def test_a_missing_file_counts_too_and_too_many_stop_the_run(photos: Path) -> None:
    module = build(colour_data(root=photos, global_batch_size=8, max_bad_fraction=0.05))
    for name in ("00.jpg", "02.jpg", "04.jpg"):
        (photos / "train/cat" / name).unlink()
    with pytest.raises(RuntimeError, match=r"3 of 40 images.*max_bad_fraction=0\.05") as error:
        batches(module)
    assert all(f"cat/{name}" in str(error.value) for name in ("00.jpg", "02.jpg", "04.jpg"))


def rank_outcome(rank: int, world: int, module: SSLDataModule) -> str:
    """What the loop's hooks say over one epoch, and how many bad images this rank met by itself."""
    own: set[int] = set()
    try:
        for raw in module.train_dataloader():
            own |= {position for position, _ in raw.bad}
            module.on_after_batch_transfer(module.on_before_batch_transfer(raw, 0), 0)
            module.position += 1
    except RuntimeError as error:
        return f"{len(own)} own; {error}"
    return f"{len(own)} own; no error"


@pytest.mark.parametrize("fraction", [0.05, 0.1])
def test_ranks_add_up_their_bad_images(photos: Path, fraction: float) -> None:
    for name in ("cat/00.jpg", "cat/08.jpg", "dog/06.jpg"):
        (photos / "train" / name).write_bytes(b"")
    module = build(colour_data(root=photos, global_batch_size=8, max_bad_fraction=fraction), world=2)
    outcomes = run_ranks(2, rank_outcome, module)
    assert sorted(o[:5] for o in outcomes) == ["1 own", "2 own"]
    assert all(("3 of 40" in o) == (fraction < 0.075) for o in outcomes)


def ids_by_step(batches: Sequence[Batch], accumulate: int) -> list[list[int]]:
    """The sample_ids of each global batch."""
    ids = torch.cat([b.sample_id for b in batches])
    return ids.view(-1, accumulate * len(batches[0].sample_id)).tolist()


def break_a_block(root: Path, count: int) -> None:
    """Neighbours in the order of files, as a full disk or a broken copy leaves them."""
    for path in sorted((root / "train/cat").iterdir())[:count]:
        path.write_bytes(b"")


def rank_batches_of_files(rank: int, world: int, module: SSLDataModule) -> list[Any]:
    """Of two epochs."""
    found = rank_batches(rank, world, module)
    module.position = module.plan.micro_batches_per_epoch
    return found + rank_batches(rank, world, module)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_image_comes_into_a_batch_twice(photos: Path, accumulate: int) -> None:
    """Whatever fails, on however many ranks, and after a resume: equal ones would be each other's negatives."""
    break_a_block(photos, 14)

    def module(world: int) -> SSLDataModule:
        data = colour_data(root=photos, global_batch_size=4, max_bad_fraction=1.0)
        return build(data, world=world, accumulate=accumulate)

    alone = module(1)
    whole: list[Batch] = []
    for epoch in range(2):
        alone.position = epoch * alone.plan.micro_batches_per_epoch
        whole += batches(alone)
    steps = ids_by_step(whole, accumulate)
    assert len(steps) == 20 and all(len(set(ids)) == 4 for ids in steps)
    for epoch in (steps[:10], steps[10:]):
        assert len({i for ids in epoch for i in ids}) > 20, "few stand in for all"
    if accumulate == 1:
        per_rank = run_ranks(2, rank_batches_of_files, module(2))
        for k, batch in enumerate(whole):
            assert equal(batch, joined([Batch(*as_tensors(r[k])) for r in per_rank]))
    resumed = module(1)
    resumed.position = 5
    for ours, theirs in zip(
        batches(resumed), whole[5:], strict=False
    ):  # it remembers nothing of what failed before
        assert equal(ours, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_failed_is_not_read_again(
    photos: Path, workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    break_a_block(photos, 6)
    diary = tmp_path_factory.mktemp("diary") / "asked"  # written to by workers too
    ask = FileSource.encoded

    def encoded(source: FileSource, sample_id: int) -> bytearray:
        with diary.open("a") as file:
            file.write(f"{source.split} {sample_id}\n")
        return ask(source, sample_id)

    monkeypatch.setattr(FileSource, "encoded", encoded)
    data = colour_data(root=photos, global_batch_size=4, workers=workers, max_bad_fraction=1.0)
    module = build(data, eval=replace(EVAL, resize=16))
    loader = module.train_dataloader()
    for epoch in range(3):
        module.position = epoch * module.plan.micro_batches_per_epoch
        for raw in loader:
            module.finish(raw)
    evaluated(module)
    asked = diary.read_text().splitlines()
    # Two workers may meet the same one at the same moment.
    assert all(1 <= asked.count(f"train {i}") <= 1 + (workers > 0) for i in range(6))
    assert asked.count("train 30") > 2 and module.unreadable == 6


def test_with_one_step_an_epoch_nothing_can_stand_in(photos: Path) -> None:
    break_a_block(photos, 1)
    module = build(colour_data(root=photos, global_batch_size=40, max_bad_fraction=0.5))
    with pytest.raises(
        DataError, match=r"00\.jpg cannot be read, and with a single step an epoch .*=40 of 40 images"
    ):
        batches(module)


def test_unreadable_images_survive_a_resume(photos: Path) -> None:
    damage(photos)
    first = build(colour_data(root=photos, global_batch_size=8, max_bad_fraction=0.05))
    batches(first)
    resumed = build(colour_data(root=photos, global_batch_size=8, max_bad_fraction=0.05))
    resumed.load_state_dict(first.state_dict())
    assert resumed.unreadable == 2 and resumed.unreadable_by_source() == {"imagefolder/train": 2}
    for name in ("cat/06.jpg", "cat/08.jpg"):
        (photos / "train" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"[34] of 40"):
        batches(resumed)


class Inverted(FileSource):
    """Decodes in a way of its own."""

    def read(self, sample_id: int) -> Tensor:
        return 255 - super().read(sample_id)


def test_sources_may_decode_in_a_way_of_their_own(photos: Path) -> None:
    source = build(colour_data(root=photos)).train_source
    assert isinstance(source, FileSource)
    inverted = Inverted("mine", "train", source.root, source.paths, source.labels, source.class_names)
    ours, theirs = (ImageReader(images).read_all([0, 1])[1] for images in (inverted, source))
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, 255 - theirs)


def test_what_was_fetched_takes_no_memory_once_it_is_decoded(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Content(bytearray):
        """Bytes that are counted."""

        alive = 0

        def __init__(self, content: bytearray) -> None:
            super().__init__(content)
            Content.alive += 1

        def __del__(self) -> None:
            Content.alive -= 1

    source = build(colour_data(root=photos)).train_source
    read, decode, counts = FileSource.encoded, sources.decode, []

    def counted(data: bytearray, channels: int) -> Tensor:
        counts.append(Content.alive)
        return decode(data, channels)

    monkeypatch.setattr(FileSource, "encoded", lambda images, i: Content(read(images, i)))
    monkeypatch.setattr(sources, "decode", counted)
    ImageReader(source).read_all(range(4))
    assert counts == [4, 3, 2, 1]


class Hanging(ImageSource):
    """One image never comes."""

    is_array = False

    def __init__(self) -> None:
        super().__init__("hanging", "train", 3, np.arange(40) % 2, ("cat", "dog"))

    def __len__(self) -> int:
        return 40

    def _identity(self) -> bytes:
        return b""

    def read(self, sample_id: int) -> Tensor:
        time.sleep(1000 * (sample_id == 17))
        return torch.zeros(3, 16, 16, dtype=torch.uint8)


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    """They leave signals to a run, which kills them at its end; here there is none."""
    yield
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.mark.parametrize("which", ["training", "evaluation"])
@pytest.mark.usefixtures("no_workers_left")
def test_a_loader_that_gives_nothing_is_given_up(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # for a worker to leave
    data = colour_data("fake", workers=2, timeout=0.5)
    module = build(data, source=Hanging())
    module._eval_sets = [
        EvalSet(name="", split="train", num_classes=2, source=module.train_source, sample_id=torch.arange(40))
    ]
    loader = module.train_dataloader() if which == "training" else module.val_dataloader()[0]
    with pytest.raises(
        DataError,
        match=r"no images of hanging/train came for 0\.5 s: process \d+ is reading hanging/train\[17\];",
    ):
        list(loader)


def test_nothing_readable_at_all(photos: Path) -> None:
    module = build(colour_data(root=photos, max_bad_fraction=1.0))
    for path in (photos / "train").rglob("*.*"):
        path.unlink()
    with pytest.raises(DataError, match="cannot be read, nor can any of the 3 that may stand in for it"):
        batches(module)


# -- evaluation -----------------------------------------------------------------------------------


def evaluated(module: SSLDataModule) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Batches of every evaluation loader, as a method gets them."""
    return [
        [
            tuple(module.on_after_batch_transfer(module.on_before_batch_transfer(raw, k), k))  # type: ignore[misc]
            for raw in loader
        ]
        for k, loader in enumerate(module.val_dataloader())
    ]


def rank_eval_ids(rank: int, world: int, module: SSLDataModule) -> list[list[int]]:
    return [[i for batch in loader for i in batch[1].tolist()] for loader in evaluated(module)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_shards_cover_each_sample_once(photos: Path, world: int) -> None:
    module = build(colour_data(root=photos), world=world, eval=replace(EVAL, resize=20))
    per_rank = run_ranks(world, rank_eval_ids, module)
    sets = module.eval_sets()
    assert [(s.name, s.split, s.size, s.num_classes) for s in sets] == [
        ("", "train", 40, 2),
        ("", "test", 10, 2),
    ]
    for k, s in enumerate(sets):
        assert [i for r in per_rank for i in r[k]] == list(range(s.size))


def test_evaluation_images_equal_torchvision(photos: Path) -> None:
    config = replace(EVAL, resize=20)
    module = build(colour_data(root=photos), eval=config)
    for images, ids, labels in evaluated(module)[1]:
        source = module.eval_sets()[1].source
        for image, i, label in zip(images, ids.tolist(), labels.tolist(), strict=True):
            want = TF.center_crop(TF.resize(source.read(i), [20], antialias=True), [16, 16])
            want = TF.normalize(want.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
            assert (image - want).abs().max() < 1e-5
            assert source.labels is not None and label == source.labels[i]


@pytest.mark.parametrize(("bank", "probe"), [(11, 9), (9, 11)])
def test_features_are_needed_of_the_larger_subset(bank: int, probe: int) -> None:
    config, learned = replace(EVAL, bank_size=bank, knn_k=5), replace(PROBE, train_size=probe)
    module = build(colour_data(), source=fake_source(40, 3, 24, 5), eval=config, probe=learned)
    train, test = module.eval_sets()
    assert (train.size, test.size) == (11, 40)
    ids = [i for batch in evaluated(module)[0] for i in batch[1].tolist()]
    assert ids == train.sample_id.tolist() == sorted(set(ids))
    for whole in (replace(config, bank_size=None), config):
        of_all = build(
            colour_data(),
            source=fake_source(40, 3, 24, 5),
            eval=whole,
            probe=learned if whole.bank_size is None else PROBE,
        )
        assert of_all.eval_sets()[0].size == 40


def test_labels_elsewhere(photos: Path) -> None:
    probe = ProbeConfig(lrs=(0.1,), data=(SourceConfig(dataset="imagefolder", root=str(photos)),))
    config = replace(EVAL, resize=16)
    module = build(colour_data("folder", photos), probe=probe, eval=config)
    assert module.num_classes == 0 and module.example_batch(2).label is None
    assert [(s.name, s.split, s.size) for s in module.eval_sets()] == [
        ("imagefolder", "train", 40),
        ("imagefolder", "test", 10),
    ]
    assert sum(len(b[0]) for b in evaluated(module)[1]) == 10
    assert all(labels is None for _, _, labels in evaluated(module)[2])  # of the training data itself
    assert build(colour_data("folder", photos)).eval_sets() == []


def test_fake_data_stand_in_for_all_sources() -> None:
    probe = ProbeConfig(lrs=(0.1,), data=(SourceConfig(dataset="cifar100", root="/nowhere"),))
    module = build(colour_data("folder", "/nowhere"), source=fake_source(24, 3, 16, 0), probe=probe)
    assert [(s.name, s.num_classes) for s in module.eval_sets()] == [("cifar100", 100)] * 2
    assert evaluated(module)[0][0][0].shape == (7, 3, 16, 16)


def test_unreadable_test_images_are_left_out(photos: Path) -> None:
    name = next((photos / "val/cat").glob("*.png"))
    name.write_bytes(b"")
    config = replace(EVAL, resize=16)
    module = build(colour_data(root=photos, max_bad_fraction=0.2), eval=config)
    assert sum(len(b[0]) for b in evaluated(module)[1]) == 9
    with pytest.raises(RuntimeError, match="1 of 10 images"):
        evaluated(build(colour_data(root=photos), eval=config))


def test_too_few_images_to_evaluate_are_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.knn_k=41 exceeds the 40 training images of imagefolder"):
        build(colour_data(root=photos), eval=replace(EVAL, knn_k=41)).eval_sets()
    few = build(colour_data(root=photos, global_batch_size=11), world=11)
    with pytest.raises(
        ValueError, match=r"'test' has 10 image\(s\) to evaluate, fewer than the 11 processes"
    ):
        few.eval_sets()


def rank_evaluation(rank: int, world: int, module: SSLDataModule) -> str:
    """What evaluation says at its end."""
    try:
        evaluated(module)
        module.share_unreadable()
    except DataError as error:
        return str(error)
    return str(module.unreadable_by_source())


@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_ranks_add_up_their_bad_images_in_evaluation(photos: Path, fraction: float) -> None:
    for c in ("cat", "dog"):  # each rank has one of these classes
        next((photos / "val" / c).iterdir()).write_bytes(b"")
    data = colour_data(root=photos, max_bad_fraction=fraction)
    outcomes = run_ranks(2, rank_evaluation, build(data, world=2, eval=replace(EVAL, resize=16)))
    if fraction < 0.2:
        assert all("2 of 10 images of imagefolder cannot be read" in o for o in outcomes)
    else:
        assert outcomes == ["{'imagefolder/train': 0, 'imagefolder/test': 2}"] * 2


def test_mistakes_are_named(photos: Path) -> None:
    small = build(colour_data(), source=fake_source(40, 3, 24, 5), eval=replace(EVAL, size=64))
    with pytest.raises(ValueError, match=r"eval\.size=64 .*24 px"):
        small.val_dataloader()
    with pytest.raises(DataError, match=r"train/cat/00\.jpg: eval\.size=64 is larger"):
        evaluated(build(colour_data(root=photos), eval=replace(EVAL, size=64)))
    padded = ViewConfig(size=640, padding=4)
    with pytest.raises(DataError, match="does not fit into an image of"):
        batches(build(colour_data(root=photos), views=(padded,)))
    (photos / "val/dog").rename(photos / "val/wolf")
    with pytest.raises(ValueError, match="different classes"):
        build(colour_data(root=photos)).eval_sets()


# -- with a Trainer -------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        self.dtypes.add(batch.global_views[0].dtype)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.dtypes.add(batch.image.dtype)

    def on_train_batch_end(self, *args: Any) -> None:
        self.trainer.datamodule.position += 1  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_a_trainer_gets_the_same_batches(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    def module() -> SSLDataModule:
        return build(colour_data(), source=fake_source(40, 3, 24, 5))

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    recorder, data = Recorder(), module()
    trainer.fit(recorder, datamodule=data)
    assert data.position == 6 and recorder.dtypes == {dtype}
    want = module()
    epochs = batches(want)
    want.position = 3
    epochs += batches(want)
    for a, b in zip(recorder.batches, epochs, strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        assert torch.equal(a.global_views[1].float(), b.global_views[1])
