"""``sslzoo analyze margins``: checkpoints in, scalars, table, pictures and a page out."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sslzoo.checkpoints import checkpoints, load_checkpoint
from sslzoo.checks import require
from sslzoo.data.datasets import open_source
from sslzoo.evaluate.margins import Observation, describe, join, observe_batch, per_sample, temperature_of
from sslzoo.margins import NO_MARGIN, Margin
from sslzoo.recipe.load import LoadedRecipe, plain
from sslzoo.run.build import build_data, build_method, build_plan

if TYPE_CHECKING:
    from sslzoo.batch import Batch
    from sslzoo.evaluate.margin_plots import Snapshot
    from sslzoo.method import SSLMethod
    from sslzoo.recipe.sections import Recipe


PAIRS = (
    "anchors and positives of the views that the loss pairs, through predictor and momentum encoder where it has "
    "them, each view in a pass of its own; an anchor's negatives are the other samples' positives in its batch, "
    "also where the loss has more, a queue, a bank or none"
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One checkpoint, looked at."""

    path: Path
    step: int
    epoch: int
    seen: dict[str, Observation]  # by kind of pair
    history: list[dict[str, Any]]  # of a MarginAnalysis callback in that run


def expand(paths: Sequence[Path]) -> list[Path]:
    """Checkpoint files; a run directory stands for all its checkpoints.

    Raises ``ValueError`` where there is none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            found = checkpoints(folder) + sorted(folder.glob("epoch=*.ckpt"))
            require(len(found) > 0, f"--checkpoint {path}: no checkpoint in {folder}")
            files += found
        else:
            files.append(path)
    return files


def recipe_of(checkpoint: Path) -> Path:
    """The recipe of the run that a checkpoint lies in. Raises ``ValueError`` where it lies elsewhere."""
    path = checkpoint.resolve().parent.parent / "recipe.yaml"
    require(path.is_file(), f"{checkpoint} lies in no run directory: name its recipe with --recipe")
    return path


def analyse(
    loaded: LoadedRecipe,
    paths: Sequence[Path],
    margins: Mapping[str, Margin],
    *,
    samples: int,
    temperature: float,
    out: Path,
) -> dict[str, Any]:
    """Look at every checkpoint with the same training batches and write everything to ``out``.

    Writes ``margins.json``, ``samples.parquet``, the pictures and ``index.html``; returns what the JSON
    holds. ``samples`` is rounded up to whole batches of the recipe's size, each with its own negatives.
    """
    require(samples > 0, f"--samples must be positive, got {samples}")
    folders = {str(path.resolve().parent) for path in paths}
    require(
        len(folders) == 1,
        f"--checkpoint names checkpoints of {len(folders)} runs, whose steps would mix; analyse them one by one",
    )
    recipe = loaded.recipe
    batches = _batches(recipe, samples)
    method = _method(recipe, sum(len(b.sample_id) for b in batches))
    tau = temperature_of(method, temperature)
    looks = sorted((_look(method, path, batches, tau) for path in paths), key=lambda look: look.step)
    unique = list({look.step: look for look in looks}.values())
    last = unique[-1]
    ids = torch.cat([b.sample_id for b in batches])
    tables = {
        kind: {name: per_sample(seen, margin, temperature=tau) for name, margin in margins.items()}
        for kind, seen in last.seen.items()
    }
    summary: dict[str, Any] = {
        "checkpoints": [
            {"path": str(look.path), "step": look.step, "epoch": look.epoch}
            | describe(look.seen, margins, temperature=tau)
            for look in unique
        ],
        "history": last.history,
        "pairs": PAIRS,
        "samples": len(ids),
        "temperature": tau,
        "seed": recipe.seed,
        "recipe": plain(recipe),
    }
    summary = _finite(summary)
    out.mkdir(parents=True, exist_ok=True)
    (out / "margins.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    _write_table(out / "samples.parquet", ids, tables, summary)
    _write_pictures(out, summary, margins, last.seen["global"], tables["global"])
    return summary


def _finite(value: Any) -> Any:
    """``value`` with null for every number that is infinite or NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _batches(recipe: Recipe, samples: int) -> list[Batch]:
    """The first training batches of epoch 0, as the method gets them: the same for every checkpoint."""
    source = open_source(recipe.data)
    data = build_data(recipe, build_plan(recipe, len(source), 1), source)
    out: list[Batch] = []
    for raw in data.train_dataloader():
        out.append(data.finish(raw))
        if sum(len(b.sample_id) for b in out) >= samples:
            break
    return out


def _method(recipe: Recipe, samples: int) -> SSLMethod[Any]:
    source = open_source(recipe.data)
    method = build_method(recipe, build_plan(recipe, len(source), 1))
    # As in training: batch norm with the statistics of the batch, as the loss sees it.
    return method.train()


def _look(method: SSLMethod[Any], path: Path, batches: Sequence[Batch], temperature: float) -> Look:
    content = load_checkpoint(path)
    stored, own = content["state_dict"], method.state_dict()
    missing = [name for name in own if name not in stored]
    require(
        not missing, f"{path}: the checkpoint lacks {missing[:3]}; give the recipe of its run by --recipe"
    )
    wrong = [name for name, value in own.items() if stored[name].shape != value.shape]
    require(
        not wrong,
        f"{path}: {wrong[:3]} have other shapes than in the recipe; give that of its run by --recipe",
    )
    method.load_state_dict({name: stored[name] for name in own})
    torch.manual_seed(0)  # dropout, where a method has it
    observed = [observe_batch(method, batch, temperature=temperature) for batch in batches]
    seen = {kind: join([by_kind[kind] for by_kind in observed]) for kind in observed[0]}
    states = content.get("callbacks", {})
    history = [state["history"] for key, state in states.items() if key.startswith("MarginAnalysis")]
    return Look(
        path=path,
        step=int(content["optimizer_steps"]),
        epoch=int(content.get("epoch", 0)),
        seen=seen,
        history=history[0] if history else [],
    )


def _write_table(
    path: Path,
    ids: Tensor,
    tables: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    summary: Mapping[str, Any],
) -> None:
    """A row for every kind of pair, margin and sample; recipe and seed in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(kind, name, table) for kind, of in tables.items() for name, table in of.items()]
    columns: dict[str, Any] = {
        "sample_id": torch.cat([ids] * len(rows)).numpy(),
        "pair": [kind for kind, _, _ in rows for _ in range(len(ids))],
        "margin": [name for _, name, _ in rows for _ in range(len(ids))],
    }
    for key in rows[0][2]:
        columns[key] = torch.cat([table[key] for _, _, table in rows]).numpy()
    kept = ("temperature", "seed", "recipe")
    metadata = {f"sslzoo.{key}": json.dumps(summary[key]) for key in kept}
    metadata["sslzoo.checkpoint"] = summary["checkpoints"][-1]["path"]
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def _write_pictures(
    out: Path,
    summary: Mapping[str, Any],
    margins: Mapping[str, Margin],
    seen: Observation,
    tables: Mapping[str, Mapping[str, Tensor]],
) -> None:
    from matplotlib import rc_context

    from sslzoo.evaluate.margin_plots import STYLE, all_plots

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
    sections = []
    for name, (figure, caption) in figures.items():
        data = io.BytesIO()
        with rc_context(STYLE):
            figure.savefig(data, format="png", metadata=note)
        (out / f"{name}.png").write_bytes(data.getvalue())
        image = base64.b64encode(data.getvalue()).decode()
        sections.append(
            f'<figure><img src="data:image/png;base64,{image}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    (out / "index.html").write_text(_page(summary, sections), encoding="utf-8")


def _moments(summary: Mapping[str, Any], shown: str) -> list[Snapshot]:
    """The looks of the callback's history where it knows the margin ``shown`` in detail, at the same
    temperature; then the checkpoints'."""
    from sslzoo.evaluate.margin_plots import Snapshot

    tau = summary["temperature"]
    looks = [r for r in summary["history"] if shown in r["margins"] and r.get("temperature") == tau]
    first = summary["checkpoints"][0]["step"] if not looks else looks[-1]["step"] + 1
    looks = [
        *looks,
        *(c for c in summary["checkpoints"] if c["step"] >= first or c is summary["checkpoints"][-1]),
    ]
    return [Snapshot(r["step"], r["epoch"], r["histogram"], r["margins"]) for r in looks]


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Margin analysis: {name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }}
figure {{ margin: 0 }} img {{ width: 100% }} figcaption {{ font-size: .9rem; color: #444 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .8rem }}
</style>
<h1>Margin analysis: {name}</h1>
<p>{samples:,} samples of the training data at optimiser step {step:,}; τ = {temperature:g}; seed {seed}.
Angles in degrees. Each margin is asked at the same embeddings: {pairs}.</p>
<table>{rows}</table>
<main>{figures}</main>
<h2>Recipe</h2><pre>{recipe}</pre>
</html>
"""


def _page(summary: Mapping[str, Any], sections: Sequence[str]) -> str:
    last = summary["checkpoints"][-1]
    names = list(last["margins"])
    rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"]
    for key in last["margins"][names[0]]:
        cells = [last["margins"][n].get(key) for n in names]
        text = "".join(f"<td>{'' if c is None else f'{c:.4g}'}</td>" for c in cells)
        rows.append(f"<tr><th>{html.escape(key)}</th>{text}</tr>")
    return PAGE.format(
        name=html.escape(summary["recipe"]["name"]),
        samples=summary["samples"],
        step=last["step"],
        temperature=summary["temperature"],
        seed=summary["seed"],
        pairs=html.escape(summary["pairs"]),
        rows="\n".join(rows),
        figures="\n".join(sections),
        recipe=html.escape(json.dumps(summary["recipe"], indent=1)),
    )
