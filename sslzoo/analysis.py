"""Contract of analyses, which examine a method during training and at its checkpoints. Importable without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sslzoo.panels import Panel
from sslzoo.pictures import Drawing
from sslzoo.recipe.sections import AnalysisConfig, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from sslzoo.batch import Batch
    from sslzoo.method import SSLMethod

ConfigT = TypeVar("ConfigT", bound=AnalysisConfig)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What an analysis observed at one checkpoint."""

    path: Path
    step: int  # finished optimiser steps
    epoch: int
    seen: list[Any]  # results of Analysis.look, one per batch
    history: list[dict[str, Any]]  # entries that the same analysis recorded while the run trained


class Analysis(ABC, Generic[ConfigT]):
    """Observes a method on training batches, summarises the observations as numbers, and writes a report.

    A subclass sets ``Config`` and implements :meth:`look`, :meth:`describe` and :meth:`write`; to log numbers during
    training, it implements :meth:`metrics` and sets ``panels``, and to show pictures of them, :meth:`draw`. If it
    imports torch only inside its functions, recipes that use it can be checked without torch.
    """

    Config: ClassVar[type[AnalysisConfig]]
    panels: ClassVar[tuple[Panel, ...]] = ()  # how reports and dashboards show what it logs during training
    drawings: ClassVar[tuple[str, ...]] = ()  # names of what draw returns, for dashboards

    def __init__(self, cfg: ConfigT) -> None:
        self.cfg = cfg

    @abstractmethod
    def look(self, method: SSLMethod[Any], batch: Batch) -> Any:
        """Observe ``method`` on one training batch, in the mode (training or evaluation) that it is in.

        Called on all ranks; must return the same value on each. Raises ``ValueError`` for a method or batch that it
        cannot handle; a run tries this before it starts. Changes to buffers and the random state are undone.
        """

    @abstractmethod
    def describe(self, seen: Sequence[Any]) -> dict[str, Any]:
        """Summarise the results of :meth:`look` for several batches as numbers, text, and lists and dicts of these."""

    def metrics(self, described: Mapping[str, Any]) -> dict[str, float]:
        """The numbers from :meth:`describe` that are logged to ``metrics.csv`` during training; none by default. Keys
        begin with a name of the analysis's own and ``/``."""
        del described
        return {}

    def draw(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Drawing]:
        """Pictures for dashboards, by the names in ``drawings``, of the results of :meth:`describe` so far in a
        training, each with ``step`` and ``epoch``; none by default. Called after evaluations, on rank 0 only."""
        del history
        return {}

    @abstractmethod
    def write(self, looks: Sequence[Look], *, recipe: Recipe, sample_id: Tensor, out: Path) -> str:
        """Write a report to the folder ``out`` and return the text to print.

        ``looks`` are the checkpoints of one run in step order, all observed on the same images ``sample_id`` (N,).
        """

    def observe(self, method: SSLMethod[Any], batch: Batch) -> Any:
        """Call :meth:`look` without gradients, and restore buffers and random state afterwards."""
        with method.untouched():
            return self.look(method, batch)
