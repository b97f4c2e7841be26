"""Record the metrics of healthy runs and of failures made on purpose.

``python -m tests.data.verdict.record [NAME…]`` records all, or the named ones, such as ``rate`` or ``rate-42``.

Each is a short run of a bundled recipe on 1,500 of the embedded images in batches of 64, with an evaluation after every
epoch. The files ``NAME-SEED.csv`` beside this one hold the rows of evaluations and of epochs' ends.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.data.datasets import open_source
from sslzoo.data.sources import ArraySource
from sslzoo.exits import Diverged
from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import load_recipe
from sslzoo.records.directory import Run
from sslzoo.run.build import build_run
from sslzoo_methods.simclr.config import SimCLRConfig
from sslzoo_methods.simclr.method import SimCLR

HERE = Path(__file__).parent
IMAGES = 1_500
METHODS = ("simclr", "sce", "mmcl", "sogclr", "metaug", "margin")


class NoNegatives(SimCLR):
    """The cosine distance of two views alone, without a predictor: a point is the best that it can find."""

    begins = 0  # the epoch of the onset; before it, SimCLR's loss

    def loss(self, batch: Batch) -> Tensor:
        """See the class."""
        if self.epoch < self.begins:
            return super().loss(batch)
        features = [self.backbone(view) for view in batch.global_views]
        projected = [self.projector(h) for h in features]
        self.publish(backbone=features[0], projector=projected[0])
        a, b = map(normalize, projected)
        return 1 - (a * b).sum(1).mean()


class LateNoNegatives(NoNegatives):
    """The same from the third epoch on."""

    begins = 2


class Frozen(SimCLR):
    """The backbone gets no gradient."""

    def __init__(self, cfg: SimCLRConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone.requires_grad_(False), feature_dim)


def _shuffled(labels: Any) -> Any:
    return np.random.default_rng(0).permutation(labels)


def _plug(kind: type) -> str:
    return (
        f"method.name={__name__ if __name__ != '__main__' else 'tests.data.verdict.record'}:{kind.__name__}"
    )


@dataclass(frozen=True)
class Case:
    """A run to record."""

    recipe: str
    overrides: tuple[str, ...] = ()
    labels: Callable[[Any], Any] = lambda labels: labels  # what is done to those of the training images


PLAIN = "views=[{size: 20, count: 2, scale: [1.0, 1.0], ratio: [1.0, 1.0]}]"
CASES = {
    "no-negatives": Case("simclr_fashion_mnist", (_plug(NoNegatives),)),
    "late-no-negatives": Case("simclr_fashion_mnist", (_plug(LateNoNegatives),)),
    "temperature": Case("simclr_fashion_mnist", ("method.temperature=0.001",)),
    "rate": Case("simclr_fashion_mnist", ("optim.lr=0.2",)),
    "no-augmentation": Case("simclr_fashion_mnist", (PLAIN,)),
    "frozen": Case("simclr_fashion_mnist", (_plug(Frozen),)),
    "labels": Case("simclr_fashion_mnist", (), _shuffled),
    **{f"healthy-{method}": Case(f"{method}_fashion_mnist") for method in METHODS},
}


def run(case: Case, seed: int, folder: Path, *, images: int = IMAGES, epochs: int) -> Path:
    """Train ``case`` in ``folder``; returns its ``metrics.csv``."""
    fixed = (
        f"seed={seed}",
        f"trainer.max_epochs={epochs}",
        "data.global_batch_size=64",
        "eval.every_epochs=1",
        "eval.baselines=false",
        "analyses=[]",
    )
    recipe = load_recipe(case.recipe, [*fixed, *case.overrides]).recipe
    whole = open_source(recipe.data)
    assert isinstance(whole, ArraySource) and whole.labels is not None
    labels = case.labels(whole.labels[:images])
    source = ArraySource(whole.name, whole.split, whole.images[:images], labels, whole.class_names)
    built = build_run(recipe, Run(folder, "recorded"), source=source)
    with suppress(Diverged):
        built.trainer.fit(built.method, datamodule=built.data)
    return folder / "metrics.csv"


def kept(metrics: Path) -> str:
    """Its rows of evaluations and epochs' ends, with six digits, and the columns that a verdict may read."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [
        name
        for name in rows[0]
        if name in ("step", "epoch", "train/loss", "opt/lr", "train/loss_epoch")
        or (name.startswith(("val/", "repr/")) and name.count("/") == 1)
    ]
    lines = [",".join(columns)]
    for row in rows:
        if row.get("repr/std") or row.get("train/loss_epoch") or row is rows[-1]:
            cells = (row[name] for name in columns)
            lines.append(",".join(f"{float(cell):.6g}" if cell else "" for cell in cells))
    return "\n".join(lines) + "\n"


# Name, seed and epochs of each recorded run. Those of seed 42, and margin's and frozen's of seed 1, calibrated the
# verdict.
FAILURES = tuple(name for name in CASES if not name.startswith("healthy-"))
RUNS = (
    *((name, 42, 5) for name in (*FAILURES, *(f"healthy-{method}" for method in METHODS[:4]))),
    *((f"healthy-{method}", 1, 3) for method in METHODS),
    ("healthy-margin", 2, 3),
    *((name, seed, 5) for seed in (1, 2) for name in FAILURES),
    ("frozen", 3, 5),
    *((f"healthy-{method}", seed, 5) for seed in (3, 4) for method in METHODS),
)


def main(names: list[str]) -> None:
    """Record the runs ``names``, or all."""
    warnings.simplefilter("ignore")
    for name, seed, epochs in RUNS:
        if not names or name in names or f"{name}-{seed}" in names:
            with tempfile.TemporaryDirectory() as folder:
                path = HERE / f"{name}-{seed}.csv"
                path.write_text(kept(run(CASES[name], seed, Path(folder), epochs=epochs)))
                sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
