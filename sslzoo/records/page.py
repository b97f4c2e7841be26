"""The page of a run: ``report.html``, from the files of its directory. Importable without torch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslzoo import panels
from sslzoo.evaluate.figures import FEATURES, evaluation_title, is_empty_top5
from sslzoo.files import write_text
from sslzoo.pages.page import (
    Block,
    Chart,
    Code,
    Level,
    Line,
    Picture,
    Rows,
    Scatter,
    Section,
    Table,
    Text,
    Thumbnail,
    Tile,
    Tiles,
    Tone,
    render,
)
from sslzoo.pictures import coloured
from sslzoo.recipe.registry import analysis_class, method_config
from sslzoo.records.record import Record, equal_intervals, figure_table, percent
from sslzoo.terminal import duration

PAGE = "report.html"
RELOAD = 60  # seconds between reloads while the run is going on
LOG_LINES = 60
PICTURE_BYTES = 400_000  # above that, pictures become WebP
TONES: dict[str, Tone] = {"running": "plain", "done": "good", "pre-empted": "watch", "interrupted": "watch"}
VERDICTS: dict[str, Tone] = {"healthy": "good", "watch": "watch", "collapsed": "bad"}


def write_page(folder: Path) -> Path:
    """Draw the page of the run in ``folder``, and replace ``report.html`` there."""
    path = folder / PAGE
    # The run itself and `sslzoo report` may draw it at the same time.
    write_text(path, page(Record(folder)), shared=True)
    return path


def page(record: Record) -> str:
    """The page of a run as HTML."""
    running = record.state == "running"
    drawn = datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    recipe = record.recipe
    subtitle = f"{recipe.get('method.name')} on {recipe.get('data.dataset')}, {recipe.get('backbone.name')}"
    return render(
        record.name,
        f"{subtitle}; drawn {drawn}" + (f", read again every {RELOAD} s" if running else ""),
        [section for section in _sections(record) if section.blocks],
        reload_s=RELOAD if running else None,
    )


def _sections(record: Record) -> Iterator[Section]:
    yield Section(title="At a glance", blocks=[Tiles(list(_tiles(record))), *_reasons(record)])
    tables = {"evaluation": _tables(record), "system": [_machine(record)]}
    for section in run_panels(record):
        charts = [chart for panel in section.panels if (chart := panel_chart(record, panel)) is not None]
        yield Section(title=section.title, blocks=[*tables.get(section.name, []), *charts])
        if section.name == "evaluation":
            yield Section(title="Pictures", blocks=list(_pictures(record)))
    texts = [("recipe.yaml, with the origin of each value", _text(record.path / "recipe.yaml"))]
    manifest = {key: value for key, value in record.manifest.items() if key not in ("recipe", "sessions")}
    starts = [
        {key: value for key, value in start.items() if key != "recipe"}
        for start in record.manifest.get("sessions", [])
    ]
    texts.append(("manifest.json", json.dumps(manifest | {"starts": starts}, indent=1)))
    texts.append((f"the last {LOG_LINES} lines of train.log", _tail(record.path / "train.log")))
    yield Section(
        title="Recipe, manifest, log",
        blocks=[Code(title=title, text=text) for title, text in texts if text],
    )


def run_panels(record: Record) -> tuple[panels.Section, ...]:
    """The panels of a run; those of a method or analysis that is not installed here are its metrics under their own
    names."""
    name = str(record.recipe.get("method.name", ""))
    own: tuple[panels.Panel, ...] = ()
    with suppress(ValueError, AttributeError):
        own = method_config(name).panels
    analyses: list[tuple[str, tuple[panels.Panel, ...]]] = []
    for key, value in record.recipe.items():
        if key.startswith("analyses.") and key.endswith(".name"):
            with suppress(ValueError, AttributeError):
                analyses.append((str(value), analysis_class(str(value)).panels))
    return panels.sections(name, own, record.metrics, analyses=analyses)


# -- at a glance --------------------------------------------------------------------------------------


def _tiles(record: Record) -> Iterator[Tile]:
    state = record.state
    yield Tile(label="state", value=state, tone=TONES.get(state, "bad"), note=_progress(record))
    if record.verdict:
        verdict = str(record.verdict.get("state"))
        since = record.verdict.get("since_epoch")
        note = f"since epoch {since}" if since is not None else ""
        yield Tile(label="verdict", value=verdict, tone=VERDICTS.get(verdict, "plain"), note=note)
    for key, words in (("linear_top1", "linear probe, top-1"), ("knn_top1", "k-NN, top-1")):
        figure = record.figure(key)
        if figure is not None:
            ends = record.interval(key)
            within = f"95 % interval {100 * ends[0]:.1f} to {100 * ends[1]:.1f}; " if ends else ""
            (best,) = record.best(key)
            yield Tile(
                label=words,
                value=f"{100 * figure:.1f} %",
                note=f"{within}best {100 * (best if best is not None else figure):.1f}",
            )
    if record.figure("linear_top1") is None:
        _, ranks = record.metrics.get("repr/rankme", ([], []))
        if ranks:
            note = f"largest {max(ranks):.1f}"
            yield Tile(label="effective rank of the features", value=f"{ranks[-1]:.1f}", note=note)
    _, losses = record.metrics.get("train/loss", ([], []))
    if losses:
        yield Tile(label="pre-training loss", value=f"{losses[-1]:.4g}", note=f"lowest {min(losses):.4g}")
    if record.images_per_s is not None:
        yield Tile(label="throughput", value=f"{record.images_per_s:,.0f} images/s", note="median")
    if record.seconds:
        starts = len(record.manifest.get("sessions", []))
        yield Tile(
            label="training time", value=duration(record.seconds), note=f"{starts} start{'s' * (starts != 1)}"
        )


def _progress(record: Record) -> str:
    epochs = record.recipe.get("trainer.max_epochs")
    started = f"started {record.started.astimezone():%Y-%m-%d %H:%M}, " if record.started else ""
    planned = f", {epochs} epoch{'s' * (epochs != 1)} in all" if epochs else ""
    return f"{started}step {record.step:,}{planned}"


def _reasons(record: Record) -> Iterator[Block]:
    if record.reason:
        yield Text(f"Why it ended: {record.reason}")
    if record.verdict.get("reason"):
        yield Text(str(record.verdict["reason"]))


# -- charts -------------------------------------------------------------------------------------------


def panel_chart(record: Record, panel: panels.Panel) -> Chart | None:
    """The chart of a panel; None if the run has none of its metrics."""
    factor = 100.0 if panel.unit == "%" else 1.0
    lines: list[Line] = []
    for key, label in panel.lines(record.metrics):
        steps, values = record.system.get(key) or record.metrics.get(key) or ([], [])
        if key == "train/loss":
            steps, values = equal_intervals(steps, values)
        if any(map(math.isfinite, values)) and not is_empty_top5(key, values):
            y = [factor * value for value in values]
            lines.append(Line(label=label or panel.curves[0].label, x=steps, y=y))
    if not lines:
        return None
    levels = _baselines(record, panel, factor) if len(panel.curves) == 1 else []
    return Chart(
        title=panel.title,
        lines=lines,
        levels=levels,
        unit=panel.unit,
        log_scale=panel.log_scale,
        note=panel.note,
    )


def _baselines(record: Record, panel: panels.Panel, factor: float) -> list[Level]:
    figure = panel.curves[0].key.removeprefix("val/")
    return [
        Level(label=words, y=factor * record.summary[prefix + figure])
        for prefix, words in FEATURES.items()
        if prefix and isinstance(record.summary.get(prefix + figure), float)
    ]


# -- tables -------------------------------------------------------------------------------------------


def _tables(record: Record) -> list[Block]:
    blocks: list[Block] = []
    if record.summary and not record.final:
        blocks.append(Text("The run was continued since: the final evaluation is that of its earlier end."))
    for name, about in record.summary.get("data_sets", {}).items():
        columns, rows = figure_table(record.summary, name)
        blocks.append(
            Table(
                head=[f"% on {about['dataset']}", *columns],
                rows=[[row.title, *(percent(record.summary, key) for key in row.keys)] for row in rows],
                caption=f"{about['protocol']} ±: half of the 95 % confidence interval (Wilson).",
                strong=[i for i, row in enumerate(rows) if row.trained],
            )
        )
    if "not_measured" in record.summary:
        blocks.append(Text(f"The features were not evaluated: {record.summary['not_measured']}."))
    return blocks + list(_later(record))


def _later(record: Record) -> Iterator[Block]:
    """The results of protocols and other evaluations of the trained encoder."""
    rows = [
        [
            ", ".join(
                filter(
                    None,
                    [
                        evaluation_title(result["name"], row.get("title", "")),
                        _when(record, result.get("step")),
                    ],
                )
            ),
            result["data_sets"].get(row.get("data"), {}).get("dataset", ""),
            str(row.get("layer", "")),
            f"{100 * row['top1']:.1f} ±{50 * (row['top1_high'] - row['top1_low']):.1f}",
            str(row.get("published", "")),
        ]
        for result in record.results
        for row in result["results"]
    ]
    if rows:
        yield Table(
            head=["evaluation", "data", "features", "top-1 (%)", "published"],
            rows=rows,
            caption="Evaluations of the last checkpoint, or at the step named; eval/ has their conditions.",
        )


def _when(record: Record, step: int | None) -> str:
    """After how many steps, unless it is at the end."""
    if step == record.last_step:
        return ""
    return "step unknown" if step is None else f"step {step:,}"


def _machine(record: Record) -> Block:
    hardware, versions = record.manifest.get("hardware", {}), record.manifest.get("versions", {})
    if not hardware.get("gpus"):  # then torch's version of CUDA says nothing about the machine
        hardware = {key: value for key, value in hardware.items() if key not in ("gpus", "cuda")}
    rows = [[str(key), _plain(value)] for key, value in (hardware | versions).items() if value is not None]
    rows.append(["processes", _plain(record.manifest.get("world_size"))])
    return Table(head=["machine", ""], rows=rows, numbers=False)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- pictures -----------------------------------------------------------------------------------------


def _pictures(record: Record) -> Iterator[Block]:
    with suppress(OSError):
        yield Picture(
            data=_small((record.path / "views.png").read_bytes()),
            caption="A few training images, and what the recipe's views make of them",
        )
    gallery = _gallery(record.path / "eval" / "gallery.json")
    if gallery is None:
        return
    names = gallery["class_names"]
    yield Rows(
        title=f"Nearest neighbours after epoch {gallery['epoch']}",
        rows=[_neighbours(row, names) for row in gallery["neighbours"]],
        note="Left: the same images at every evaluation. Right: the training images with the largest cosine."
        + (" The colour of the frame says whether the class is the same." if names else ""),
    )
    yield _map(gallery, names)


def _gallery(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _neighbours(row: Mapping[str, Any], names: Sequence[str]) -> list[Thumbnail]:
    query = row["query"]

    def thumbnail(image: Mapping[str, Any], cosine: str, tone: Tone) -> Thumbnail:
        data = image["image"]
        kind = "png" if data.startswith("iVBOR") else "jpeg"
        label = image["label"]
        name = f"image {image['sample_id']}" if label is None else str(names[label])
        return Thumbnail(
            uri=f"data:image/{kind};base64,{data}" if data else "", text=name + cosine, tone=tone
        )

    def tone(image: Mapping[str, Any]) -> Tone:
        if query["label"] is None or image["label"] is None:
            return "plain"
        return "good" if image["label"] == query["label"] else "bad"

    nearest = [thumbnail(image, f" {image['cosine']:.2f}", tone(image)) for image in row["nearest"]]
    return [thumbnail(query, "", "plain"), *nearest]


def _map(gallery: Mapping[str, Any], names: Sequence[str]) -> Scatter:
    points = gallery["map"]
    classes = coloured(points["label"])
    shares = " and ".join(f"{100 * share:.0f} %" for share in points["explained"])
    note = (
        f"{len(points['x']):,} images by their first two principal components, with {shares} of the variance."
    )
    present = len({label for label in points["label"] if label >= 0})
    if len(classes) < present:
        note += f" {len(classes)} of {present} classes have a colour."
    groups = [classes.index(label) if label in classes else -1 for label in points["label"]]
    return Scatter(
        title=f"Map of the features after epoch {gallery['epoch']}",
        x=points["x"],
        y=points["y"],
        group=groups if present else [0] * len(groups),
        names=[str(names[label]) for label in classes] or ["images without a label"],
        note=note,
    )


def _small(data: bytes) -> bytes:
    """The picture itself, or if it is large as WebP."""
    if len(data) <= PICTURE_BYTES:
        return data
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(out, format="WEBP", quality=80)
    return out.getvalue()


# -- texts --------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _tail(path: Path) -> str:
    """The last lines of a log, from its last 64 KiB."""
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 65_536))
        lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])
    return ""
