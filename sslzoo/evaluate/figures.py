"""Figures of an evaluation: their keys, the samples behind them, how they stand in checkpoints and in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sslzoo.evaluate.task import Samples

LAYER = "backbone"  # whose figures have plain keys
OWN = "data"  # in keys and in the summary: the training data itself


class Measured(NamedTuple):
    """What one evaluation found."""

    figures: dict[str, float]  # by key, see figure_key
    samples: dict[str, Samples]  # by data set, see figure_name

    def to_state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "figures": dict(self.figures),
            "samples": {name: of._asdict() for name, of in self.samples.items()},
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Measured:
        """What :meth:`to_state` gave."""
        samples = {name: Samples(**of) for name, of in state["samples"].items()}
        return Measured(dict(state["figures"]), samples)


def figure_name(data: str) -> str:
    """Of a data set, in keys: ``data`` for the training data's own labels, otherwise its entry in ``probe.data``."""
    return data or OWN


def figure_key(figure: str, data: str, layer: str, *, first: str) -> str:
    """Of ``figure`` (``linear_top1``): plain for the backbone and the ``first`` labelled data set, otherwise with
    ``/<data>/<layer>``."""
    return figure if (data, layer) == (first, LAYER) else f"{figure}/{figure_name(data)}/{layer}"


def is_accuracy(key: str) -> bool:
    """Whether a figure's key is that of an accuracy, a fraction of the test samples."""
    return key.partition("/")[0].endswith(("_top1", "_top5"))


def data_of(key: str, first: str) -> str:
    """The data set, by :func:`figure_name`, of a figure's key; ``first``: that of plain keys."""
    _, *rest = key.split("/")
    return "/".join(rest[:-1]) or first


def layer_of(key: str) -> str:
    """The layer of a figure's key."""
    return key.rpartition("/")[2] if "/" in key else LAYER
