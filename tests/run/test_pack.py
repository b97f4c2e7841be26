"""``sslzoo pack`` as a process: killed, stopped, on a full disk; and a run that goes over to packed data."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sslzoo.cli.main import main
from sslzoo.data import pack_writer
from sslzoo.data.datasets import open_source
from sslzoo.data.packed import ROW_OF_PIXELS
from sslzoo.data.sources import FileSource
from sslzoo.recipe.sections import SourceConfig
from sslzoo.run.pack import pack, verify
from sslzoo.testing.kills import digest_of
from tests.command import children, fork, saved, until, write_recipe
from tests.run.test_images import write_pictures, write_shards


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 12 of them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes of them without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    pack(pictures, folder, dataset=None, splits=(), options=pack_writer.PackOptions(raw=True), workers=0)
    return folder


def _slow() -> None:
    """A disk that needs its time."""
    pack_writer._CHUNK = 1
    read = FileSource.encoded

    def encoded(self: FileSource, sample_id: int) -> bytearray:
        time.sleep(0.02)
        return read(self, sample_id)

    FileSource.encoded = encoded  # type: ignore[method-assign]


def _small_files() -> None:
    """A file may have 8,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    pack_writer._CHUNK = 1


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 75, "sslzoo pack: SIGTERM; the same command continues"),
        (signal.SIGINT, 130, "sslzoo pack: interrupted; the same command continues"),
    ],
)
def test_a_pack_that_was_ended_continues(
    pictures: Path, whole: Path, tmp_path: Path, number: int, code: int, said: str
) -> None:
    command = ("pack", pictures, tmp_path / "packed", "--raw", "--workers", "1")
    first = fork(tmp_path, *command, before=_slow)
    rows = tmp_path / "packed/train.partial/index.part"
    five = 5 * pack_writer.row_of(ROW_OF_PIXELS).itemsize
    assert until(lambda: rows.exists() and rows.stat().st_size > five), first.said
    first.signal(number)
    assert first.wait() == code, first.said
    assert first.err.strip() == said
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["train.partial"]
    again = fork(tmp_path, *command)
    assert again.wait() == 0, again.said
    assert "of them were there" in again.out and "data.dataset=packed" in again.out and not again.err
    assert _contents(tmp_path / "packed") == _contents(whole)


def test_too_many_unreadable_images_end_the_command_which_continues(pictures: Path, tmp_path: Path) -> None:
    source, dest = tmp_path / "pictures", tmp_path / "packed"
    shutil.copytree(pictures, source)
    damaged = [source / name for name in ("train/a/01.png", "train/b/00.png", "test/c/03.png")]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"")
    command = ("pack", source, dest, "--raw", "--workers", "1")
    for name in ("first", "unchanged"):
        ended = fork(tmp_path, *command, name=name, before=_slow)
        assert ended.wait() == 1, ended.said
        assert ended.err == (
            f"sslzoo pack: 1 of 48 images in {source}/train cannot be read, more than --max-bad-fraction=0.01 allows: "
            f"{damaged[0]} (empty); repair them and run the same command again, which continues, or raise "
            f"--max-bad-fraction; if you remove them instead, delete {dest}/train.partial too\n"
        )
        assert [path.name for path in dest.iterdir()] == ["train.partial"]
    for path, content in zip(damaged[:2], whole, strict=False):
        path.write_bytes(content)
    repaired = fork(tmp_path, *command, name="repaired")
    assert repaired.wait() == 1 and "; 1 of them were there" in repaired.out, repaired.said
    assert "1 of 12 images" in repaired.err and "test/c/03.png (empty)" in repaired.err
    allowed = fork(tmp_path, *command, "--max-bad-fraction", "0.1", name="allowed")
    assert allowed.wait() == 0 and not allowed.err, allowed.said
    assert allowed.out.splitlines()[-3:] == [
        f"{dest}/test: 1 of 12 images cannot be read; training will put others in their place:",
        f"  {damaged[2]} (empty)",
        f"use it by: data.dataset=packed data.root={dest}",
    ]
    assert verify(dest)
    folder, packed = (
        open_source(SourceConfig(dataset=dataset, root=str(root)), 3)
        for dataset, root in (("imagefolder", source), ("packed", dest))
    )
    assert all(torch.equal(folder.read(i), packed.read(i)) for i in range(48))


def _large() -> None:
    """A pipe does not hold one image."""
    pack_writer._CHUNK = 1
    read = FileSource.encoded
    FileSource.encoded = lambda self, i: read(self, i) + bytes(200_000)  # type: ignore[method-assign]


def test_a_killed_pack_takes_its_worker_along(pictures: Path, tmp_path: Path) -> None:
    command = fork(tmp_path, "pack", pictures, tmp_path / "packed", "--workers", "1", before=_large)
    rows = tmp_path / "packed/train.partial/index.part"
    assert until(lambda: rows.exists() and rows.stat().st_size and children(command.pid)), command.said
    command.signal(signal.SIGSTOP)  # the worker fills the pipe, and waits
    (worker,) = children(command.pid)
    time.sleep(0.2)
    command.signal(signal.SIGKILL)
    stat = Path(f"/proc/{worker}/stat")
    gone = until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", 10)
    if not gone:
        os.kill(worker, signal.SIGKILL)
    assert gone


def test_a_full_disk_leaves_nothing_half_done(pictures: Path, tmp_path: Path) -> None:
    command = ("pack", pictures, tmp_path / "packed", "--raw", "--workers", "0")
    first = fork(tmp_path, *command, before=_small_files)
    assert first.wait() == 1, first.said
    (line,) = first.err.splitlines()
    assert (
        "File too large: " in line and "has 11 of 48 images and needs about 28.4 kB more; free them" in line
    )
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["train.partial"]
    again = fork(tmp_path, *command)
    assert again.wait() == 0 and "; 11 of them were there" in again.out, again.said


def test_a_disk_without_the_room_is_refused_before(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = pack_writer.shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: usage)
    assert main(["pack", str(pictures), str(tmp_path / "packed"), "--raw", "--workers", "0"]) == 1
    assert (
        "train.partial needs about 36.9 kB more, and its disk has 20.0 kB free; free some"
        in capsys.readouterr().err
    )
    monkeypatch.undo()  # nothing was written that would bind the next command to these options
    assert main(["pack", str(pictures), str(tmp_path / "packed"), "--short-side", "8", "--workers", "0"]) == 0


def test_a_disk_that_is_full_at_once_is_said_to_need_the_whole(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_writer, "_write", full)
    assert main(["pack", str(pictures), str(tmp_path / "packed"), "--raw", "--workers", "0"]) == 1
    assert "has 0 of 48 images and needs about 36.9 kB more; free them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["IN"], "give the folder of images and the folder to write: sslzoo pack SRC DST"),
        (["IN", "OUT", "--short-side", "0"], "--short-side must be positive, got 0"),
        (["IN", "OUT", "--channels", "1"], "--channels needs --raw or --short-side"),
        (["IN", "OUT", "--max-bad-fraction", "2"], "--max-bad-fraction must lie in [0, 1], got 2.0"),
        (["IN", "OUT", "--workers", "-1"], "--workers must not be negative"),
        (["--verify", "OUT", "--raw"], "--verify DST takes nothing else"),
        (["--verify", "OUT"], "OUT holds no packed data; it has a folder for each split"),
        (["", "OUT"], "the name of a folder is empty; . is the working directory"),
        (["IN", "IN/train/a/00.png"], "IN/train/a/00.png is not a folder; choose another DST"),
        (["IN", "IN/train/a/00.png/x"], "IN/train/a/00.png is not a folder; choose another DST"),
        (["IN", "OUT", "--split", "../train"], "--split must be the name of a split, such as train, got"),
        (["IN/nowhere", "OUT"], "IN/nowhere is not a folder"),
        (["PACKED", "OUT"], "PACKED is packed already"),
        (["IN", "IN/packed"], "IN/packed lies in IN, whose images are to be packed; choose a place outside"),
        (["IN", "OUT", "--dataset", "cifar10"], "--dataset must be one of imagefolder, folder, "),
        (["IN", "OUT", "--split", "tset"], "there is no tset. Expected under"),
        (["IN", "OUT", "--dataset", "imagenet1k"], "imagenet1k has 1000 classes, but 3 were found"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    pictures: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    places = {"IN": str(pictures), "OUT": str(tmp_path / "out"), "PACKED": str(whole)}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert main(["pack", *map(placed, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sslzoo pack: ") and placed(said) in line


def test_a_run_on_the_folder_continues_on_packed_data(pictures: Path, tmp_path: Path) -> None:
    """Killed, and then bit-equal to the run that only ever saw the folder."""
    packed = tmp_path / "packed"
    assert fork(tmp_path, "pack", pictures, packed, "--raw", "--channels", "1", "--workers", "0").wait() == 0
    write_recipe(tmp_path)
    common = (
        "fit",
        "--recipe",
        "tiny.yaml",
        "eval.resize=12",
        "eval.baselines=false",
        "trainer.max_epochs=2",
    )
    folder = ("data.dataset=imagefolder", f"data.root={pictures}")
    whole = fork(tmp_path, *common, "--out", "whole", *folder, name="whole")
    begun = fork(tmp_path, *common, "--out", "run", *folder, faults={"pause": 0.2})
    assert until(lambda: saved(tmp_path / "run")), begun.said
    begun.signal(signal.SIGKILL)
    begun.wait()
    assert whole.wait() == 0, whole.said
    others = ("data.dataset=packed", f"data.root={packed}")
    again = fork(tmp_path, *common, "--out", "run", *others, "--resume", "auto")
    assert again.wait() == 0, again.said
    assert digest_of(tmp_path / "run") == digest_of(tmp_path / "whole")
    first, second = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "run"))
    assert first == second


def test_tar_files_are_packed_as_their_images(pictures: Path, tmp_path: Path) -> None:
    """Whether each split has a folder, or its name in that of the files."""
    write_shards(pictures, tmp_path / "shards")
    (tmp_path / "flat").mkdir()
    for shard in (tmp_path / "shards").glob("*/*.tar"):
        shutil.copy(shard, tmp_path / f"flat/mine-{shard.parent.name}-{shard.name}")
    for place in ("shards", "flat"):
        source, dest = tmp_path / place, tmp_path / f"packed {place}"
        pack(source, dest, dataset=None, splits=(), options=pack_writer.PackOptions(), workers=0)
        assert sorted(path.name for path in dest.iterdir()) == ["test", "train"]
        for split in ("train", "test"):
            want = open_source(SourceConfig(dataset="webdataset", root=str(source), split=split), 1)
            got = open_source(SourceConfig(dataset="packed", root=str(dest), split=split), 1)
            assert got.labels is not None and want.labels is not None
            assert got.class_names == want.class_names and got.labels.tolist() == want.labels.tolist()
            assert all(torch.equal(got.read(i), want.read(i)) for i in range(len(want)))
            assert got.where(3) == f"{dest}/{split}: 0/03.png"
