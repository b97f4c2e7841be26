"""Take results of finished runs into this folder, and write the ``# ours:`` lines of the recipes from them.

    python docs/results/update.py RUN...    # add these runs, one file each, and write the lines
    python docs/results/update.py           # write the lines only

A run is taken if it is finished and its recipe is a bundled one, with any seed and on any machine. Its file has the
content of ``eval/summary.json``, and where it comes from: commit, versions, processes, fingerprint of the data.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslzoo.files import write_json, write_text
from sslzoo.recipe.load import leaves, load_recipe
from sslzoo.recipe.registry import recipes

FOLDER = Path(__file__).parent
# Keys that may differ from the bundled recipe: they do not change the encoder or its figures.
FREE = re.compile(
    r"name|seed|data\.(root|workers|augment_on|timeout|max_bad_fraction)|logging\..*|trainer\.(devices|accelerator)"
)
KEPT = ("started", "git", "versions", "world_size", "data_fingerprint")  # of the manifest
# The protocol `honest` is linear evaluation by SGD, which eval.baselines measures too.
HONEST = ("honest_top1", "sgd_top1")
WIDTH = 118  # columns of a line in a header


def take(run: Path) -> Path:
    """Write the results of the directory ``run`` to this folder; ``ValueError`` says why it cannot be taken."""
    manifest = json.loads((run / "manifest.json").read_text())
    summary = json.loads((run / "eval" / "summary.json").read_text())
    name, seed = manifest["recipe"]["name"], manifest["recipe"]["seed"]
    if manifest["exit_code"] != 0:
        raise ValueError(f"{run} is not finished")
    if name not in recipes():
        raise ValueError(f"{run}: {name} is no bundled recipe")
    bundled = json.loads(json.dumps(dict(leaves(load_recipe(name).recipe))))
    differs = [
        key
        for key, value in bundled.items()
        if not FREE.fullmatch(key) and manifest["recipe"].get(key, value) != value
    ]
    if differs:
        raise ValueError(f"{run} differs from the bundled recipe in {', '.join(differs)}")
    path = FOLDER / f"{name}-{seed}.json"
    kept = {key: manifest[key] for key in KEPT if manifest.get(key) is not None}
    write_json(path, {"recipe": name, "seed": seed, "run": kept, "summary": summary})
    return path


def results_of(name: str) -> list[dict[str, Any]]:
    """The summaries in this folder of the recipe ``name``; the recipe's own seed comes first."""
    files = [json.loads(path.read_text()) for path in FOLDER.glob(f"{name}-*.json")]
    files = [file for file in files if file["recipe"] == name]
    own = load_recipe(name).recipe.seed if len(files) > 1 else None
    return sorted(files, key=lambda file: (file["seed"] != own, file["seed"]))


def ours(name: str) -> str:
    """The lines ``# ours: ...`` of the recipe ``name``."""
    files = results_of(name)
    if not files:
        return "# ours: not run\n"
    summaries = [file["summary"] for file in files]
    seeds = ", ".join(str(file["seed"]) for file in files)
    honest, several = _column(summaries, "", *HONEST), "s" * (len(files) > 1)
    text = f"ours: {honest} % linear top-1, protocol honest, seed{several} {seeds}"
    others = {"raw pixels": "raw_pixels_", "random initialisation": "random_init_"}
    beside = [
        f"{title} {column}"
        for title, prefix in others.items()
        if (column := _column(summaries, prefix, *HONEST))
    ]
    text += f" ({'; '.join(beside)})" if beside else ""
    neighbours, of_pca = _column(summaries, "", "knn_top1"), _column(summaries[:1], "pca_", "knn_top1")
    text += f", k-NN {neighbours} %" if neighbours else ""
    text += f" (PCA-64 {of_pca})" if neighbours and of_pca else ""
    lines = textwrap.wrap(text, WIDTH, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _column(summaries: list[Mapping[str, Any]], prefix: str, *keys: str) -> str:
    """The first of the figures ``keys`` that every summary has, in per cent; empty if there is none."""
    for key in keys:
        if all(prefix + key in summary for summary in summaries):
            return ", ".join(f"{100 * summary[prefix + key]:.1f}" for summary in summaries)
    return ""


def with_ours(text: str, lines: str) -> str:
    """The recipe ``text`` with the ``# ours:`` lines replaced by ``lines``."""
    found = re.search(r"^# ours:.*\n(?:# (?!\w+: ).*\n)*", text, re.MULTILINE)
    if found is None:
        raise ValueError("there is no line # ours:")
    return text[: found.start()] + lines + text[found.end() :]


def main(runs: list[str]) -> int:
    """Take the ``runs`` and write the lines."""
    for run in runs:
        print(take(Path(run)))
    for name, path in recipes().items():
        before = path.read_text(encoding="utf-8")
        after = with_ours(before, ours(name))
        if after != before:
            write_text(path, after)
            print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError, KeyError) as problem:
        sys.exit(f"update.py: {problem}")
