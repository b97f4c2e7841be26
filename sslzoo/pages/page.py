"""A page of tiles, charts, pictures and tables as one HTML file without outside addresses. Importable without torch.

Every text is escaped, and a Content-Security-Policy in the page forbids all outside requests. Charts are drawn by uPlot
(``assets/``, MIT licence): with 51 KB it is the smallest library for long curves, a twentieth of Plotly's or Bokeh's.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal, Protocol

POINTS = 600  # at most, in a curve; longer ones are shown as means of neighbouring points

Tone = Literal["plain", "good", "watch", "bad"]


class Block(Protocol):
    """A part of a section."""

    def html(self, charts: list[dict[str, Any]]) -> str:
        """The block as HTML; a chart adds its data to ``charts``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under one heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure in large type."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: Sequence[Tile]

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        return f'<div class="tiles">{"".join(map(self._tile, self.tiles))}</div>'

    @staticmethod
    def _tile(tile: Tile) -> str:
        note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
        return (
            f'<div class="tile {tile.tone}"><span>{escape(tile.label)}</span>'
            f"<strong>{escape(tile.value)}</strong>{note}</div>"
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of a chart; ``low`` and ``high`` bound a band around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int | None = None  # its number; None: that of the line's place in the chart


@dataclass(frozen=True, kw_only=True)
class Level:
    """A dashed horizontal line in a chart."""

    label: str
    y: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over the optimiser step, or whatever ``x_label`` says."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    unit: str = ""
    log_scale: bool = False  # of the vertical axis; ignored if a value is not positive
    note: str = ""
    x_label: str = "optimiser step"

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        charts.append(self._data())
        unit = f" <small>{escape(self.unit)}</small>" if self.unit else ""
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return (
            f'<figure class="chart"><figcaption>{escape(self.title)}{unit}</figcaption>'
            f'<div class="plot" data-chart="{len(charts) - 1}"></div>{note}</figure>'
        )

    def _data(self) -> dict[str, Any]:
        thinned = [thin(line.x, line.y, line.low, line.high) for line in self.lines]
        columns = sorted({x for x, *_ in thinned for x in x})
        place = {x: i for i, x in enumerate(columns)}
        series: list[dict[str, Any]] = []
        for line, (x, *bands) in zip(self.lines, thinned, strict=True):
            rows: list[list[float | None]] = []
            for values in bands:
                row: list[float | None] = [None] * len(columns) if values else []
                for at, value in zip(x, values, strict=False):
                    row[place[at]] = _rounded(value)
                rows.append(row)
            y, low, high = rows
            colour = len(series) if line.colour is None else line.colour
            series.append({"label": line.label, "y": y, "low": low, "high": high, "colour": colour})
        values = [v for s in series for v in (*s["y"], *s["low"]) if v is not None]
        values += [level.y for level in self.levels]
        return {
            "x": columns,
            "series": series,
            "levels": [{"label": level.label, "y": _rounded(level.y)} for level in self.levels],
            "log": self.log_scale and bool(values) and min(values) > 0,
            "percent": self.unit == "%",
            "xLabel": self.x_label,
        }


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points in the plane, coloured by group; the axes have no unit and no ticks."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    group: Sequence[int]  # of each point, an index into names; negative: none
    names: Sequence[str]
    note: str = ""

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        left, top = min(self.x, default=0.0), max(self.y, default=0.0)
        width = max(self.x, default=1.0) - left or 1.0
        height = top - min(self.y, default=0.0) or 1.0
        points: dict[int, list[str]] = {}
        for x, y, group in zip(self.x, self.y, self.group, strict=True):
            at = f'cx="{640 * (x - left) / width:.1f}" cy="{420 * (top - y) / height:.1f}"'
            points.setdefault(group, []).append(f'<circle {at} r="4"/>')
        layers = "".join(
            f'<g class="{_colour(g)}"><title>{escape(self._name(g))}</title>{"".join(points[g])}</g>'
            for g in sorted(points)
        )
        keys = "".join(
            f'<li><i class="{_colour(g)}"></i>{escape(self._name(g))}</li>' for g in sorted(points) if g >= 0
        )
        return (
            f'<figure class="wide"><figcaption>{escape(self.title)}</figcaption>'
            f'<svg class="scatter" viewBox="-8 -8 656 436" role="img" aria-label="{escape(self.title)}">{layers}</svg>'
            f'<ul class="keys">{keys}</ul><p>{escape(self.note)}</p></figure>'
        )

    def _name(self, group: int) -> str:
        return self.names[group] if 0 <= group < len(self.names) else "others"


def _colour(group: int) -> str:
    return f"c{group % 10}" if group >= 0 else "none"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, as the content of a PNG, JPEG or WebP file."""

    data: bytes
    caption: str
    wide: bool = True  # as wide as the page; otherwise as a chart

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        caption = escape(self.caption)
        return (
            f'<figure class="{"wide" if self.wide else "plain"}"><img src="{data_uri(self.data)}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small picture with a line of text; without ``uri``, an image that cannot be shown."""

    uri: str
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of small pictures; the first of each row stands apart."""

    title: str
    rows: Sequence[Sequence[Thumbnail]]
    note: str = ""

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        rows = "".join(f'<div class="thumbs">{"".join(map(self._thumb, row))}</div>' for row in self.rows)
        return (
            f'<figure class="wide"><figcaption>{escape(self.title)}</figcaption><div class="scroll">{rows}</div>'
            f"<p>{escape(self.note)}</p></figure>"
        )

    @staticmethod
    def _thumb(thumb: Thumbnail) -> str:
        text = escape(thumb.text)
        image = f'<img src="{escape(thumb.uri)}" alt="{text}">' if thumb.uri else '<div class="gap"></div>'
        return f'<div class="thumb {thumb.tone}">{image}<span>{text}</span></div>'


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; cells of all columns but the first are aligned to the right if ``numbers``."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: bool = True
    strong: Sequence[int] = ()  # rows in bold

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        caption = f"<caption><span>{escape(self.caption)}</span></caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.head)
        body = "".join(
            f"<tr{' class=strong' if i in self.strong else ''}>"
            + f'<th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
            + "</tr>"
            for i, (first, *rest) in enumerate(self.rows)
        )
        kind = " class=numbers" if self.numbers else ""
        return (
            f'<div class="scroll"><table{kind}>{caption}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text of a file or terminal, behind a line that opens it unless ``opened``."""

    title: str
    text: str
    opened: bool = False

    def html(self, charts: list[dict[str, Any]]) -> str:
        """See :class:`Block`."""
        opened = " open" if self.opened else ""
        return f"<details{opened}><summary>{escape(self.title)}</summary><pre>{escape(self.text)}</pre></details>"


def render(title: str, subtitle: str, sections: Sequence[Section], *, reload_s: int | None = None) -> str:
    """The page as HTML. ``reload_s``: seconds after which the browser reads the file again; None: never."""
    charts: list[dict[str, Any]] = []
    parts: list[str] = []
    for section in sections:
        blocks = "".join(block.html(charts) for block in section.blocks)
        heading = f"<h2>{escape(section.title)}</h2>"
        parts.append(
            f'<section id="{_anchor(section.title)}">{heading}<div class="grid">{blocks}</div></section>'
        )
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    reload = f'<meta http-equiv="refresh" content="{reload_s}">' if reload_s is not None else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{reload}<title>{escape(title)}</title>'
        f"<style>{_asset('uPlot.min.css')}{_asset('page.css')}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>\n"
        f"<main>{''.join(parts)}</main>\n"
        f'<script type="application/json" id="charts">{embedded(charts)}</script>\n'
        f"<script>/*\n{_asset('LICENSE')}\n*/\n{_asset('uPlot.iife.min.js')}</script>\n"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def embedded(value: Any) -> str:
    """``value`` as JSON that may stand in a script element: nothing in it ends the element or starts another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def thin(x: Sequence[float], *values: Sequence[float], points: int = POINTS) -> tuple[Sequence[float], ...]:
    """``x`` and each of ``values``, which is as long or empty, as means over intervals of equal numbers of points; with
    at most ``points`` points they are unchanged."""
    size = math.ceil(len(x) / points)
    if size <= 1:
        return (x, *values)
    starts = range(0, len(x), size)
    ends = [x[min(start + size, len(x)) - 1] for start in starts]
    return (ends, *([_mean(row[i : i + size]) for i in starts] if row else row for row in values))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _rounded(value: float) -> float | None:
    """Five significant digits, which no screen resolves; None, a gap, if ``value`` is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def data_uri(data: bytes) -> str:
    """The content of a PNG, JPEG or WebP file as an address in the page."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


@cache
def _asset(name: str) -> str:
    return files("sslzoo.pages").joinpath("assets", name).read_text(encoding="utf-8")
