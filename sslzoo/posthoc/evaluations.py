"""The evaluations by name: k-NN and logistic regression on stored features, and protocols of linear evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sslzoo.checks import require
from sslzoo.evaluate import logistic
from sslzoo.evaluate.figures import LAYER, OWN, figure_name
from sslzoo.evaluate.knn import knn_accuracies
from sslzoo.evaluate.logistic import linear_probe
from sslzoo.evaluate.progress import EvaluationProgress
from sslzoo.evaluate.task import Samples, Task, count_samples, roles
from sslzoo.posthoc.results import Results, Row
from sslzoo.posthoc.store import FeatureStore
from sslzoo.protocols.protocol import FeatureProtocol, LinearResult, Protocol, ViewProtocol, protocol_named
from sslzoo.protocols.published import published
from sslzoo.protocols.run import encoder_of, evaluate_linear
from sslzoo.recipe.load import plain
from sslzoo.recipe.plan import plan_of
from sslzoo.recipe.registry import ON_FEATURES, is_plugin

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet, SSLDataModule
    from sslzoo.method import SSLMethod
    from sslzoo.posthoc.target import Target
    from sslzoo.recipe.sections import Recipe


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the evaluations of one encoder share."""

    target: Target
    data: SSLDataModule
    store: FeatureStore
    device: torch.device
    progress: EvaluationProgress
    state: Path  # folder for the state of unfinished evaluations
    ks: tuple[int, ...] = ()  # empty: eval.knn_k
    temperatures: tuple[float, ...] = ()  # empty: eval.knn_temperature
    brief: bool = False  # train for one epoch only, for dry runs

    def check(self, names: Sequence[str]) -> None:
        """``ValueError`` if nothing is labelled, there are too few training samples, or one of the evaluations
        ``names`` is not made for the encoder."""
        target, sets = self.target, self.data.eval_sets()
        require(
            len(sets) > 0,
            f"{target.recipe.data.dataset} has no labels to evaluate by: name labelled data in probe.data",
        )
        for train in sets[::2]:
            bank = min(target.recipe.eval.bank_size or train.size, train.size)
            most = max(self.ks, default=0)
            require(
                most <= bank,
                f"--k {most} exceeds the {bank} training images of {train.source.name}; lower it",
            )
            if any(map(_chooses, names)):
                _check_held_out(train, target.recipe)
        check_suits(names, target.backbone, target.method)

    def identity(self, name: str) -> dict[str, Any]:
        """What the results of the evaluation ``name`` depend on, as plain values."""
        target, recipe = self.target, self.target.recipe
        sgd = {key: getattr(recipe.probe, key) for key in ("lrs", "momentum", "weight_decay")}
        settings = {
            "knn": {
                "k": self.neighbours,
                "temperature": self.all_temperatures,
                "bank_size": recipe.eval.bank_size,
            },
            "logistic": logistic.THOROUGH._asdict(),
        }
        return plain(
            {
                "weights": target.fingerprints,
                "images": [s.source.fingerprint for s in self.data.eval_sets()],
                "view": repr(self.data.plain),
                "mean and std": [recipe.data.mean, recipe.data.std],
                "probe": {"holdout": recipe.probe.holdout, "train_size": recipe.probe.train_size},
                "seed": recipe.seed,
                "settings": settings.get(name) or sgd,
            }
        )

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Every k of k-NN."""
        return self.ks or (self.target.recipe.eval.knn_k,)

    @property
    def all_temperatures(self) -> tuple[float, ...]:
        """Every temperature of k-NN."""
        return self.temperatures or (self.target.recipe.eval.knn_temperature,)

    def run(self, name: str) -> Results:
        """The results of the evaluation ``name``. Collective."""
        protocol = None if name in ON_FEATURES else protocol_named(name)
        start, sets = time.perf_counter(), self.data.eval_sets()
        if isinstance(protocol, ViewProtocol):
            self.progress.expect(1)
        else:
            tasks = len(sets) // 2 * len(self.target.layers)
            self.progress.expect(len(sets) + tasks)
            done = self.store.fill(self.target, self.data, self.device, self.progress.stage)
            self.progress.expect(done + tasks)
        extracted = time.perf_counter()
        on_features = {"knn": _knn, "logistic": _logistic}
        found = on_features[name](self) if protocol is None else _linear(self, protocol)
        seconds = {
            "features": round(extracted - start, 2),
            "evaluation": round(time.perf_counter() - extracted, 2),
        }
        return Results(
            name=file_stem(name),
            how=found.how,
            rows=found.rows,
            counts=found.counts,
            datasets={figure_name(s.name): s.name or self.target.recipe.data.dataset for s in sets},
            about=self.about() | {"seconds": seconds},
            identity=self.identity(name),
        )

    def forget(self, names: Sequence[str]) -> None:
        """Delete the state of the evaluations ``names``, which are finished. Not collective."""
        for name in names:
            for path in self.state.glob(f"{file_stem(name)}_*.pt"):
                path.unlink()
        with suppress(OSError):  # there is none, or another evaluation has its state there
            self.state.rmdir()

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


def file_stem(name: str) -> str:
    """Name of the files of the evaluation ``name``, which may be a protocol's ``module:attribute``."""
    return protocol_named(name).name if is_plugin(name) else name


def check_suits(names: Sequence[str], backbone: nn.Module, method: SSLMethod[Any] | None) -> None:
    """``ValueError`` if one of the evaluations ``names`` does not exist, or is not made for this encoder."""
    for name in names:
        if name not in ON_FEATURES:
            protocol = protocol_named(name)
            if isinstance(protocol, ViewProtocol):
                encoder_of(protocol, backbone, method)


def _chooses(name: str) -> bool:
    """Whether the evaluation ``name`` chooses by held-out training images."""
    if name in ON_FEATURES:
        return name == "logistic"
    protocol = protocol_named(name)
    return protocol.held_out if isinstance(protocol, ViewProtocol) else True


def _check_held_out(train: EvalSet, recipe: Recipe) -> None:
    """``ValueError`` if ``recipe`` holds out none or all of the images that a classifier may learn from."""
    of = roles(train.sample_id, len(train.source), recipe.probe, recipe.eval, recipe.seed)
    learned, held_out = int(of.learned.sum()), int(of.held_out.sum())
    require(
        min(learned, held_out) > 0,
        f"of the training images of {train.source.name} {learned:,} are to learn from and {held_out:,} are held out to "
        f"choose by; {'lower' if learned == 0 else 'raise'} probe.holdout={recipe.probe.holdout:g}",
    )


class Found(NamedTuple):
    """Figures of one evaluation, and how and on how many images they were measured."""

    how: str
    rows: list[Row]
    counts: dict[str, dict[str, int]]


class Measurable(NamedTuple):
    """Features of one layer on one labelled data set."""

    data: str
    layer: str
    task: Task
    samples: Samples


def _knn(bench: Bench) -> Found:
    ks, temperatures = bench.neighbours, bench.all_temperatures
    rows, counts = [], {}
    for data, layer, task, samples in bench.tasks():
        counts[data] = _counts(samples, "n_bank", "n_test", "n_unreadable")
        report = bench.progress.stage(f"{data}, {layer}: k-NN")
        for (k, temperature), top1 in knn_accuracies(task, ks, temperatures, report).items():
            rows.append(
                Row(
                    key=f"knn_k{k}_t{temperature:g}",
                    title=f"k={k}, T={temperature:g}",
                    data=data,
                    layer=layer,
                    top1=top1,
                    n=samples.n_test,
                )
            )
    how = (
        "Features of plain images, encoder frozen; vote of the k nearest training images by cosine, weighted by "
        "exp(cosine / T)."
    )
    return Found(how, rows, counts)


def _logistic(bench: Bench) -> Found:
    rows, counts = [], {}
    for data, layer, task, samples in bench.tasks():
        counts[data] = _counts(samples, "n_train", "n_held_out", "n_test", "n_unreadable")
        found = linear_probe(
            task,
            effort=logistic.THOROUGH,
            report=bench.progress.stage(f"{data}, {layer}: logistic regression"),
            brief=bench.brief,
        )
        rows.append(
            Row(
                key="logistic",
                data=data,
                layer=layer,
                top1=found.top1,
                top5=found.top5,
                n=samples.n_test,
                chosen=f"L2 {found.l2:g}",
                holdout_top1=found.holdout_top1,
                n_held_out=samples.n_held_out,
                converged=logistic.converged(found.fits),
            )
        )
    effort = logistic.THOROUGH
    strengths = ", ".join(f"{strength:g}" for strength in effort.strengths)
    how = (
        "Features of plain images, encoder frozen; logistic regression on standardised features, "
        f"L2 strength of {strengths} chosen on held-out training images; tested once. Converged: the norm of the "
        f"gradient is at most {effort.tolerance:g} of that at zero weights, within {effort.iterations:,} iterations."
    )
    return Found(how, rows, counts)


def _linear(bench: Bench, protocol: Protocol) -> Found:
    """Linear evaluation by ``protocol``, on stored features or, with its own views, on images."""
    recipe, target = bench.target.recipe, bench.target
    found: list[tuple[str, str, LinearResult]] = []  # data set, layer, result
    unreadable = {}
    if isinstance(protocol, FeatureProtocol):
        for data, layer, task, samples in bench.tasks():
            report = bench.progress.stage(f"{data}, {layer}: linear evaluation by {protocol.name}")
            unreadable[data] = samples.n_unreadable
            found.append((data, layer, protocol.evaluate(task, recipe.probe, recipe.seed, report)))
    else:
        assert isinstance(protocol, ViewProtocol)
        if bench.brief:
            protocol = replace(protocol, epochs=1, iterations={}, test_epochs=protocol.test_epochs and 1)
        results = evaluate_linear(
            protocol,
            target.backbone,
            recipe,
            bench.data,
            device=bench.device,
            method=target.method,
            folder=bench.state,
            report=bench.progress.stage(f"linear evaluation by {protocol.name}"),
        )
        found = [(data, LAYER, result) for data, result in results.items()]
    rows, counts, adapted, own = [], {}, {}, ()
    for data, layer, result in found:
        counts[data] = {
            "n_train": result.n_train,
            "n_held_out": result.n_held_out,
            "n_test": result.n_test,
            "n_unreadable": unreadable.get(data, result.n_unreadable),
        }
        adapted |= dict.fromkeys(result.adapted)
        own = result.adapted if data == OWN else own
        rows += _rows(protocol, data, layer, result)
    rows, remark = _compared(bench, protocol, rows, own)
    how = f"{protocol.source}: {protocol.summary}."
    how += f" {protocol.remarks}" if protocol.remarks else ""
    how += remark
    how += f" Adapted: {'; '.join(adapted)}." if adapted else ""
    return Found(how, rows, counts)


def _rows(protocol: Protocol, data: str, layer: str, result: LinearResult) -> list[Row]:
    """The figure after the last step and, where the test set was read more than once, the best one."""
    best = result.best
    last = Row(
        key=protocol.name,
        title="" if best is None else "last epoch",
        data=data,
        layer=layer,
        top1=result.top1,
        top5=result.top5,
        n=result.n_test,
        chosen=result.classifier,
        holdout_top1=result.held_out_top1,
        n_held_out=result.n_held_out,
    )
    if best is None:
        return [last]
    optimistic = Row(
        key=f"{protocol.name}_best",
        title=f"best on test images, epoch {best.epoch}",
        data=data,
        layer=layer,
        top1=best.top1,
        top5=best.top5,
        n=result.n_test,
        chosen=best.classifier or result.classifier,
    )
    return [last, optimistic]


def _compared(
    bench: Bench, protocol: Protocol, rows: list[Row], adapted: Sequence[str] = ()
) -> tuple[list[Row], str]:
    """``rows`` with the published figure of the recipe beside the one in the form that its authors report, and a
    sentence about it. The gap is only given if recipe, protocol and length of the training are those of the figure;
    ``adapted`` are the changes of the protocol."""
    recipe, target = bench.target.recipe, bench.target
    known = published(recipe)
    if known is None:
        return rows, ""
    different = known.incomparable(protocol, adapted)
    if not different:
        steps = plan_of(recipe, len(bench.data.train_source), 1).total_steps
        if target.step != steps:
            different = f"the encoder is from step {target.step} of {steps:,}"
    reported = f"{protocol.name}_best" if protocol.reported == "best" else protocol.name

    def with_figure(row: Row) -> Row:
        if (row.key, row.data, row.layer) != (reported, OWN, LAYER):
            return row
        gap = None if different else 100 * row.top1 - float(known.figure)
        return replace(row, published=known.figure, gap=gap)

    compared = list(map(with_figure, rows))
    source = f" ({known.source})" if known.source else ""
    return compared, f" Published: {known.figure}{source}" + (f", {different}." if different else ".")


def _counts(samples: Samples, *names: str) -> dict[str, int]:
    """The numbers of samples that the figures of an evaluation depend on."""
    return {name: getattr(samples, name) for name in names}
