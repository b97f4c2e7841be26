"""Final evaluation of a run, with baselines, written to ``eval/summary.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslzoo.distributed import rank
from sslzoo.evaluate import logistic
from sslzoo.evaluate.extract import Encoder, Extracted, extract
from sslzoo.evaluate.figures import FEATURES, Measured, data_of, figure_name, is_accuracy
from sslzoo.evaluate.knn import knn_accuracy
from sslzoo.evaluate.logistic import linear_probe, principal_components
from sslzoo.evaluate.metrics import interval
from sslzoo.evaluate.progress import EvaluationProgress, Report, reported
from sslzoo.evaluate.sgd_probe import sgd_evaluation, sgd_schedule
from sslzoo.evaluate.task import Features, Samples, Task, count_samples, roles
from sslzoo.files import write_json
from sslzoo.recipe.sections import PCA_WIDTH, Recipe

if TYPE_CHECKING:
    from sslzoo.data.module import SSLDataModule
    from sslzoo.method import SSLMethod

# Stages in the progress display: extraction for two splits; logistic regression, SGD and k-NN per kind of features.
_EXTRACTIONS, _JUDGEMENTS = 2, 3
PIXEL_LIMIT = 4096  # maximum values per image for raw pixels, because memory grows with the square


def final_evaluation(
    method: SSLMethod[Any],
    datamodule: SSLDataModule,
    recipe: Recipe,
    *,
    last: Measured | None,
    initial: Callable[[], nn.Module],
    folder: Path,
    seconds: float,
    evaluated_before: float = 0.0,
    progress: EvaluationProgress | None = None,
    verdict: Mapping[str, Any] | None = None,
    brief: bool = False,
) -> dict[str, Any]:
    """Evaluate, write ``folder/summary.json`` on rank 0 and return its content on all ranks. Collective.

    ``last`` are the results of the last validation, which the summary includes; ``initial`` builds the backbone
    as it was before training; ``seconds`` is the training time over all starts of the run, ``evaluated_before``
    the time that earlier starts spent in this function. With ``eval.baselines``, the trained encoder, the
    initial one, raw pixels and their first 64 principal components are evaluated with the same linear probe,
    linear evaluation by SGD, and k-NN, on the first labelled data set. ``verdict`` says whether the run is healthy,
    None if that is unknown. Accuracies are fractions; keys of figures that were not measured are
    absent. ``brief`` does a single step of everything, for dry runs.
    """
    start = time.perf_counter()
    measured = Measured({}, {}, {}) if last is None else last
    if datamodule.eval_sets() and recipe.eval.baselines:
        with progress or EvaluationProgress() as display:
            result = _with_baselines(method, datamodule, recipe, initial, display, brief=brief)
        measured = Measured(
            measured.figures | result.figures,
            measured.samples | result.samples,
            measured.representation,
        )
    summary = _described(measured, datamodule, recipe, brief=brief) | {
        "seconds": round(seconds, 1),
        "evaluation_seconds": round(evaluated_before + time.perf_counter() - start, 1),
        "seed": recipe.seed,
    }
    summary |= {} if verdict is None else {"verdict": dict(verdict)}
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
) -> Measured:
    trained, fresh = method.backbone, initial().eval()
    fresh = fresh.to(method.device, next(trained.parameters()).dtype)
    was_training = trained.training
    trained.eval()
    before = "random_init_" if recipe.backbone.weights is None else "start_"
    encoders: dict[str, Encoder] = {"": trained, before: fresh, "raw_pixels_": _pixels}
    sets, loaders = datamodule.eval_sets()[:2], datamodule.val_dataloader()
    progress.expect(_EXTRACTIONS + _JUDGEMENTS * (len(encoders) + 1))

    def extracted(i: int, report: Report) -> Extracted:
        return extract(encoders, reported(loaders[i], report), datamodule, method.device, i)

    try:
        train = extracted(0, progress.stage("extracting training features"))
        test = extracted(1, progress.stage("extracting test features"))
    finally:
        trained.train(was_training)
    roles_of = roles(train.sample_id, len(sets[0].source), recipe.probe, recipe.eval, recipe.seed)
    tasks = {
        name: Task(
            Features(x, train.label, train.sample_id),
            Features(test.features[name], test.label, test.sample_id),
            roles_of,
            sets[0].num_classes,
        )
        for name, x in train.features.items()
    }
    counted = count_samples(roles_of, len(test.label), listed=sum(s.size for s in sets))
    figures = _measure(tasks, recipe, progress, brief=brief)
    return Measured(figures, {figure_name(sets[0].name): counted}, {})


def _pixels(image: Tensor) -> Tensor:
    if image.shape[1:].numel() > PIXEL_LIMIT:
        return image.new_empty(len(image), 0)
    return image.flatten(1)


@torch.no_grad()
def _measure(
    tasks: dict[str, Task], recipe: Recipe, progress: EvaluationProgress, *, brief: bool
) -> dict[str, float]:
    """Evaluate every kind of features, by summary key; PCA features are derived from raw pixels."""
    pixels = tasks["raw_pixels_"]
    if pixels.train.x.shape[1] == 0:
        del tasks["raw_pixels_"]
    else:
        mean, components = principal_components(pixels.train.x, PCA_WIDTH)
        train, test = (f._replace(x=(f.x - mean) @ components) for f in (pixels.train, pixels.test))
        tasks["pca_"] = pixels._replace(train=train, test=test)
    progress.expect(_EXTRACTIONS + _JUDGEMENTS * len(tasks))
    figures: dict[str, float] = {}
    for name, task in tasks.items():
        linear = linear_probe(
            task,
            effort=logistic.QUICK,
            report=progress.stage(f"{FEATURES[name]}: linear probe"),
            brief=brief,
        )
        sgd = sgd_evaluation(
            task,
            recipe.probe,
            seed=recipe.seed,
            report=progress.stage(f"{FEATURES[name]}: linear probe by SGD"),
            brief=brief,
        )
        knn = knn_accuracy(
            task,
            k=recipe.eval.knn_k,
            temperature=recipe.eval.knn_temperature,
            report=progress.stage(f"{FEATURES[name]}: k-NN"),
        )
        results = {
            "linear_top1": linear.top1,
            "linear_top5": linear.top5,
            "linear_l2": linear.l2,
            "sgd_top1": sgd.top1,
            "sgd_top5": sgd.top5,
            "sgd_lr": sgd.lr,
            "knn_top1": knn,
        }
        figures |= {name + key: value for key, value in results.items()}
    return figures


# -- description -------------------------------------------------------------------------------------


def _described(
    measured: Measured, datamodule: SSLDataModule, recipe: Recipe, *, brief: bool
) -> dict[str, Any]:
    """The figures with intervals, for each data set the numbers of samples and the protocol, and the representation
    metrics."""
    represented = {"representation": measured.representation} if measured.representation else {}
    if not measured.figures:
        unlabelled = f"{recipe.data.dataset} has no labels, and probe.data names no labelled data"
        why = "no evaluation has run" if datamodule.eval_sets() else unlabelled
        return {"not_measured": f"linear probe and k-NN: {why}", **represented}
    first = next(iter(measured.samples))
    names = {figure_name(s.name): s.name or recipe.data.dataset for s in datamodule.eval_sets()}
    intervals = {
        key: [round(end, 4) for end in interval(value, measured.samples[data_of(key, first)].n_test)]
        for key, value in measured.figures.items()
        if is_accuracy(key)
    }
    data = {
        name: {"dataset": names[name]}
        | samples._asdict()
        | {
            "protocol": _protocol(
                [key for key in measured.figures if data_of(key, first) == name], samples, recipe, brief=brief
            )
        }
        for name, samples in measured.samples.items()
    }
    return {**measured.figures, "interval_95": intervals, "data_sets": data, **represented}


def _protocol(keys: Iterable[str], samples: Samples, recipe: Recipe, *, brief: bool) -> str:
    """A description of how the figures with the given ``keys`` were measured."""
    probe, plain = recipe.probe, {key.partition("/")[0] for key in keys}
    held_out = f"chosen on {samples.n_held_out:,} held-out training images"
    sentences = ["Features of plain images, encoder frozen."]
    if "linear_top1" in plain:
        effort = logistic.QUICK
        strengths = ", ".join(f"{strength:g}" for strength in effort.strengths)
        steps = 1 if brief else effort.iterations
        sentences.append(
            f"Linear: logistic regression on standardised features, at most {steps} iteration{'s' * (steps > 1)} of "
            f"L-BFGS, L2 strength of {strengths} {held_out}."
        )
    if "sgd_top1" in plain:
        epochs, _, batch = sgd_schedule(samples.n_train, brief=brief)
        decay = f"weight decay {probe.weight_decay:g}" if probe.weight_decay else "no regularisation"
        rates = ", ".join(f"{rate:g}" for rate in probe.lrs)
        sentences.append(
            f"SGD: on the same features, momentum {probe.momentum:g}, {decay}, batches of {batch}, {epochs} "
            f"epoch{'s' * (epochs > 1)}, rate of {rates} {held_out}."
        )
    if "knn_top1" in plain:
        sentences.append(
            f"k-NN: the {recipe.eval.knn_k} nearest of {samples.n_bank:,} by cosine, temperature "
            f"{recipe.eval.knn_temperature:g}."
        )
    if "online_top1" in plain:
        sentences.append("Online: by SGD during training, on the views and features of its steps.")
    return " ".join(sentences)
