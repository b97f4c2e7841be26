"""Pictures of evaluations, for dashboards."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from sslzoo.callbacks.share import Share
from sslzoo.callbacks.watch import Watch
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import UnreadableImageError
from sslzoo.evaluate.pictures import draw_map, draw_neighbours
from sslzoo.method import SSLMethod
from sslzoo.pictures import Drawing, Tile, name_of, path_of, save, sheet

log = logging.getLogger(__name__)

EXAMPLES = 6  # training images whose views are shown


class Pictures(Callback):
    """Draws, after evaluations and on rank 0, views of the training images, the neighbours and the map in ``gallery``,
    and the plots of ``analyses``, to the ``pictures`` of the run directory.

    The first and the last evaluation are always drawn, others while all pictures together take at most one per cent of
    the time. A picture that fails does not end the run: the next evaluation tries again. Each kind of error is logged
    once.
    """

    def __init__(
        self,
        run: Path,
        gallery: Path,
        analyses: Sequence[Watch],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.gallery, self.analyses = run, gallery, tuple(analyses)
        self._share = Share(clock)
        self._failures: set[tuple[str, type[Exception]]] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the time."""
        self._share.start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the evaluation has found, before a checkpoint includes it."""
        assert isinstance(pl_module, SSLMethod)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.is_global_zero and (last or self._share.allows()):
            with self._share.spent():
                self._draw_all(trainer, pl_module)

    def _draw_all(self, trainer: Trainer, pl_module: SSLMethod[Any]) -> None:
        step, epoch = pl_module.optimizer_steps, trainer.current_epoch
        data: SSLDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if epoch or not (self.run / "views.png").exists():  # which shows those of the first epoch
            self._draw(step, "views", lambda: {"views": draw_views(data, epoch)})
        self._draw(step, "neighbours and map", lambda: self._of_gallery(step))
        for watch in self.analyses:
            self._draw(step, f"plots of {watch.analysis.cfg.name}", lambda watch=watch: _plots(watch))

    def _of_gallery(self, step: int) -> dict[str, Drawing]:
        """Empty if the evaluation has found nothing to show."""
        gallery = json.loads(self.gallery.read_text(encoding="utf-8")) if self.gallery.exists() else {}
        if gallery.get("step") != step:
            return {}
        return {"neighbours": draw_neighbours(gallery), "embedding_map": draw_map(gallery)}

    def _draw(self, step: int, what: str, draw: Callable[[], dict[str, Drawing]]) -> None:
        try:
            for name, drawing in draw().items():
                save(drawing, path_of(self.run, name, step))
        except Exception as error:
            if (what, type(error)) not in self._failures:
                log.warning("%s could not be drawn: %s: %s", what, type(error).__name__, error)
            self._failures.add((what, type(error)))


def _plots(watch: Watch) -> dict[str, Drawing]:
    analysis = watch.analysis
    return {name_of(analysis.cfg.name, name): d for name, d in analysis.draw(watch.history).items()}


def draw_views(data: SSLDataModule, epoch: int) -> Drawing:
    """A few training images of different classes, one per column, above their views of ``epoch``, from 0."""
    batch = data.batch_of(data.varied_samples(EXAMPLES), epoch)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.data.mean, data.data.std))
    rows = [[_original(data, sample) for sample in batch.sample_id.tolist()]]
    for role, views in (("global", batch.global_views), ("local", batch.local_views)):
        for i, view in enumerate(views):
            text = f"{role}{f' {i + 1}' if len(views) > 1 else ''}, {view.shape[-1]} px"
            pixels = (255 * (view.float().cpu() * std + mean)).round().clamp(0, 255).byte()
            rows.append([Tile(_image(image), text) for image in pixels])
    caption = (
        f"Views of epoch {epoch + 1}. At the top a few training images, the same at every evaluation; below them what "
        "the recipe's augmentation makes of them."
    )
    return Drawing(sheet(rows), caption)


def _original(data: SSLDataModule, sample: int) -> Tile:
    source = data.train_source
    text = f"image {sample}" if source.labels is None else str(source.class_names[source.labels[sample]])
    try:
        return Tile(_image(source.read(sample)), text)
    except UnreadableImageError:
        return Tile(None, text)


def _image(pixels: Tensor) -> Image.Image:
    """An image (C, H, W) uint8, of which other than one or three channels are shown as far as they go."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, :3] if array.shape[2] >= 3 else array[:, :, 0])
