"""Lists of runs: states, figures and remarks, quickly, without torch, and without writing."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sslzoo.cli.main import main
from sslzoo.files import write_json
from sslzoo.records.lock import LOCK, RunLock
from sslzoo.records.record import read_metrics
from tests.command import ROOT

MANIFEST = {
    "recipe": {"trainer.max_epochs": 5, "logging.wandb.tags": ["new"]},
    "started": "2026-01-01T10:00:00+00:00",
}
ROWS = "step,epoch,train/loss,val/linear_top1\n4,0,1.0,0.5\n8,1,1.0,0.75\n12,2,0.5,0.625\n16,3,0.5,\n16,"


def write_run(folder: Path, code: int | None, message: str = "") -> Path:
    folder.mkdir(parents=True)
    error = {"message": message} if message else None
    write_json(folder / "manifest.json", MANIFEST | {"exit_code": code, "error": error})
    (folder / "metrics.csv").write_text(ROWS)
    return folder


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    assert main(["runs", *arguments]) == 0
    return {line.split()[0]: line.split(maxsplit=6) for line in capsys.readouterr().out.splitlines()}


def test_every_end_has_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends: dict[str, tuple[int | None, str]] = {
        "done": (0, ""),
        "pre-empted": (75, "SIGTERM: saved at step 4"),
        "diverged": (76, "train/loss is nan"),
        "interrupted": (130, "interrupted"),
        "failed": (1, "RuntimeError: no"),
        "killed": (None, ""),
    }
    for state, end in ends.items():
        write_run(tmp_path / "r" / state, *end)
    found = lines_of(capsys, str(tmp_path))
    for state, (_, message) in ends.items():
        line = found[f"r/{state}"]
        assert line[1] == state
        assert message in " ".join(line)
    assert found["r/failed"][2:4] == ["3/5", "75.0"], (
        "the best of all evaluations; an incomplete line is left out"
    )
    assert found["r/done"][2] == "5/5"
    assert found["r/done"][-1].endswith("#new")
    assert found["6"][1:3] == ["runs:", "1"]
    assert list(lines_of(capsys, str(tmp_path), "--state", "failed")) == ["run", "r/failed", "1"]


def test_a_run_with_a_live_owner_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write_run(tmp_path / "r" / "here", None)
    lock = RunLock(here, seconds=dict, on_lost=lambda owner: None)
    lock.acquire()
    other: dict[str, Any] = {"host": f"not {platform.node()}", "pid": 1}
    for name, age in (("near", 5), ("stale", 300)):
        path = write_run(tmp_path / "r" / name, None) / LOCK
        write_json(path, other)
        os.utime(path, (time.time() - age, time.time() - age))
    before = sorted(tmp_path.rglob("*"))
    found = lines_of(capsys, str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()
    states = {name: found[f"r/{name}"][1] for name in ("here", "near", "stale")}
    assert states == {"here": "running", "near": "running", "stale": "killed"}


def test_a_folder_without_runs_and_an_unknown_state_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is no run directory and contains none" in capsys.readouterr().err
    write_run(tmp_path / "r" / "a", 0)
    assert main(["runs", str(tmp_path), "--state", "fialed"]) == 2
    assert "did you mean failed?" in capsys.readouterr().err


def test_no_run_yet_and_a_single_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs yet in runs/; sslzoo fit --recipe quickstart makes one\n"
    write_run(tmp_path / "runs" / "r" / "a", 0)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 run: 1 ")


def test_a_thousand_runs_are_listed_in_a_second_of_cpu(tmp_path: Path) -> None:
    for number in range(100):
        write_run(tmp_path / "r" / str(number), number % 3)
    code = (
        "import resource, sys; from sslzoo.cli.main import main\n"
        "used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
        f"start = used(); main(['runs', {str(tmp_path)!r}])\n"
        "print('torch' in sys.modules, used() - start)\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "methods", "recipes"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    torch, seconds = done.stdout.splitlines()[-1].split()
    assert torch == "False"
    assert float(seconds) < 0.6, "imports, and 100 runs; a thousand take a second"


def test_watching_lists_again_until_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "r" / "a", 0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["runs", str(tmp_path), "--watch", "3"]) == 130
    assert slept == [3.0, 3.0]
    assert capsys.readouterr().out.count("r/a") == 2


def test_damaged_directories_leave_the_others_in_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "r" / "good", 1)
    (tmp_path / "r" / "loop").symlink_to(tmp_path)
    (tmp_path / "r" / "itself").symlink_to("itself")
    (write_run(tmp_path / "r" / "lock", None) / LOCK).write_text("[1]")
    write_json(write_run(tmp_path / "r" / "recipe", 1) / "manifest.json", {"recipe": None, "exit_code": 1})
    head = ROWS.splitlines()[0]
    lines = [head, "4,0,1.0,0.5", "8,1", "\0\0\0,,,\0\0", "12,2,0.5,0.25", ""]
    (write_run(tmp_path / "r" / "rows", 1) / "metrics.csv").write_text("\n".join(lines))
    (tmp_path / "r" / "gone").mkdir()
    scandir = os.scandir

    def some(path: Path) -> Any:
        if path.name == "gone":
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", some)
    found = lines_of(capsys, str(tmp_path))
    assert [name for name in sorted(found) if name.startswith("r/")] == [
        f"r/{name}" for name in ("good", "lock", "recipe", "rows")
    ]
    assert found["r/rows"][3] == "50.0"
    assert read_metrics(tmp_path / "r" / "rows" / "metrics.csv")["val/linear_top1"] == ([4, 12], [0.5, 0.25])


@pytest.mark.parametrize("verb", ["runs", "report"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    class Closed(io.StringIO):
        def flush(self, *_: object) -> None:
            raise BrokenPipeError

    write_run(tmp_path / "r" / "a", 0)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main([verb, str(tmp_path)]) == 0
    monkeypatch.setattr(sys.stdout, "write", Closed().flush)
    assert main([verb, str(tmp_path)]) == 0
