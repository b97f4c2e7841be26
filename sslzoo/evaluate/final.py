"""What a finished run learned, beside what needs no training: ``eval/summary.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslzoo.distributed import rank
from sslzoo.evaluate.extract import Encoder, Extracted, extract
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.evaluate.logistic import linear_probe, principal_components
from sslzoo.evaluate.metrics import FEATURES
from sslzoo.evaluate.progress import EvaluationProgress, Report, reported
from sslzoo.evaluate.sgd_probe import EPOCHS, STEPS, linear_evaluation
from sslzoo.files import write_json
from sslzoo.randomness import is_holdout
from sslzoo.recipe.sections import PCA_WIDTH, Recipe

if TYPE_CHECKING:
    from sslzoo.data.module import SSLDataModule
    from sslzoo.method import SSLMethod

# Stages that progress shows: features of two splits; of each kind linear probe, logistic regression and k-NN.
_EXTRACTIONS, _JUDGEMENTS = 2, 3
PIXEL_LIMIT = 4096  # values an image; a probe on raw pixels holds the square of it

FROZEN = (
    "frozen features of the plain images. Linear, on features standardised by the training set: SGD with "
    f"momentum at probe.lrs for {EPOCHS} epochs (at least {STEPS} steps), the rate chosen on held-out training "
    "samples. Logistic regression: converged, the L2 strength chosen on the same samples. Both tested once. "
    "k-NN: weighted cosine over the training set"
)
ONLINE = (
    "online: linear probe trained beside the method on augmented views, its learning rate chosen on held-out "
    "training samples; weighted cosine k-NN of the plain images after the last epoch"
)
UNLABELLED = "neither the training data nor probe.data has labels"
# Summary keys that name a figure of the last validation.
_ONLINE_KEYS = {
    "linear_top1": "val/linear_top1",
    "linear_top5": "val/linear_top5",
    "knn_top1": "val/knn_top1",
}


def final_evaluation(
    method: SSLMethod[Any],
    datamodule: SSLDataModule,
    recipe: Recipe,
    *,
    online: Mapping[str, float],
    initial: Callable[[], nn.Module],
    folder: Path,
    seconds: float,
    evaluated_before: float = 0.0,
    progress: EvaluationProgress | None = None,
    brief: bool = False,
) -> dict[str, Any]:
    """Evaluate, write ``folder/summary.json`` on rank 0 and return it on all ranks. Collective.

    ``online`` holds the last ``val/...`` metrics, ``initial`` builds the backbone as it was before
    training, ``seconds`` is what training took over all starts of the run, ``evaluated_before`` what earlier
    starts spent here. With ``eval.baselines`` the trained encoder, the initial one,
    raw pixels and their first 64 principal components get the same linear probe and k-NN; without,
    the summary repeats the online figures. Accuracies are fractions; keys of unmeasured ones are absent.
    ``progress`` shows how far it is and changes no number; ``brief`` tries everything for one step.
    """
    start = time.perf_counter()
    labelled = [s for s in datamodule.eval_sets() if s.num_classes > 0]
    results: dict[str, float] = {}
    if labelled and recipe.eval.baselines:
        protocol = FROZEN
        with progress or EvaluationProgress() as seen:
            results = _with_baselines(method, datamodule, recipe, initial, seen, brief=brief)
    elif labelled:
        protocol = ONLINE
        results = {key: online[metric] for key, metric in _ONLINE_KEYS.items() if metric in online}
    else:
        protocol = UNLABELLED
    if "val/linear_top1" in online:
        results["online_linear_top1"] = online["val/linear_top1"]
    summary: dict[str, Any] = results | {
        "protocol": protocol,
        "seconds": round(seconds, 1),
        "evaluation_seconds": round(evaluated_before + time.perf_counter() - start, 1),
        "seed": recipe.seed,
    }
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary)
    return summary


def _with_baselines(
    method: SSLMethod[Any],
    datamodule: SSLDataModule,
    recipe: Recipe,
    initial: Callable[[], nn.Module],
    progress: EvaluationProgress,
    *,
    brief: bool,
) -> dict[str, float]:
    trained, fresh = method.backbone, initial().eval()
    fresh = fresh.to(method.device, next(trained.parameters()).dtype)
    was_training = trained.training
    trained.eval()
    before = "random_init_" if recipe.backbone.weights is None else "start_"
    encoders: dict[str, Encoder] = {"": trained, before: fresh, "raw_pixels_": _pixels}
    sets = datamodule.eval_sets()
    loaders = datamodule.val_dataloader()
    primary = next(s for s in sets if s.num_classes > 0)
    progress.expect(_EXTRACTIONS + _JUDGEMENTS * (len(encoders) + 1))

    def extracted(split: str, report: Report) -> Extracted:
        i = next(i for i, s in enumerate(sets) if (s.name, s.split) == (primary.name, split))
        return extract(encoders, reported(loaders[i], report), datamodule, method.device, i)

    try:
        train = extracted("train", progress.stage("extracting training features"))
        test = extracted("test", progress.stage("extracting test features"))
    finally:
        trained.train(was_training)
    return _measure(train, test, recipe, progress, classes=primary.num_classes, brief=brief)


def _pixels(image: Tensor) -> Tensor:
    if image.shape[1:].numel() > PIXEL_LIMIT:
        return image.new_empty(len(image), 0)
    return image.flatten(1)


@torch.no_grad()
def _measure(
    train: Extracted,
    test: Extracted,
    recipe: Recipe,
    progress: EvaluationProgress,
    *,
    classes: int,
    brief: bool,
) -> dict[str, float]:
    """Probe and k-NN of every feature set, by summary key; raw pixels bring PCA along."""
    pairs = {name: (train.features[name], test.features[name]) for name in train.features}
    pixels, test_pixels = pairs["raw_pixels_"]
    if pixels.shape[1] == 0:
        del pairs["raw_pixels_"]
    else:
        mean, components = principal_components(pixels, PCA_WIDTH)
        pairs["pca_"] = ((pixels - mean) @ components, (test_pixels - mean) @ components)
    progress.expect(_EXTRACTIONS + _JUDGEMENTS * len(pairs))
    held_out = is_holdout(train.sample_id, recipe.probe.holdout, recipe.seed)
    results: dict[str, float] = {}
    for name, (x, test_x) in pairs.items():
        pair, test_pair = (x, train.label), (test_x, test.label)
        report = progress.stage(f"{FEATURES[name]}: linear probe")
        probe = linear_evaluation(
            pair,
            test_pair,
            held_out,
            recipe.probe,
            classes=classes,
            seed=recipe.seed,
            report=report,
            brief=brief,
        )
        results[f"{name}linear_top1"] = probe.top1
        results[f"{name}linear_top5"] = probe.top5
        report = progress.stage(f"{FEATURES[name]}: logistic regression")
        regression = linear_probe(*pair, *test_pair, held_out, classes=classes, report=report, brief=brief)
        results[f"{name}logistic_top1"] = regression.top1
        results[f"{name}knn_top1"] = knn_accuracy(
            x,
            train.label,
            test_x,
            test.label,
            k=recipe.eval.knn_k,
            temperature=recipe.eval.knn_temperature,
            classes=classes,
            report=progress.stage(f"{FEATURES[name]}: k-NN"),
        )
    return results
