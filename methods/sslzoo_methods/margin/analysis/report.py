"""The report of ``sslzoo analyze margins``: scalars, a table of samples, plots and an HTML page."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from torch import Tensor

from sslzoo.analysis import Look
from sslzoo.pages.page import Code, Picture, Section, Table, Text, render
from sslzoo.recipe.load import plain
from sslzoo.recipe.sections import Recipe
from sslzoo_methods.margin.analysis.observe import Observation, Seen, per_sample
from sslzoo_methods.margin.analysis.plots import STYLE, Snapshot, all_plots
from sslzoo_methods.margin.analysis.words import described, formatted, titled
from sslzoo_methods.margin.factors import NO_MARGIN, Margin

PAIRS = (
    "anchors and positives are the pairs of views that the loss compares, computed with predictor and momentum encoder "
    "if there are any, with one forward pass per view; the negatives of an anchor are the positives of the other "
    "samples in its batch, even if the loss uses more views, a queue, a bank or no negatives"
)


def summarize(
    looks: Sequence[Look],
    describe: Callable[[Sequence[Any]], dict[str, Any]],
    *,
    recipe: Recipe,
    samples: int,
) -> dict[str, Any]:
    """The content of ``margins.json``; infinite and NaN values, which JSON lacks, are replaced by null."""
    described = [
        {"path": str(look.path), "step": look.step, "epoch": look.epoch} | describe(look.seen)
        for look in looks
    ]
    return _finite(
        {
            "checkpoints": described,
            "history": looks[-1].history,
            "pairs": PAIRS,
            "samples": samples,
            "temperature": described[-1]["temperature"],
            "seed": recipe.seed,
            "recipe": plain(recipe),
        }
    )


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The text to print: one line per margin, for the last checkpoint."""
    for name, values in summary["checkpoints"][-1]["margins"].items():
        logs = [key for key in values if key.startswith("log_")]
        shares = ", ".join(f"{key.removeprefix('log_')} {_text(values[key], '+.3f')}" for key in logs)
        yield f"{name}: angle {_text(values['theta_q50'], '.1f')} degrees, log effects {shares or 'none'}"


def _text(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def write(
    out: Path, summary: Mapping[str, Any], margins: Mapping[str, Margin], seen: Seen, sample_id: Tensor
) -> None:
    """Write ``margins.json``, ``samples.csv.gz``, plots and ``index.html``; ``seen`` is from the last checkpoint."""
    tables = {
        kind: {name: per_sample(s, margin, temperature=seen.temperature) for name, margin in margins.items()}
        for kind, s in seen.by_kind.items()
    }
    (out / "margins.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    _write_table(out / "samples.csv.gz", sample_id, tables)
    _write_pictures(out, summary, margins, seen.by_kind["global"], tables["global"])


def _finite(value: Any) -> Any:
    """``value`` with None in place of infinite and NaN numbers."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _write_table(
    path: Path, sample_id: Tensor, tables: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
) -> None:
    """Write one row per kind of pair, margin and sample, with nine digits, which represent float32 exactly."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = list(next(iter(next(iter(tables.values())).values())))
    table.writerow(["sample_id", "pair", "margin", *columns])
    for kind, by_margin in tables.items():
        for name, values in by_margin.items():
            rows = torch.stack([values[column].double() for column in columns], dim=1).tolist()
            for number, row in zip(sample_id.tolist(), rows, strict=True):
                table.writerow([number, kind, name, *(f"{value:.9g}" for value in row)])
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def _write_pictures(
    out: Path,
    summary: Mapping[str, Any],
    margins: Mapping[str, Margin],
    seen: Observation,
    tables: Mapping[str, Mapping[str, Tensor]],
) -> None:
    tau = summary["temperature"]
    base = per_sample(seen, NO_MARGIN, temperature=tau)
    figures = all_plots(
        _moments(summary, next(iter(margins))),
        margins,
        {k: v.double().numpy() for k, v in base.items()},
        {name: {k: v.double().numpy() for k, v in t.items()} for name, t in tables.items()},
        tau,
    )
    note = {
        "Software": "sslzoo analyze margins",
        "Description": json.dumps({key: summary[key] for key in ("temperature", "seed", "recipe")}),
    }
    pictures: list[Picture] = []
    for name, (figure, caption) in figures.items():
        data = io.BytesIO()
        with rc_context(STYLE):
            figure.savefig(data, format="png", metadata=note)
        (out / f"{name}.png").write_bytes(data.getvalue())
        pictures.append(Picture(data=data.getvalue(), caption=caption, wide=False))
    (out / "index.html").write_text(_page(summary, pictures), encoding="utf-8")


def _moments(summary: Mapping[str, Any], shown: str) -> list[Snapshot]:
    """Snapshots over time: those recorded during training, if they have the margin ``shown`` and the same
    temperature, followed by those of later checkpoints."""
    tau = summary["temperature"]
    records = [r for r in summary["history"] if shown in r["margins"] and r.get("temperature") == tau]
    first = summary["checkpoints"][0]["step"] if not records else records[-1]["step"] + 1
    records = [
        *records,
        *(c for c in summary["checkpoints"] if c["step"] >= first or c is summary["checkpoints"][-1]),
    ]
    return [Snapshot(r["step"], r["epoch"], r["histogram"], r["margins"]) for r in records]


def _page(summary: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    last = summary["checkpoints"][-1]
    recipe = summary["recipe"]
    about = (
        f"{summary['samples']:,} samples of the training data at optimiser step {last['step']:,}; "
        f"τ = {summary['temperature']:g}; seed {summary['seed']}"
    )
    scalars = [_scalars(f"pairs of {kind} views", part) for kind, part in _kinds(last)]
    sections = [
        Section(
            title="Scalars",
            blocks=[Text(f"All margins are evaluated on the same embeddings: {PAIRS}."), *scalars],
        ),
        Section(title="Pictures", blocks=list(pictures)),
        Section(title="Recipe", blocks=[Code(title="the recipe", text=json.dumps(recipe, indent=1))]),
    ]
    return render(f"Margin analysis: {recipe['name']}", about, sections)


def _kinds(checkpoint: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Mapping[str, float | None]]]]:
    """The scalars by kind of pair and margin, of global views first."""
    others = [(kind, part["margins"]) for kind, part in checkpoint.items() if _has_margins(part)]
    return [("global", checkpoint["margins"]), *others]


def _has_margins(part: Any) -> bool:
    return isinstance(part, dict) and "margins" in part


def _scalars(caption: str, margins: Mapping[str, Mapping[str, float | None]]) -> Table:
    names = list(margins)
    keys = dict.fromkeys(key for name in names for key in margins[name])
    rows = [[described(key), *(formatted(key, margins[name].get(key)) for name in names)] for key in keys]
    return Table(head=[caption, *map(titled, names)], rows=rows)
