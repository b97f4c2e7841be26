"""The history that dashboards show, read from the files of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslzoo.callbacks.histograms import delete_after
from sslzoo.dashboards.history import History, current_pictures, last_values, read_rows
from sslzoo.dashboards.tensorboard import TensorBoard, write_evaluations
from sslzoo.panels import sections

METRICS = """\
step,epoch,train/loss,train/loss_epoch,val/knn_top1
2,0,3.0,,
3,0,,,0.5
3,0,2.0,2.5,
5,1,1.0,,
6,1,"""
# Step 3 was repeated after a kill, and is not the first row of its step.
SYSTEM = "step,epoch,sys/data_wait\n2,0,0.1\n3,0,0.2\n3,0,0.3\n5,1,0.4\n"


def _files(folder: Path) -> Path:
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "system.csv").write_text(SYSTEM)
    histogram = {"name": "method/u", "step": 3, "counts": [1, 2], "edges": [0.0, 1.0, 2.0]}
    (folder / "histograms.jsonl").write_text(json.dumps(histogram) + '\n{"name": "unfinis')
    (folder / "pictures").mkdir()
    for name in ("views.png", "pictures/map-step=4.png", "pictures/last.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_rows_have_what_belongs_to_their_step(tmp_path: Path) -> None:
    rows = read_rows(_files(tmp_path))
    assert [(row.step, row.epoch, row.values) for row in rows] == [
        (2, 0, {"train/loss": 3.0, "sys/data_wait": 0.1}),
        (3, 0, {"val/knn_top1": 0.5, "sys/data_wait": 0.3}),
        (3, 0, {"train/loss": 2.0}),
        (5, 1, {"train/loss": 1.0, "sys/data_wait": 0.4}),
    ]  # the last line is unfinished
    assert [[histogram.name for histogram in row.histograms] for row in rows] == [[], ["method/u"], [], []]
    assert [list(row.pictures) for row in rows] == [
        ["pictures/views"],
        [],
        [],
        ["pictures/map"],
    ]
    assert read_rows(tmp_path, 2) == rows[:2]
    assert last_values(rows) == {"train/loss": 1.0, "val/knn_top1": 0.5, "sys/data_wait": 0.4}
    assert list(current_pictures(tmp_path)) == ["pictures/last"]
    assert read_rows(tmp_path / "nothing") == []


def test_what_is_read_piece_by_piece_is_what_is_read_at_once(tmp_path: Path) -> None:
    """While the file grows: by a part of a row, and by a column, for which it is written anew."""
    file, history = _files(tmp_path) / "metrics.csv", History(tmp_path)
    rows = [*history.read(1), *history.read(1), *history.read(2)]
    file.write_text(METRICS + "1.5,,\n")
    rows += history.read(4)
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures/map-step=6.png")
    late = {"name": "method/u", "counts": [1, 2], "edges": [0.0, 1.0, 2.0]}
    with (tmp_path / "histograms.jsonl").open("w") as lines:
        lines.writelines(json.dumps(late | {"step": step}) + "\n" for step in (3, 6, 9))
    head, *others = file.read_text().splitlines()
    file.write_text("\n".join([f"{head},new", *(f"{line}," for line in others), "7,1,0.5,,,1.0", ""]))
    rows += history.read()
    assert history.read() == [] and len(rows) == 6
    assert rows == read_rows(tmp_path)
    assert [row.histograms[0].step for row in rows if row.histograms] == [3, 6]
    assert list(rows[4].pictures) == ["pictures/map"] and rows[5].values == {"train/loss": 0.5, "new": 1.0}


DAMAGED = (
    b'{"name": "method/u", "step": 3, "counts": [1,{"name": "method/u", "step": 3}\n',  # by a full disk
    b"\x00\xff\xfe\x80\n",
    b'{"name": "method/u", "step": 3, "counts": [1, 2], "edges": [0.0, 1.0]}\n',
    b"3\n",
)


def test_a_damaged_histogram_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one warning for each line, whatever shows the run; the start after it deletes the line."""
    file = _files(tmp_path) / "histograms.jsonl"
    first, unfinished = file.read_bytes().splitlines(keepends=True)
    last = first.replace(b"3", b"5")
    file.write_bytes(b"".join([first, *DAMAGED, last, unfinished]))
    warnings = [f"line {line} of {file} is damaged and left out" for line in (2, 3, 4, 5)]
    rows = History(tmp_path).read()
    assert [row.histograms[0].step for row in rows if row.histograms] == [3, 5]
    board = TensorBoard(tmp_path, sections("simclr", ()))
    board.begin(4)
    board.end()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("method/u")] == [3, 5]
    assert caplog.messages == warnings
    delete_after(tmp_path, 5)
    assert file.read_bytes() == first + last
    delete_after(tmp_path, 4)
    assert file.read_bytes() == first
    assert caplog.messages == warnings


def test_a_file_that_is_no_picture_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _files(tmp_path)
    (folder / "pictures/mine-step=3.png").touch()
    (folder / "pictures/mine.png").touch()
    with caplog.at_level(logging.WARNING):
        board = TensorBoard(folder, sections("simclr", ()))
        board.begin(4)
        board.saved(4)
        board.end()
    assert [message.partition(", which")[0] for message in caplog.messages] == [
        f"TensorBoard does not show {folder}/pictures/{name}.png" for name in ("mine-step=3", "mine")
    ]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (shown,) = events.Images("pictures/map")
    assert shown.encoded_image_string == (folder / "pictures/map-step=4.png").read_bytes()
    assert (shown.step, shown.width, shown.height) == (4, 4, 4)


def test_tensorboard_forgets_what_a_kill_takes_back(tmp_path: Path) -> None:
    folder = _files(tmp_path)
    for kept, loss in (
        (3, 1.0),
        (3, 0.75),
    ):  # the second start repeats the step after row 3, with another result
        board = TensorBoard(folder, sections("simclr", ()))
        board.begin(kept)
        board.add(5, {"train/loss": loss, "train/loss_epoch": 9.0})
        Image.new("RGB", (4, 4)).save(folder / "pictures/map-step=5.png")
        board.saved(4)
        board.end()
    for accuracy in (0.5, 0.625):
        write_evaluations(folder, {"eval/knn_top1": accuracy}, 5)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (2, 3.0),
        (3, 2.0),
        (5, 0.75),
    ]
    assert [event.value for event in events.Scalars("eval/knn_top1")] == [0.625]
    assert "train/loss_epoch" not in events.Tags()["scalars"]
    (histogram,) = events.Histograms("method/u")
    assert histogram.step == 3 and histogram.histogram_value.num == 3
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"pictures/views": [0], "pictures/map": [4, 5], "pictures/last": [0]}
