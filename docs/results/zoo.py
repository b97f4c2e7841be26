"""Train the methods of this repository on the embedded images with one budget and several seeds, and write the table.

    make zoo                                # or: python docs/results/zoo.py
    python docs/results/zoo.py --write      # write docs/results.md and README's table from the runs that are there

As many runs as the machine has cores train at the same time, with a thread each. Interrupted, it continues where it was
when it is started again: finished runs are kept, and others resume.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from sslzoo.files import write_text
from sslzoo.records.compare import Comparison, Group, as_markdown, compare
from sslzoo.records.record import Record

ROOT = Path(__file__).parents[2]
METHODS = ("simclr", "sce", "mmcl", "sogclr", "metaug", "margin")
SEEDS = (1, 2, 3)
EPOCHS = 6
BEGIN, END = "<!-- zoo: written by make zoo -->", "<!-- zoo: end -->"
BASELINES = {"raw pixels": "raw_pixels_", "random initialisation": "random_init_", "PCA-64": "pca_"}
FIGURES = {"linear_top1": "linear probe", "knn_top1": "k-NN"}


@dataclass(frozen=True)
class Plan:
    """What is trained, and where."""

    folder: Path
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS

    def runs(self) -> list[tuple[Path, list[str]]]:
        """Directory and arguments of ``sslzoo fit`` of each run; a seed of all methods before the next seed. Baselines
        do not depend on the method, and are evaluated for the first one."""
        return [
            (
                out := self.folder / f"{method}_fashion_mnist" / f"seed-{seed}",
                [
                    "fit", "--recipe", f"{method}_fashion_mnist", "--out", str(out), "--resume", "auto",
                    f"seed={seed}", f"trainer.max_epochs={self.epochs}", f"eval.every_epochs={self.epochs}",
                    f"eval.baselines={str(method == self.methods[0]).lower()}",
                ],
            )
            for seed in self.seeds
            for method in self.methods
        ]  # fmt: skip


def check_budget(plan: Plan) -> None:
    """``ValueError`` if a run that is there has another number of epochs than ``plan``."""
    for out, _ in plan.runs():
        epochs = Record(out).recipe.get("trainer.max_epochs", plan.epochs)
        if epochs != plan.epochs:
            raise ValueError(
                f"{out} has trainer.max_epochs={epochs}, not {plan.epochs}; give another --folder, or --epochs {epochs}"
            )


def train(plan: Plan, workers: int) -> list[Path]:
    """Train what is not finished; returns the runs that failed. After Ctrl-C, running ones save and no other starts.

    Raises ``ValueError`` before training if a run that is there has another budget.
    """
    check_budget(plan)
    left = [(out, arguments) for out, arguments in plan.runs() if Record(out).state != "done"]
    stopped = threading.Event()

    def one(out: Path, arguments: Sequence[str]) -> Path | None:
        if stopped.is_set():
            return None
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"training {out}", flush=True)
        with out.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sslzoo", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            code = process.wait()
        print(f"{'finished' if code == 0 else f'ended with exit code {code}:'} {out}", flush=True)
        return out if code else None

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(one, *run) for run in left]
        try:
            failed = [job.result() for job in jobs]
        except KeyboardInterrupt:  # Ctrl-C has reached the runs too
            stopped.set()
            raise
    return [out for out in failed if out is not None]


def results(plan: Plan) -> tuple[str, str]:
    """The content of ``docs/results.md``, and README's table; ``ValueError`` if a run is missing or has another
    budget."""
    check_budget(plan)
    records = [Record(out) for out, _ in plan.runs()]
    unfinished = [record.name for record in records if record.state != "done"]
    if unfinished:
        raise ValueError(f"not finished: {', '.join(unfinished)}; run make zoo")
    comparison = compare(records)
    return _document(plan, comparison), _table(comparison)


def _table(comparison: Comparison) -> str:
    """Figures of the methods over seeds, and of the baselines."""
    lines = ["| | " + " | ".join(FIGURES.values()) + " |", "|---|" + "---:|" * len(FIGURES)]
    for group in comparison.groups:
        method = str(group.runs[0].recipe["method.name"])
        lines.append(f"| {method} | " + " | ".join(_over_seeds(group, "", key) for key in FIGURES) + " |")
    every = Group("", tuple(run for group in comparison.groups for run in group.runs))
    for title, prefix in BASELINES.items():
        lines.append(f"| {title} | " + " | ".join(_over_seeds(every, prefix, key) for key in FIGURES) + " |")
    return "\n".join(lines)


def _over_seeds(group: Group, prefix: str, key: str) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    by_seed: Mapping[int, float] = group.by_seed(lambda run: run.summary.get(prefix + key))
    values = [100 * value for value in by_seed.values()]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}" if values else "-"


def _document(plan: Plan, comparison: Comparison) -> str:
    manifest = comparison.groups[0].runs[0].manifest
    torch = manifest.get("versions", {}).get("torch", "unknown")
    commit = str((manifest.get("git") or {}).get("commit", "unknown"))[:10]
    paragraphs = [
        "Written by `make zoo` (`docs/results/zoo.py`) from its runs, by `sslzoo compare`; not edited by hand.",
        f"Each method trains {plan.epochs} epochs on the 12,000 embedded images of Fashion-MNIST with its recipe "
        f"`<method>_fashion_mnist`, seeds {', '.join(map(str, plan.seeds))}, one thread of a CPU per run. All else "
        "is the recipe's. An epoch costs the methods different amounts of time, and the recipes were made for 12 to 15 "
        "epochs: the table ranks these recipes at this budget, and not the methods. "
        f"PyTorch {torch}, commit {commit}.",
        _table(comparison),
        "Top-1 in per cent on the 2,000 test images, mean ± sample standard deviation over the seeds. On these images "
        "the 95 % interval of a single figure is ±1.5.",
        "## In full",
        as_markdown(Comparison(comparison.groups, ())).rstrip(),
    ]
    wrapped = [text if text.startswith(("|", "#")) else textwrap.fill(text, 118) for text in paragraphs]
    return "\n\n".join(["# Six methods, one budget", *wrapped]) + "\n"


def write(plan: Plan, document: Path = ROOT / "docs/results.md", readme: Path = ROOT / "README.md") -> None:
    """Write the document, and the table between the two comments in README."""
    text, table = results(plan)
    write_text(document, text)
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the comments {BEGIN} and {END}")
    write_text(readme, f"{before}{BEGIN}\n{table}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="train nothing")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/zoo", help="of the runs (default: runs/zoo)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--try", dest="trial", action="store_true", help="train only; README and docs stay as they are"
    )
    args = parser.parse_args(arguments)
    plan = Plan(args.folder, tuple(args.methods), tuple(args.seeds), args.epochs)
    try:
        failed = [] if args.write else train(plan, os.cpu_count() or 1)
        if failed:
            print(
                "failed: " + ", ".join(f"{out} (see {out.with_suffix('.log')})" for out in failed),
                file=sys.stderr,
            )
            return 1
        if args.trial:
            print(results(plan)[0])
        else:
            write(plan)
    except ValueError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; make zoo continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
