"""The history of a run as TensorBoard's event files."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sslzoo.callbacks.histograms import Histogram, Histograms
from sslzoo.callbacks.meter import Follower
from sslzoo.dashboards.history import current_pictures, read_pictures, read_rows
from sslzoo.panels import Section
from sslzoo.pictures import FOLDER

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

log = logging.getLogger(__name__)

TRAINING, EVALUATION = ".training", ".evaluation"  # endings of the event files


class TensorBoard(Follower):
    """Writes every value at once. Event files cannot be truncated, so that each start of the run writes the history
    anew and deletes the files of the starts before it."""

    def __init__(self, run_dir: Path, sections: tuple[Section, ...]) -> None:
        self.run_dir, self.sections = run_dir, sections
        self._writer: SummaryWriter | None = None
        self._histograms = Histograms(run_dir)
        self._pictures: set[Path] = set()  # that are written, or cannot be read

    def begin(self, rows: int) -> None:
        """Write the rows that the run has kept."""
        self._writer = writer = _replace(self.run_dir, TRAINING)
        writer.add_custom_scalars(layout(self.sections))
        for row in read_rows(self.run_dir, rows):
            self._add(row.step, row.values)
        self._add_media()
        for key, path in current_pictures(self.run_dir).items():
            _add_picture(writer, key, path, step=0)
        writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write ``values``."""
        self._add(step, {key: value for key, value in values.items() if not key.endswith("_epoch")})

    def saved(self, rows: int) -> None:
        """Write the histograms and pictures that were made since the last checkpoint."""
        self._add_media()

    def end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._add_media()
            self._writer.close()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def _add_media(self) -> None:
        assert self._writer is not None
        for histogram in self._histograms.read():
            _add_histogram(self._writer, histogram)
        for step, name, path in read_pictures(self.run_dir):
            if path not in self._pictures:
                _add_picture(self._writer, f"{FOLDER}/{name}", path, step=step)
                self._pictures.add(path)


def write_evaluations(run_dir: Path, figures: Mapping[str, float], step: int) -> None:
    """Write the ``figures`` of all evaluations so far, in place of those that were written before."""
    writer = _replace(run_dir, EVALUATION)
    for key, value in figures.items():
        writer.add_scalar(key, value, step)
    writer.close()


def layout(sections: tuple[Section, ...]) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's tab of custom scalars: one category per section, one chart per panel."""
    return {
        section.title: {
            panel.title: ["Multiline", [curve.pattern for curve in panel.curves]] for panel in section.panels
        }
        for section in sections
    }


def _replace(run_dir: Path, ending: str) -> SummaryWriter:
    """A writer to a new event file, after deleting the older ones with this ending."""
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = run_dir / "tensorboard"
    for path in folder.glob("events.out.tfevents.*"):
        if path.name.endswith(ending) or not path.name.endswith((TRAINING, EVALUATION)):
            path.unlink()
    return SummaryWriter(str(folder), filename_suffix=ending)


def _add_picture(writer: SummaryWriter, key: str, path: Path, *, step: int) -> None:
    """Write the file ``path`` as it is. One that cannot be read as a picture is left out, with a warning."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height, channels = *image.size, len(image.getbands())
    except Exception as error:
        log.warning("TensorBoard does not show %s, which cannot be read: %s", path, type(error).__name__)
        return
    picture = Summary.Image(width=width, height=height, colorspace=channels, encoded_image_string=data)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=key, image=picture)]), step)


def _add_histogram(writer: SummaryWriter, histogram: Histogram) -> None:
    """Write ``histogram``, with the centres of its bins in place of the values."""
    pairs = list(zip(histogram.edges, histogram.edges[1:], strict=False))
    centres = [(low + high) / 2 for low, high in pairs]
    weighted = list(zip(histogram.counts, centres, strict=True))
    writer.add_histogram_raw(
        histogram.name,
        min=histogram.edges[0],
        max=histogram.edges[-1],
        num=sum(histogram.counts),
        sum=sum(count * centre for count, centre in weighted),
        sum_squares=sum(count * centre**2 for count, centre in weighted),
        bucket_limits=list(histogram.edges[1:]),
        bucket_counts=list(histogram.counts),
        global_step=histogram.step,
    )
