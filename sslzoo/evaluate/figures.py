"""Figures of an evaluation: their keys, the numbers of samples behind them, and their form in checkpoints. Importable
without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sslzoo.recipe.sections import PCA_WIDTH

if TYPE_CHECKING:
    from sslzoo.evaluate.task import Samples

# Kinds of features in the final evaluation, by the prefix of their keys in the summary.
FEATURES = {
    "": "trained encoder",
    "random_init_": "random init",
    "start_": "start (pretrained)",  # instead of random init, if backbone.weights is set
    "raw_pixels_": "raw pixels",
    "pca_": f"PCA-{PCA_WIDTH}",
}
# Names of evaluations in tables; those of a paper's protocol are the protocol's.
EVALUATIONS = {"knn": "k-NN", "logistic": "logistic regression", "honest": "SGD (honest)"}
LAYER = "backbone"  # the layer whose figures have plain keys
OWN = "data"  # name of the training data itself, in keys and in the summary


class Measured(NamedTuple):
    """Results of one evaluation."""

    figures: dict[str, float]  # by key, see figure_key
    samples: dict[str, Samples]  # by data set, see figure_name
    representation: dict[str, float]  # of the training images: std, rankme, ...

    def to_state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "figures": dict(self.figures),
            "samples": {name: samples._asdict() for name, samples in self.samples.items()},
            "representation": dict(self.representation),
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Measured:
        """Restore from the result of :meth:`to_state`."""
        from sslzoo.evaluate.task import Samples

        samples = {name: Samples(**counts) for name, counts in state["samples"].items()}
        return Measured(dict(state["figures"]), samples, dict(state.get("representation", {})))


def figure_name(data: str) -> str:
    """Name of a data set in keys: ``data`` for the training data itself, otherwise its entry in ``probe.data``."""
    return data or OWN


def figure_key(figure: str, data: str, layer: str, *, first: str) -> str:
    """Key of ``figure`` (such as ``linear_top1``): plain for the backbone on the ``first`` labelled data set, otherwise
    followed by ``/<data>/<layer>``."""
    return figure if (data, layer) == (first, LAYER) else f"{figure}/{figure_name(data)}/{layer}"


def is_accuracy(key: str) -> bool:
    """Whether the figure is an accuracy, as a fraction of the test samples."""
    return key.partition("/")[0].endswith(("_top1", "_top5"))


def evaluation_title(name: str, title: str = "") -> str:
    """The evaluation ``name`` in words, with the ``title`` of one of its figures, such as ``k=10, T=0.07``."""
    return ", ".join(filter(None, [EVALUATIONS.get(name, name), title]))


def is_empty_top5(key: str, values: Sequence[float]) -> bool:
    """Whether this is a top-5 accuracy that says nothing: it is 1 throughout, as with five classes or fewer."""
    figure = key.removeprefix("val/").partition("/")[0]
    return figure.endswith("_top5") and all(v == 1 for v in values if math.isfinite(v))


def data_of(key: str, first: str) -> str:
    """The data set of a figure, as named by :func:`figure_name`; ``first`` is that of plain keys."""
    _, *rest = key.split("/")
    return "/".join(rest[:-1]) or first


def layer_of(key: str) -> str:
    """The layer of a figure."""
    return key.rpartition("/")[2] if "/" in key else LAYER
