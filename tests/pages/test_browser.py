"""A browser draws the page without an error; skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sslzoo.pages.page import Chart, Level, Line, Section, Table, Tile, Tiles, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Writes into the page what is drawn: labels and where they begin, dashed lines and how far across the width they end.
SPY = """
const drawn = document.body.appendChild(document.createElement("ol"));
const say = (...words) => { drawn.appendChild(document.createElement("li")).textContent = words.join(" "); };
const draw = CanvasRenderingContext2D.prototype;
const { fillText, lineTo } = draw;
draw.fillText = function (text, x, y) {
  const chart = [...document.querySelectorAll(".plot")].findIndex((place) => place.contains(this.canvas));
  const left = this.textAlign === "right" ? this.getTransform().e + x - this.measureText(text).width : 0;
  say("label", chart, text, left);
  return fillText.apply(this, arguments);
};
draw.lineTo = function (x, y) {
  if (this.getLineDash().length) say("dashes", x / this.canvas.width);
  return lineTo.apply(this, arguments);
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
def test_a_browser_draws_every_chart_without_an_error(tmp_path: Path) -> None:
    band = Line(label="mean", x=[1, 2, 3], y=[1.0, 2.0, 3.0], low=[0.5, 1.5, 2.5], high=[1.5, 2.5, 3.5])
    short = Line(label="short", x=[1, 2], y=[3.0, 7.25])
    charts = [
        Chart(title="band", lines=[band], levels=[Level(label="raw pixels", y=2.5)], unit="%"),
        Chart(title="logarithmic", lines=[Line(label="a", x=[1, 2], y=[1.0, 1e6])], log_scale=True),
        Chart(title="single point", lines=[Line(label="a", x=[7], y=[0.0])]),
        Chart(title="small", lines=[Line(label="a", x=[1, 2], y=[0.00175, 0.00225])]),
        Chart(title="narrow", lines=[Line(label="a", x=[1, 2], y=[4.1071, 4.1079])]),
        Chart(title="of two lengths", lines=[short, Line(label="long", x=[1, 9], y=[1.0, 2.0])]),
        Chart(
            title="single percentage",
            lines=[Line(label="a", x=[7], y=[98.0])],
            levels=[Level(label="chance", y=10.0)],
            unit="%",
        ),
    ]
    blocks = [
        Tiles([Tile(label="state", value="done", tone="good")]),
        *charts,
        Table(head=["a", "b"], rows=[["c", "1"]]),
    ]
    page = tmp_path / "page.html"
    text = render("title", "subtitle", [Section(title="section", blocks=blocks)])
    page.write_text(text.replace("</main>", f"</main><script>{SPY}</script>"))
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
    assert re.search(r"short<[^–]*?7\.25<", done.stdout)
    assert "NaN" not in re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    labels = re.findall(r"<li>label (\d+) (\S+) (\S+)</li>", done.stdout)
    assert min(float(left) for _, _, left in labels) >= 0, "labels are not clipped"
    assert max(len(text) for chart, text, left in labels if chart == "3" and float(left)) > 5
    assert max(float(text) for chart, text, left in labels if chart == "6" and float(left)) == 100
    dashes = [float(share) for share in re.findall(r"<li>dashes (\S+)</li>", done.stdout)]
    assert len(dashes) >= 2 and min(dashes) > 0.9, "levels go across the whole width"
    narrow = [text for chart, text, left in labels if chart == "4" and float(left)]
    assert len(narrow) == len(set(narrow)) > 1, "labels of different ticks differ"
