"""What a person sees of a run: on a terminal, and in the file that a job's output goes to."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from pathlib import Path
from typing import Any

import pytest

from sslzoo.exits import ExitCode
from sslzoo.terminal import ERR, OUT
from tests.command import Command, fork, short_evaluation, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies."""
    folder = tmp_path_factory.mktemp("screen")
    write_recipe(folder)
    return folder


def _on_terminal(folder: Path, *arguments: str, faults: dict[str, Any] | None = None) -> tuple[Command, str]:
    """The command on a terminal of 100 columns; everything that was written to it, without control sequences."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))

    def attach() -> None:
        for stream in (1, 2):
            os.dup2(slave, stream)
        os.environ["TERM"] = "xterm-256color"
        short_evaluation()
        OUT.is_interactive = ERR.is_interactive = True  # decided once, when this interpreter was started

    command = fork(folder, *arguments, before=attach, faults=faults)
    os.close(slave)
    written = bytearray()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the last writer is gone
            break
        written += chunk
    os.close(master)
    return command, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def test_on_a_terminal_bars_show_training_evaluation_and_the_end(folder: Path) -> None:
    arguments = (
        "fit",
        "--recipe",
        "tiny.yaml",
        "--out",
        "terminal",
        "eval.baselines=true",
        "eval.every_epochs=2",
    )
    command, screen = _on_terminal(folder, *arguments, faults={"pause": 0.1, "evaluation_pause": 0.2})
    assert command.wait() == 0, screen
    for shown in (
        r"recipe tiny\.yaml",
        r"epoch ━* *╺?╸?━* +0/3",
        r"step .* \d/6 loss \d\.\d{4}",
        r"batch .* evaluating …",
        r"probe \d+\.\d %, k-NN \d+\.\d % \(epoch 2\)",  # in the third epoch, which has none of its own yet
        r"final evaluation .* extracting training features",
        r"final evaluation .* 100 % done",
        r"trained encoder",
        r"run directory: ",
    ):
        assert re.search(shown, screen), f"{shown}\n{screen}"
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", screen)]
    # Verdicts on this run, which knows no negatives, are written over a row of the bars.
    assert not [line for line in lines if len(line) > 100 and not re.search(r"since epoch|healthy: ", line)]


def test_a_file_gets_a_line_an_epoch_and_the_screen_none_of_it(folder: Path) -> None:
    command = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "file", "eval.every_epochs=2")
    assert command.wait() == 0
    epochs = [line for line in command.out.splitlines() if line.startswith("epoch ")]
    assert [re.match(r"epoch (\d)/3 +step +(\d+)/18 ", line)[1] for line in epochs] == ["1", "2", "3"]  # type: ignore[index]
    assert not command.err
    assert all(line in (folder / "file" / "train.log").read_text() for line in epochs)


def test_warnings_of_the_framework_and_of_python_reach_terminal_and_log(folder: Path) -> None:
    def warn() -> None:
        """As a library would, before there is a run directory, and as a method would while it trains."""
        import warnings

        from sslzoo.run import fit as module

        warnings.simplefilter("always")
        build = module.build_experiment

        def warning(*arguments: Any, **options: Any) -> Any:
            warnings.warn("the library is old", UserWarning, stacklevel=2)
            module.log.warning("the queue spans an epoch")
            return build(*arguments, **options)

        module.build_experiment = warning

    command = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "warned", before=warn)
    assert command.wait() == 0
    assert command.err.splitlines()[:2] == [
        "warning: the library is old",
        "warning: the queue spans an epoch",
    ]
    log = (folder / "warned" / "train.log").read_text()
    assert "WARNING py.warnings: " in log and "the library is old" in log
    assert "WARNING sslzoo.run.fit: the queue spans an epoch" in log


def test_an_error_while_bars_are_shown_stands_below_them(folder: Path) -> None:
    command, screen = _on_terminal(
        folder, "fit", "--recipe", "tiny.yaml", "--out", "broken", faults={"pause": 0.1, "raise_at": [0, 8]}
    )
    assert command.wait() == ExitCode.FAILURE, screen
    last = [line.strip() for line in screen.splitlines() if line.strip()][-3:]
    assert last[0] == "sslzoo fit: RuntimeError: this rank cannot train"
    assert last[1].endswith("broken/logs/rank-0.log")
    assert last[2].startswith("the newest checkpoint is step=00000000") or "continue with" in last[2]
    assert screen.rindex("step ") < screen.index("Traceback (most recent call last)")
    assert "RuntimeError: this rank cannot train" in (folder / "broken" / "train.log").read_text()
