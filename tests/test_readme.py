"""The README's code runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.command import ROOT, fork

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_method_of_the_readme_trains_by_the_command_under_it(tmp_path: Path):
    (code,) = [text for language, text in BLOCKS if language == "python" and "SSLMethod" in text]
    (line,) = [text for _, text in BLOCKS if "mine:Mine" in text and text.startswith("sslzoo fit")]
    (tmp_path / "mine.py").write_text(code)
    command = fork(tmp_path, *shlex.split(line)[1:], "--dry-run")
    assert command.wait() == 0, command.said
    assert "passed" in command.out
