"""A browser draws the page without an error; skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sslzoo.pages.page import Chart, Level, Line, Section, Table, Tile, Tiles, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
def test_a_browser_draws_every_chart_without_an_error(tmp_path: Path) -> None:
    band = Line(label="mean", x=[1, 2, 3], y=[1.0, 2.0, 3.0], low=[0.5, 1.5, 2.5], high=[1.5, 2.5, 3.5])
    charts = [
        Chart(title="band", lines=[band], levels=[Level(label="raw pixels", y=2.5)], unit="%"),
        Chart(title="logarithmic", lines=[Line(label="a", x=[1, 2], y=[1.0, 1e6])], log_scale=True),
        Chart(title="single point", lines=[Line(label="a", x=[7], y=[0.0])]),
    ]
    blocks = [
        Tiles([Tile(label="state", value="done", tone="good")]),
        *charts,
        Table(head=["a", "b"], rows=[["c", "1"]]),
    ]
    page = tmp_path / "page.html"
    page.write_text(render("title", "subtitle", [Section(title="section", blocks=blocks)]))
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=1000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    assert done.stdout.count("<canvas") == len(charts)
    # The legends show the last values.
    assert re.search(r"raw pixels.*?2\.5<", done.stdout)
    assert "NaN" not in re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
