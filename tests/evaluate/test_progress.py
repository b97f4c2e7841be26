"""The final evaluation shows how far it is, and comes to the same numbers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sslzoo.evaluate import final, progress
from sslzoo.evaluate.progress import EvaluationProgress, Report
from tests.evaluate.test_final import evaluated

STAGES = [
    "extracting training features",
    "extracting test features",
    *(
        f"{features}: {judgement}"
        for features in ("trained encoder", "random init", "raw pixels", "PCA-64")
        for judgement in ("linear probe", "linear probe by SGD", "k-NN")
    ),
]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


class Shown(EvaluationProgress):
    """Keeps what it writes and what is reported to it."""

    def __init__(self, *, terminal: bool, shown: bool = True) -> None:
        self.out, self.err = (
            Console(file=io.StringIO(), force_terminal=terminal, width=100) for _ in range(2)
        )
        self.fractions: dict[str, list[float]] = {}
        super().__init__(shown=shown, out=self.out, err=self.err)

    def stage(self, name: str) -> Report:
        report, fractions = super().stage(name), self.fractions.setdefault(name, [])

        def both(fraction: float) -> None:
            fractions.append(fraction)
            report(fraction)

        return both

    def written(self) -> tuple[str, str]:
        assert isinstance(self.out.file, io.StringIO) and isinstance(self.err.file, io.StringIO)
        return self.out.file.getvalue(), self.err.file.getvalue()


def _evaluated(folder: Path, shown: EvaluationProgress, **options: Any) -> dict[str, Any]:
    summary = evaluated(folder, **({"baselines": True, "classes": 4} | options), progress=shown)
    return {key: value for key, value in summary.items() if key != "evaluation_seconds"}


def test_the_summary_is_the_same_with_and_without(tmp_path):
    silent = _evaluated(tmp_path / "silent", EvaluationProgress())
    for terminal in (True, False):
        assert _evaluated(tmp_path / str(terminal), Shown(terminal=terminal)) == silent


def test_every_stage_moves_and_comes_to_its_end(tmp_path):
    shown = Shown(terminal=True)
    _evaluated(tmp_path, shown)
    assert list(shown.fractions) == STAGES
    for name, fractions in shown.fractions.items():
        assert fractions == sorted(set(fractions)) and fractions[-1] == 1, name
        if "k-NN" not in name:  # the test set is one chunk of it
            assert len(fractions) > 2, name


def test_a_bar_in_a_terminal(tmp_path):
    shown = Shown(terminal=True)
    _evaluated(tmp_path, shown)
    out, err = shown.written()
    assert out == ""
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err).rpartition("final evaluation")[2]
    assert re.fullmatch(r" ━+ 100 % done in \d+ s\s*", last)
    assert err.endswith("\n\x1b[?25h")  # the cursor is back


def test_the_bar_grows_through_all_stages():
    shown = Shown(terminal=True)
    with shown:
        shown.expect(4)
        assert shown._bars is not None
        task = shown._bars.tasks[0]
        for i in range(4):
            report = shown.stage(f"stage {i}")
            assert (task.completed, task.total, task.fields["text"]) == (i, 4, f"stage {i}")
            report(0.25)
            assert task.completed == i + 0.25
        assert not task.finished
    assert task.finished and task.percentage == 100


def test_images_too_large_for_pixel_rows_leave_stages_out(tmp_path, monkeypatch):
    monkeypatch.setattr(final, "PIXEL_LIMIT", 63)
    shown = Shown(terminal=True)
    _evaluated(tmp_path, shown)
    assert list(shown.fractions) == STAGES[:8]
    assert "100 %" in shown.written()[1]


def test_two_lines_in_a_log_file(tmp_path):
    shown = Shown(terminal=False)
    _evaluated(tmp_path, shown)
    out, err = shown.written()
    assert err == ""
    assert re.fullmatch(r"final evaluation …\nfinal evaluation done in \d+ s\n", out)


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_by_other_ranks_or_where_nothing_is_computed(tmp_path, terminal):
    silent = Shown(terminal=terminal, shown=False)
    _evaluated(tmp_path / "other", silent)
    idle = Shown(terminal=terminal)
    _evaluated(tmp_path / "idle", idle, baselines=False)
    assert silent.written() == idle.written() == ("", "")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_stops_the_bar_where_it_is(terminal, error):
    shown = Shown(terminal=terminal)

    def evaluation() -> None:
        with shown:
            shown.expect(2)
            shown.stage("first")(0.5)
            raise error

    with pytest.raises(error):
        evaluation()
    out, err = shown.written()
    assert "done" not in out + err
    if terminal:
        last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err).rpartition("final evaluation")[2]
        assert " 25 % first" in last
        assert err.endswith("\n\x1b[?25h")
