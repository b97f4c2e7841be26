"""The analysis ``margins``: how margins would affect the positive pairs that a method compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import radians
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslzoo.analysis import Analysis, Look
from sslzoo.pictures import Drawing
from sslzoo.recipe.sections import Recipe
from sslzoo_methods.margin.analysis.config import MarginsConfig, margin_name
from sslzoo_methods.margin.analysis.panels import PANELS

if TYPE_CHECKING:
    from torch import Tensor

    from sslzoo.batch import Batch
    from sslzoo.method import SSLMethod
    from sslzoo_methods.margin.analysis.observe import Seen
    from sslzoo_methods.margin.factors import Margin

FILES = "index.html, margins.json, samples.csv.gz and plots"


class Margins(Analysis[MarginsConfig]):
    """Evaluates margins on the embeddings from :meth:`SSLMethod.contrasted`, without training with them.

    The negatives of an anchor are the positives of the other samples, regardless of the method's loss.
    """

    Config = MarginsConfig
    panels = PANELS
    drawings = ("angles", "angles_over_training", "slope_factor", "effects_by_epoch")

    @cached_property
    def margins(self) -> dict[str, Margin]:
        """The configured margins, by name."""
        from sslzoo_methods.margin.factors import Margin

        return {
            margin_name(m1, m2): Margin(angular=radians(m1), subtractive=m2) for m1, m2 in self.cfg.margins
        }

    def look(self, method: SSLMethod[Any], batch: Batch) -> Seen:
        """Angles and similarities of one batch."""
        from sslzoo_methods.margin.analysis.observe import see

        return see(method.contrasted(batch), temperature=self.cfg.temperature, name=method.cfg.name)

    def describe(self, seen: Sequence[Seen]) -> dict[str, Any]:
        """Histogram of the angles, and scalars for every margin."""
        from sslzoo_methods.margin.analysis.observe import describe, together

        return describe(together(seen), self.margins)

    def metrics(self, described: Mapping[str, Any]) -> dict[str, float]:
        """All scalars, named ``margins/...``."""
        from sslzoo_methods.margin.analysis.observe import metrics

        return metrics(described)

    def draw(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Drawing]:
        """Angles of the pairs, now and over the training, and the effects of the margins."""
        from sslzoo_methods.margin.analysis.plots import Snapshot, course_plots

        if not history:
            return {}
        tau = history[-1]["temperature"]
        snapshots = [
            Snapshot(record["step"], record["epoch"], record["histogram"], record["margins"])
            for record in history
            if record.get("temperature") == tau and self.margins.keys() <= record["margins"].keys()
        ]
        plots = course_plots(snapshots, self.margins, tau)
        return {name: Drawing(*plot) for name, plot in plots.items()}

    def write(self, looks: Sequence[Look], *, recipe: Recipe, sample_id: Tensor, out: Path) -> str:
        """Write scalars, a table of samples, plots and an HTML page; returns one line per margin."""
        from sslzoo_methods.margin.analysis.observe import together
        from sslzoo_methods.margin.analysis.report import lines, summarize, write

        last = together(looks[-1].seen)
        summary = summarize(looks, self.describe, recipe=recipe, samples=len(sample_id))
        write(out, summary, self.margins, last, sample_id)
        return "\n".join([*lines(summary), f"written to {out}: {FILES}"])
