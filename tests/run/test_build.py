"""What a recipe becomes: the same objects in a run and in its dry run, and callbacks in the order that they need."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from sslzoo.analysis import Analysis
from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.cadence import EvaluationCadence
from sslzoo.callbacks.checkpoint import ExactCheckpoint
from sslzoo.callbacks.evaluation import FeatureEvaluation
from sslzoo.callbacks.health import Health
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.online_probe import OnlineProbe
from sslzoo.callbacks.page import PageRefresh
from sslzoo.callbacks.pictures import Pictures
from sslzoo.callbacks.preemption import Preemption
from sslzoo.callbacks.progress import ProgressDisplay
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.callbacks.watch import Watch
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.sections import AnalysisConfig
from sslzoo.records.directory import Run
from sslzoo.run.build import build_experiment, build_run
from sslzoo.run.memory import StepMemory
from tests.command import fork, write_recipe

ORDER = (
    StepSeeding,  # before all that may draw random numbers in a step
    BroadcastBatchNormStats,
    ExactCheckpoint,  # of what the last micro-batch left, before the next one changes anything
    Preemption,  # asks the checkpoint whether this step was just saved
    EvaluationCadence,
    OnlineProbe,  # the evaluation asks it
    FeatureEvaluation,
    Watch,
    Meter,  # writes what those before it recorded
    Pictures,  # shows what evaluation and analyses have found
    PageRefresh,  # reads what the meter has written
    Health,  # reads the meter's file
    ProgressDisplay,  # shows what the meter has written
)


class Mean(Analysis[AnalysisConfig]):
    """Of the features."""

    Config = AnalysisConfig

    def look(self, method: Any, batch: Any) -> float:
        """One number."""
        return float(method.features(batch.global_views[0])["backbone"].mean())

    def describe(self, seen: Sequence[float]) -> dict[str, Any]:
        """Its mean."""
        return {"mean": sum(seen) / len(seen)}

    def write(self, looks: Any, *, recipe: Any, sample_id: Any, out: Path) -> str:
        """Nothing."""
        return ""


NO_SGD = "probe={}"  # without the online probe of tiny.yaml
LOOKED_AT = f"analyses=[{{name: '{__name__}:Mean'}}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies, with its images and others that have no labels."""
    folder = tmp_path_factory.mktemp("build")
    write_recipe(folder)
    (folder / "unlabelled").mkdir()
    for i in range(16):
        Image.fromarray(np.full((12, 12), i, dtype=np.uint8)).save(folder / "unlabelled" / f"{i:02}.png")
    return folder


def test_lightning_calls_the_callbacks_in_their_order(folder: Path) -> None:
    recipe = load_recipe(str(folder / "tiny.yaml"), [LOOKED_AT]).recipe
    built = build_run(recipe, Run(folder / "run", "id"))
    assert [type(callback) for callback in built.callbacks] == list(ORDER)
    assert vars(built.trainer)["callbacks"] == list(built.callbacks)  # it adds none, and moves none
    assert not (folder / "run").exists()


def test_without_labels_no_probe_is_built(folder: Path) -> None:
    elsewhere = ["data.dataset=folder", f"data.root={folder / 'unlabelled'}", NO_SGD]
    recipe = load_recipe(str(folder / "tiny.yaml"), elsewhere).recipe
    callbacks = build_run(recipe, Run(folder / "run", "id")).callbacks
    assert callbacks.online_probe is None
    assert callbacks.evaluation.judges == ()
    assert [type(callback) for callback in callbacks] == [
        kind for kind in ORDER if kind not in (OnlineProbe, Watch)
    ]


def test_an_online_probe_without_labels_is_refused(folder: Path) -> None:
    elsewhere = ["data.dataset=folder", f"data.root={folder / 'unlabelled'}"]
    with pytest.raises(ValueError, match=r"probe\.online=true needs labels .* folder has none; leave it out"):
        build_run(load_recipe(str(folder / "tiny.yaml"), elsewhere).recipe, Run(folder / "run", "id"))


def test_the_backbone_before_training_is_the_one_that_the_method_began_with(folder: Path) -> None:
    experiment = build_experiment(load_recipe(str(folder / "tiny.yaml")).recipe)
    for a, b in zip(
        experiment.initial_backbone().parameters(), experiment.method.backbone.parameters(), strict=True
    ):
        assert a.equal(b) and a is not b


def _show_what_is_trained(scratch: Path) -> None:
    """In a fork: instead of training, a line that says with what, and an end without tidying up ``scratch``."""
    tempfile.tempdir = str(scratch)

    def fit(trainer: Any, method: Any, datamodule: Any, ckpt_path: Any = None) -> None:
        def shape(value: Any) -> list[Any]:  # the dry run takes the catalogue's number of images
            return ["images" if size == method.plan.dataset_size else size for size in value.shape]

        built = {
            "callbacks": [  # and one that measures the memory of the dry run's step
                f"{type(c).__module__}.{type(c).__qualname__}"
                for c in trainer.callbacks
                if not isinstance(c, StepMemory)
            ],
            "method": {name: shape(value) for name, value in method.state_dict().items()},
            "views": [repr(view) for view in datamodule.views],
            "evaluated": [(s.name, s.split) for s in datamodule.eval_sets()],
            "accumulate": trainer.accumulate_grad_batches,
            "clip": trainer.gradient_clip_val,
        }
        sys.stdout.write(f"built {json.dumps(built)}\n")
        sys.stdout.flush()
        os._exit(0)

    Trainer.fit = fit  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "overrides",
    [
        (LOOKED_AT, "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0"),
        ("data.dataset=folder", "data.root=unlabelled", NO_SGD),
        (
            "data.dataset=folder",
            "data.root=unlabelled",
            NO_SGD,
            "probe.data=[{dataset: fashion_mnist, root: images}]",
        ),
    ],
)
def test_a_dry_run_builds_what_the_run_builds(
    folder: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    built = []
    for name, more in (("run", ("--out", tmp_path / "run")), ("dry", ("--dry-run",))):
        command = fork(
            folder,
            "fit",
            "--recipe",
            "tiny.yaml",
            *more,
            *overrides,
            name=name,
            before=partial(_show_what_is_trained, tmp_path),
        )
        assert command.wait() == 0, command.said
        shown = [line for line in command.out.splitlines() if line.startswith("built ")]
        built.append([json.loads(line.removeprefix("built ")) for line in shown])
    assert len(built[0]) == 1
    assert built[0] == built[1]
