"""Representation metrics at each evaluation: of the plain features that it computes, and of a few images in views."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslzoo.distributed import broadcast_from_zero, gather_detached, world_size
from sslzoo.evaluate.figures import LAYER
from sslzoo.evaluate.representation import (
    PAIRS,
    SAMPLES,
    VIEWS,
    Neighbours,
    measure_embeddings,
    measure_plain,
    measure_views,
    objects,
    overlap,
)
from sslzoo.files import write_text
from sslzoo.randomness import subset

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)

FIGURES = (
    "width",
    "std",
    "rankme",
    "alpha",
    "uniformity",
    "overlap",
    "separation",
    "alignment",
    "lidar",
    "embedding_width",
    "embedding_std",
    "embedding_rankme",
)
EMBEDDING = "projector"  # the layer that the loss sees, by the name that methods publish it under


class Representation:
    """Measures the backbone's features of the training images, and writes their spectrum to ``spectrum.csv``.

    All ranks measure the features of all, in the order of their sample_id, so that the results do not depend on how the
    images are divided among processes. Which images these are, and their views, depends on the seed alone.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.path, self.seed = Path(folder) / "spectrum.csv", seed
        self._before: Neighbours | None = None  # of the last evaluation

    def measure(
        self,
        trainer: Any,
        pl_module: SSLMethod[Any],
        of: EvalSet,
        x: Tensor,
        label: Tensor | None,
        sample_id: Tensor,
    ) -> dict[str, float]:
        """Those of ``FIGURES`` that can be measured, from this rank's features ``x`` (M, F) of the samples
        ``sample_id`` (M,) of ``of``, the plain training images. Collective; equal on all ranks.

        Samples with non-finite features are left out; with less than two others, nothing is measured.
        """
        keep = min(SAMPLES, of.size)
        rows = torch.isin(sample_id, subset(self.seed, len(of.source), keep).to(sample_id.device))
        x, label, sample_id = _of_all_ranks(x[rows], None if label is None else label[rows], sample_id[rows])
        figures: dict[str, float] = {}
        compared = torch.isin(
            sample_id, subset(self.seed, len(of.source), min(PAIRS, keep)).to(sample_id.device)
        )
        compared = compared.nonzero()[:, 0]
        if len(compared) > 1:
            plain = measure_plain(x, label, sample_id, compared)
            figures |= plain.figures
            if self._before is not None:
                figures |= _known(overlap=overlap(self._before, plain.neighbours))
            self._before = Neighbours(*(ids.cpu() for ids in plain.neighbours))
            if trainer.is_global_zero:
                try:
                    self._write(pl_module.optimizer_steps, trainer.current_epoch, plain.spectrum.tolist())
                except OSError as error:  # what only people look at must not end a run
                    log.warning("%s could not be written: %s", self.path, error)
        chosen = subset(self.seed, len(of.source), objects(len(of.source), x.shape[1]))
        views, embedded = self._in_views(trainer, pl_module, chosen)
        if len(views) > 1:
            figures |= measure_views(views)
            figures |= measure_embeddings(embedded) if embedded.shape[1] else {}
        return _of_rank_zero(figures, pl_module.device)

    def _in_views(self, trainer: Any, pl_module: SSLMethod[Any], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, q, F) of the training images ``chosen`` (n,) in q views each, and embeddings (n q, D) of all
        these views, D = 0 if the method has none. Collective."""
        data = trainer.datamodule
        per_draw = sum(view.role == "global" for view in data.views)
        draws = -(-VIEWS // per_draw)
        none = torch.zeros(0, dtype=torch.int64, device=pl_module.device)
        rows, ids, widths = list[Tensor](), [none], torch.tensor([0, 0], device=pl_module.device)
        for batch in data.fixed_views(chosen, draws, pl_module.device):
            for view in trainer.precision_plugin.convert_input(batch.global_views):
                with trainer.precision_plugin.forward_context():
                    layers = pl_module.features(view)
                features = layers[LAYER]
                embeddings = layers.get(EMBEDDING, features[:, :0])
                widths = widths.new_tensor([features.shape[1], embeddings.shape[1]])
                rows.append(torch.cat([features.float(), embeddings.float()], dim=1))
                ids.append(batch.sample_id)
        if world_size() > 1:
            dist.all_reduce(widths, dist.ReduceOp.MAX)
        width, embedding_width = widths.tolist()
        rows.append(torch.zeros(0, width + embedding_width, device=pl_module.device))
        x, _, sample_id = _of_all_ranks(torch.cat(rows), None, torch.cat(ids))
        # A sample that stands in for an unreadable one may be there more or less often than the others.
        _, count = sample_id.unique_consecutive(return_counts=True)
        whole = count == draws * per_draw
        x = x[whole.repeat_interleave(count)]
        return x[:, :width].view(int(whole.sum()), draws * per_draw, width), x[:, width:]

    def _write(self, step: int, epoch: int, spectrum: list[float]) -> None:
        """Add a row to the file, in place of those of this step and later ones, which an earlier start has left."""
        old = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        rows = [row for row in old if int(row.partition(",")[0]) < step]
        rows.append(",".join([str(step), str(epoch), *(f"{value:.6g}" for value in spectrum)]))
        widest = max(row.count(",") - 1 for row in rows)
        header = ",".join(["step", "epoch", *(f"component_{i + 1}" for i in range(widest))])
        write_text(self.path, "\n".join([header, *rows]) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The neighbours at the last evaluation."""
        return {} if self._before is None else self._before._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._before = Neighbours(**state) if state else None


def _of_all_ranks(x: Tensor, label: Tensor | None, sample_id: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Features, in float64, labels and ids of the samples of all ranks, in the order of ids, without those that are not
    finite. Collective."""
    rows = torch.tensor([len(x)], device=x.device)
    if world_size() > 1:
        counts = gather_detached(rows).tolist()
        x, sample_id = _gathered(x, counts), _gathered(sample_id, counts)
        label = None if label is None else _gathered(label, counts)
    if x.device.type == "mps":  # which has no float64
        x, sample_id, label = x.cpu(), sample_id.cpu(), None if label is None else label.cpu()
    order = sample_id.argsort(stable=True)
    order = order[x[order].isfinite().all(1)]
    return x[order].double(), None if label is None else label[order], sample_id[order]


def _gathered(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows (M, ...) of all ranks, which have ``counts`` of them."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = gather_detached(padded).view(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _known(**figures: float | None) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def _of_rank_zero(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    """Its values on all ranks, whose devices might round differently. Collective."""
    if world_size() == 1:
        return figures
    values = [figures.get(name, torch.nan) for name in FIGURES]
    shared = broadcast_from_zero(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return {name: value for name, value in zip(FIGURES, shared, strict=True) if name in figures}
