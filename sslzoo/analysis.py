"""What can be asked of a method, at its checkpoints and while it trains. Importable without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sslzoo.recipe.sections import AnalysisConfig, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from sslzoo.batch import Batch
    from sslzoo.method import SSLMethod

ConfigT = TypeVar("ConfigT", bound=AnalysisConfig)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One checkpoint, looked at."""

    path: Path
    step: int  # optimiser steps finished
    epoch: int
    seen: list[Any]  # of each batch, what Analysis.look returned
    history: list[dict[str, Any]]  # what the same analysis noted while that run trained


class Analysis(ABC, Generic[ConfigT]):
    """Looks at a method's batches, puts what it saw into numbers, and writes a report.

    A subclass sets ``Config`` and implements :meth:`look`, :meth:`describe` and :meth:`write`, and :meth:`metrics`
    where training should log something. It imports torch inside its functions only, if recipes that name it are to be
    checked without torch.
    """

    Config: ClassVar[type[AnalysisConfig]]

    def __init__(self, cfg: ConfigT) -> None:
        self.cfg = cfg

    @abstractmethod
    def look(self, method: SSLMethod[Any], batch: Batch) -> Any:
        """What is to be seen at one training batch, in the mode (training or evaluation) that ``method`` is in.

        Called by all ranks, and must return the same on all of them. Raises ``ValueError`` for a method, or a batch,
        that cannot be looked at, which is tried before a run begins. Buffers and random numbers may change: they are
        put back.
        """

    @abstractmethod
    def describe(self, seen: Sequence[Any]) -> dict[str, Any]:
        """What :meth:`look` saw of several batches, as numbers, text, lists and mappings of such."""

    def metrics(self, described: Mapping[str, Any]) -> dict[str, float]:
        """What of :meth:`describe` goes to ``metrics.csv`` while a method trains."""
        del described
        return {}

    @abstractmethod
    def write(self, looks: Sequence[Look], *, recipe: Recipe, sample_id: Tensor, out: Path) -> str:
        """Write a report into the folder ``out``; returns what to print.

        ``looks`` are a run's, in the order of their steps, each at the same images ``sample_id`` (N,).
        """

    def observe(self, method: SSLMethod[Any], batch: Batch) -> Any:
        """:meth:`look`, without gradient and without a trace in the method or in the random numbers to come."""
        with method.untouched():
            return self.look(method, batch)
