"""A run whose images do not come as they should: its exit code, its last lines, its manifest."""

from __future__ import annotations

import csv
import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.command import children, fork, manifest, until, write_recipe


def write_pictures(folder: Path) -> list[str]:
    """48 + 12 grey pictures of three classes, and the overrides that train on them."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for c in "abc":
            (folder / split / c).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(draw.integers(0, 256, (14, 16), dtype=np.uint8))
                image.save(folder / split / c / f"{i:02}.png")
    return ["data.dataset=imagefolder", f"data.root={folder}", "eval.resize=12"]


def damage(path: Path) -> None:
    """One bit of its pixels."""
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)


def test_damaged_images_are_counted_in_the_manifest(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "pictures")
    for name in ("train/a/03.png", "train/b/04.png", "test/c/00.png"):
        damage(tmp_path / "pictures" / name)
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    allowed = [*images, "data.max_bad_fraction=0.1", "data.workers=1", "trainer.max_epochs=1"]
    first = fork(tmp_path, "fit", "--recipe", recipe, "--out", run, *allowed)
    assert first.wait() == 0, first.said
    found = {"imagefolder/train": 2, "imagefolder/test": 1}
    assert manifest(run)["unreadable_images"] == manifest(run)["sessions"][0]["unreadable_images"] == found
    assert first.err.count("warning: unreadable image:") == 3, first.err


def write_shards(folder: Path, shards: Path) -> list[str]:
    """The pictures of ``folder`` in tar files, and the overrides that train on them."""
    for split in ("train", "test"):
        (shards / split).mkdir(parents=True)
        for k in range(3):
            with tarfile.open(shards / split / f"{k}.tar", "w") as tar:
                for path in sorted((folder / split / "abc"[k]).iterdir()):
                    for name, content in ((f"{path.stem}.cls", b"%d" % k), (path.name, path.read_bytes())):
                        member = tarfile.TarInfo(f"{k}/{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return ["data.dataset=webdataset", f"data.root={shards}", "eval.resize=12"]


def test_a_killed_run_on_tar_files_ends_as_one_on_the_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    images = write_pictures(tmp_path / "pictures")
    shards = write_shards(tmp_path / "pictures", tmp_path / "shards")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--recipe", recipe, "trainer.max_epochs=1", "data.workers=1"]
    first = fork(tmp_path, "fit", *options, "--out", whole, *images, name="folder")
    begun = ["fit", *options, "--out", killed, *shards]
    command = fork(tmp_path, *begun, faults={"pause": 0.2}, name="killed")
    assert until(lambda: list(killed.glob("checkpoints/step=*.ckpt")) or command.ended), command.said
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    again = fork(tmp_path, *begun, "--resume", "auto", name="again")
    assert again.wait() == first.wait() == 0, again.said + first.said
    assert len(manifest(killed)["sessions"]) == 2
    assert measured(killed) == measured(whole) != []


def measured(run: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without what depends on the machine."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("sys/")} for row in csv.DictReader(file)]


def _hasty() -> None:
    """A worker that does not leave is waited for five seconds otherwise."""
    from torch.utils.data import _utils

    _utils.MP_STATUS_CHECK_INTERVAL = 0.1  # type: ignore[attr-defined]


def test_a_stopped_worker_ends_the_run(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "pictures")
    run = tmp_path / "run"
    options = [*images, "data.workers=1", "data.timeout=1", "trainer.max_epochs=99"]
    command = fork(tmp_path, "fit", "--recipe", write_recipe(tmp_path), "--out", run, *options, before=_hasty)
    assert until(lambda: (run / "metrics.csv").exists() and children(command.pid)), command.said
    for worker in children(command.pid):
        os.kill(worker, signal.SIGSTOP)
    assert command.wait() == 1, command.said
    assert "sslzoo fit: no images of imagefolder/" in command.err and "came for 1 s: " in command.err
    assert "Traceback" not in command.err and "--resume auto" in command.last
    assert manifest(run)["error"]["kind"] == "DataError"


def test_more_neighbours_than_images_are_refused_before_the_run(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "pictures")
    recipe = write_recipe(tmp_path)
    for more in ([], ["--dry-run"]):
        command = fork(tmp_path, "fit", "--recipe", recipe, *more, *images, "eval.knn_k=49")
        assert command.wait() == 2
        assert "eval.knn_k=49 exceeds the 48 training images of imagefolder" in command.last, command.said
