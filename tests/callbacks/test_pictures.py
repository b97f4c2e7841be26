"""Pictures are drawn after evaluations while that is cheap, and none ends a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from sslzoo.batch import Batch
from sslzoo.callbacks import pictures
from sslzoo.callbacks.pictures import Pictures, draw_views
from sslzoo.callbacks.watch import Watch
from sslzoo.data.sources import UnreadableImageError
from sslzoo.method import SSLMethod
from sslzoo.pictures import CELL, Drawing, caption_of, numbered, path_of

GALLERY = {
    "step": 6, "epoch": 2, "class_names": ["a", "b"],
    "map": {"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.0], "label": [0, 1, -1], "explained": [0.75, 0.25]},
    "neighbours": [
        {
            "query": {"sample_id": 0, "label": 0, "image": ""},
            "nearest": [{"sample_id": 4, "label": 1, "image": "", "cosine": 0.5}],
        }
    ],
}  # fmt: skip


class Data:
    """Two training images, of which the second cannot be read, with one view each."""

    data = SimpleNamespace(mean=(0.5,), std=(0.25,))
    train_source = SimpleNamespace(labels=np.array([1, 0]), class_names=("a", "b"))

    def __init__(self) -> None:
        self.train_source.read = self._read

    def varied_samples(self, n: int) -> list[int]:
        return [0, 1]

    def batch_of(self, sample_id: list[int], epoch: int) -> Batch:
        level = 0.2 * epoch
        view = torch.full((2, 1, 4, 4), (level - 0.5) / 0.25)
        return Batch((view,), (), torch.tensor(sample_id))

    def _read(self, sample: int) -> torch.Tensor:
        if sample:
            raise UnreadableImageError("1.png", "it is cut short")
        return torch.full((1, 4, 4), 7, dtype=torch.uint8)


@pytest.fixture
def watch() -> Watch:
    analysis = Mock()
    analysis.cfg.name = "mine"
    analysis.draw = lambda history: {"plot": Drawing(Image.new("RGB", (1, 1)), f"{len(history)} looks")}
    return Watch(analysis)


class Clock:
    """A clock that only moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _pictures(run: Path, watch: Watch) -> tuple[Pictures, Clock]:
    """Those of a run that has just started."""
    clock = Clock()
    callback = Pictures(run, run / "gallery.json", [watch], clock)
    callback.on_train_start(Mock(), Mock())
    return callback, clock


def _validate(callback: Pictures, *, step: int = 6, epoch: int = 1, leader: bool = True) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=leader, current_epoch=epoch, max_epochs=9, datamodule=Data()
    )
    callback.on_validation_end(trainer, Mock(spec=SSLMethod, optimizer_steps=step))


def _shown(run: Path) -> Iterator[tuple[int, str]]:
    return ((step, name) for step, name, _ in numbered(run))


def test_every_evaluation_is_shown(tmp_path: Path, watch: Watch) -> None:
    (tmp_path / "gallery.json").write_text(json.dumps(GALLERY))
    callback, _ = _pictures(tmp_path, watch)
    _validate(callback, leader=False)
    assert not list(_shown(tmp_path))
    _validate(callback)
    assert list(_shown(tmp_path)) == [
        (6, name) for name in ("embedding_map", "mine_plot", "neighbours", "views")
    ]
    assert caption_of(path_of(tmp_path, "mine_plot", 6)) == "0 looks"
    assert "after epoch 2: 3 images" in caption_of(path_of(tmp_path, "embedding_map", 6))
    _validate(callback, step=9)  # with features that are not finite, so that there is no new gallery
    assert [name for step, name in _shown(tmp_path) if step == 9] == ["mine_plot", "views"]


def test_views_of_the_first_epoch_are_drawn_once(tmp_path: Path, watch: Watch) -> None:
    """At the start of the run, or if that failed, by the first evaluation."""
    callback, _ = _pictures(tmp_path, watch)
    _validate(callback, step=3, epoch=0)
    (tmp_path / "views.png").touch()
    callback, _ = _pictures(tmp_path, watch)
    _validate(callback, step=4, epoch=0)
    assert list(_shown(tmp_path)) == [(3, "mine_plot"), (3, "views"), (4, "mine_plot")]


def test_drawing_takes_one_per_cent_of_the_time(tmp_path: Path, watch: Watch) -> None:
    callback, clock = _pictures(tmp_path, watch)

    def draw(history: object) -> dict[str, Drawing]:
        clock.now += 1.0
        return {"plot": Drawing(Image.new("RGB", (1, 1)), "")}

    watch.analysis.draw = draw
    for step in range(1, 25):  # evaluations, 10 seconds apart
        _validate(callback, step=step)
        clock.now += 10.0
    _validate(callback, step=25, epoch=8)  # the last
    _validate(callback, step=26)
    assert [step for step, name in _shown(tmp_path) if name == "mine_plot"] == [1, 21, 25]


def test_views_are_denormalised_below_their_originals() -> None:
    data: Any = Data()
    drawn = draw_views(data, epoch=2)
    assert isinstance(drawn.picture, Image.Image) and drawn.caption.startswith("Views of epoch 3.")
    middle, width, height = CELL // 2 + 3, drawn.picture.width // 2, drawn.picture.height // 2
    assert drawn.picture.getpixel((middle, middle)) == (7, 7, 7)
    assert drawn.picture.getpixel((width + middle, middle)) == (255, 255, 255)
    assert drawn.picture.getpixel((middle, height + middle)) == (102, 102, 102)
    assert drawn.picture.getpixel((width + middle, height + middle)) == (102, 102, 102)


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(drawing: Drawing, path: Path) -> None:
        raise OSError("the disk is full")

    (tmp_path / "gallery.json").write_text("not JSON")
    watch.analysis.draw = Mock(side_effect=KeyError("theta"))
    monkeypatch.setattr(pictures, "save", full)
    callback, _ = _pictures(tmp_path, watch)
    with caplog.at_level(logging.WARNING):
        _validate(callback)
        said = list(caplog.messages)
        _validate(callback)
    assert [message.partition(":")[0] for message in said] == [
        "views could not be drawn",
        "neighbours and map could not be drawn",
        "plots of mine could not be drawn",
    ]
    assert caplog.messages == said  # each kind of error once
    watch.analysis.draw.side_effect = ZeroDivisionError
    monkeypatch.undo()
    _validate(callback)
    assert [message.partition(":")[0] for message in caplog.messages[3:]] == [
        "plots of mine could not be drawn"
    ]
    assert list(_shown(tmp_path)) == [(6, "views")]
