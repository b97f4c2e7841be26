"""Files that several processes write: nothing stays behind, and nothing of a living process is deleted."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from sslzoo.files import atomically, write_text


def _write_slowly(path: Path, begun: Connection) -> None:
    with atomically(path, shared=True) as part:
        part.write_text("half")
        begun.send(part.name)
        signal.pause()


def test_only_what_killed_writers_left_behind_is_deleted(tmp_path: Path) -> None:
    path, fork = tmp_path / "report.html", multiprocessing.get_context("fork")
    receive, send = fork.Pipe()
    writers = [fork.Process(target=_write_slowly, args=(path, send)) for _ in range(2)]
    names: list[str] = []
    for writer in writers:
        writer.start()
        names.append(receive.recv())
    killed, living = writers
    try:
        killed.kill()
        killed.join()
        # Those of other files, machines and containers, of a process that lives, and without its name.
        others = [
            names[0].replace("report", "other"),
            names[0].replace("report.html.", "report.html.elsewhere-"),
            names[0].replace(f".{killed.pid}.", f"0.{killed.pid}."),
            names[0].replace(f".{killed.pid}.", ".1."),
            f"report.html.{killed.pid}.part",
            "report.html.part",
        ]
        for other in others:
            (tmp_path / other).touch()
        write_text(path, "whole", shared=True)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, names[1], *others])
        assert path.read_text() == "whole"
    finally:
        living.kill()
        living.join()
