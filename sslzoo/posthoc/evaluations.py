"""The evaluations of stored features by name: k-NN, logistic regression, and the protocol that is shown first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sslzoo.checks import require
from sslzoo.evaluate import logistic
from sslzoo.evaluate.figures import figure_name
from sslzoo.evaluate.knn import knn_accuracies
from sslzoo.evaluate.logistic import linear_probe
from sslzoo.evaluate.progress import EvaluationProgress
from sslzoo.evaluate.sgd_probe import sgd_evaluation, sgd_schedule
from sslzoo.evaluate.task import Samples, Task, count_samples, roles
from sslzoo.posthoc.results import Results, Row
from sslzoo.posthoc.store import FeatureStore
from sslzoo.recipe.registry import HONEST

if TYPE_CHECKING:
    from sslzoo.data.module import SSLDataModule
    from sslzoo.posthoc.target import Target


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the evaluations of one encoder share."""

    target: Target
    data: SSLDataModule
    store: FeatureStore
    device: torch.device
    progress: EvaluationProgress
    ks: tuple[int, ...] = ()  # empty: eval.knn_k
    temperatures: tuple[float, ...] = ()  # empty: eval.knn_temperature

    def check(self) -> None:
        """``ValueError`` if there are no labelled data, or too few training samples."""
        recipe = self.target.recipe
        sets = self.data.eval_sets()
        require(
            len(sets) > 0,
            f"{recipe.data.dataset} has no labels: name labelled data by probe.data=[...] or data.dataset=...",
        )
        for train in sets[::2]:
            bank = min(recipe.eval.bank_size or train.size, train.size)
            most = max(self.ks, default=0)
            require(
                most <= bank,
                f"--k {most} exceeds the {bank} training images of {train.source.name}; lower it",
            )

    def run(self, name: str) -> Results:
        """The results of the evaluation ``name``. Collective."""
        start = time.perf_counter()
        self.store.fill(self.target, self.data, self.device, self.progress.stage)
        extracted = time.perf_counter()
        found = {"knn": _knn, "logistic": _logistic, HONEST: _honest}[name](self)
        seconds = {
            "features": round(extracted - start, 2),
            "evaluation": round(time.perf_counter() - extracted, 2),
        }
        return replace(found, about=self.about() | {"seconds": seconds})

    def about(self) -> dict[str, Any]:
        """The encoder and the recipe, for the results' files."""
        target = self.target
        return {
            "target": target.name,
            "recipe": target.recipe.name,
            "step": target.step,
        }

    def tasks(self) -> Iterator[Measurable]:
        """The features of each labelled data set and layer, one after the other. Collective."""
        recipe, sets = self.target.recipe, self.data.eval_sets()
        for i in range(0, len(sets), 2):
            train, test = sets[i : i + 2]
            paths = [self.store.paths(self.target, self.data, j) for j in (i, i + 1)]
            for layer in self.target.layers:
                features = [self.store.read(of[layer], self.device) for of in paths]
                roles_of = roles(
                    features[0].sample_id, len(train.source), recipe.probe, recipe.eval, recipe.seed
                )
                task = Task(features[0], features[1], roles_of, train.num_classes)
                samples = count_samples(roles_of, len(features[1].label), listed=train.size + test.size)
                yield Measurable(figure_name(train.name), layer, task, samples)

    def results(
        self, name: str, how: str, rows: Sequence[Row], samples: dict[str, Samples], settings: dict[str, Any]
    ) -> Results:
        """Results with what they depend on: weights, images, and ``settings``."""
        sets = self.data.eval_sets()
        target = self.target
        identity = {
            "weights": {layer: target.weights(layer) for layer in target.layers},
            "images": [s.source.fingerprint for s in sets],
            "seed": target.recipe.seed,
            "settings": settings,
        }
        datasets = {figure_name(s.name): s.name or target.recipe.data.dataset for s in sets}
        return Results(name=name, how=how, rows=rows, samples=samples, datasets=datasets, identity=identity)


class Measurable(NamedTuple):
    """Features of one layer on one labelled data set."""

    data: str
    layer: str
    task: Task
    samples: Samples


def _knn(bench: Bench) -> Results:
    cfg = bench.target.recipe.eval
    ks, temperatures = bench.ks or (cfg.knn_k,), bench.temperatures or (cfg.knn_temperature,)
    rows, samples = [], {}
    for data, layer, task, counted in bench.tasks():
        samples[data] = counted
        report = bench.progress.stage(f"{data}, {layer}: k-NN")
        for (k, temperature), top1 in knn_accuracies(task, ks, temperatures, report).items():
            rows.append(
                Row(
                    key=f"knn_k{k}_t{temperature:g}",
                    title=f"k={k}, T={temperature:g}",
                    data=data,
                    layer=layer,
                    top1=top1,
                    n=counted.n_test,
                )
            )
    how = "Plain images, encoder frozen; vote of the k nearest training images by cosine, weighted by exp(cosine / T)."
    return bench.results("knn", how, rows, samples, {"k": list(ks), "temperature": list(temperatures)})


def _logistic(bench: Bench) -> Results:
    rows, samples = [], {}
    for data, layer, task, counted in bench.tasks():
        samples[data] = counted
        found = linear_probe(task, report=bench.progress.stage(f"{data}, {layer}: logistic regression"))
        rows.append(
            Row(
                key="logistic",
                data=data,
                layer=layer,
                top1=found.top1,
                top5=found.top5,
                n=counted.n_test,
                chosen={"l2": found.l2},
                holdout_top1=found.holdout_top1,
            )
        )
    strengths = ", ".join(f"{strength:g}" for strength in logistic.STRENGTHS)
    how = (
        f"Plain images, encoder frozen; logistic regression on standardised features, "
        f"{logistic.ITERATIONS} iterations, L2 strength of {strengths} chosen on held-out training images."
    )
    return bench.results("logistic", how, rows, samples, {"strengths": list(logistic.STRENGTHS)})


def _honest(bench: Bench) -> Results:
    recipe = bench.target.recipe
    probe = recipe.probe
    rows, samples = [], {}
    for data, layer, task, counted in bench.tasks():
        samples[data] = counted
        report = bench.progress.stage(f"{data}, {layer}: linear evaluation")
        found = sgd_evaluation(task, probe, seed=recipe.seed, report=report)
        rows.append(
            Row(
                key=HONEST,
                data=data,
                layer=layer,
                top1=found.top1,
                top5=found.top5,
                n=counted.n_test,
                chosen={"rate": found.lr},
                holdout_top1=found.holdout_top1,
            )
        )
    schedule = sgd_schedule(next(iter(samples.values())).n_train)
    rates = ", ".join(f"{rate:g}" for rate in probe.lrs)
    how = (
        f"Plain images, encoder frozen; SGD on standardised features, momentum {probe.momentum:g}, batches of "
        f"{schedule.batch}, {schedule.epochs} epochs, rate of {rates} chosen on held-out training images; tested once."
    )
    settings = {"rates": list(probe.lrs), "momentum": probe.momentum, "weight_decay": probe.weight_decay}
    return bench.results(HONEST, how, rows, samples, settings)
