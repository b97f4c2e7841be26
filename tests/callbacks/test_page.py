"""The page is redrawn while that is cheap, and never ends a run."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sslzoo.callbacks.page import PageRefresh

MODULE: Any = None


class Clock:
    """A clock that only moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer(*, leader: bool = True) -> Any:
    return SimpleNamespace(is_global_zero=leader)


def test_drawing_takes_one_per_cent_of_the_time() -> None:
    clock, drawn = Clock(), []

    def draw() -> None:
        drawn.append(clock.now)
        clock.now += 1.0

    page = PageRefresh(draw, clock)
    page.on_train_start(trainer(), MODULE)
    page.on_validation_end(trainer(), MODULE)
    for _ in range(1000):  # evaluations, 10 seconds apart
        clock.now += 10.0
        page.on_validation_end(trainer(), MODULE)
    assert len(drawn) / clock.now == pytest.approx(0.01, rel=0.02)
    assert drawn[0] == 0.0


def test_other_ranks_do_not_draw() -> None:
    drawn: list[int] = []
    page = PageRefresh(lambda: drawn.append(1), Clock())
    page.on_train_start(trainer(leader=False), MODULE)
    page.on_validation_end(trainer(leader=False), MODULE)
    assert not drawn


def test_a_page_that_cannot_be_drawn_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def draw() -> None:
        calls.append(1)
        raise OSError("the disk is full")

    page = PageRefresh(draw, Clock())
    with caplog.at_level(logging.WARNING):
        page.on_train_start(trainer(), MODULE)
        page.on_validation_end(trainer(), MODULE)
        page.on_validation_end(trainer(), MODULE)
    assert calls == [1, 1], "it is tried again"
    assert caplog.messages == ["report.html could not be drawn: OSError: the disk is full"]
