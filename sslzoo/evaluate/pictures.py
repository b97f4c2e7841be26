"""Neighbours and map of :mod:`sslzoo.evaluate.gallery` as pictures. Importable without torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sslzoo.pictures import Drawing, Tile, coloured, sheet

ALIKE, UNLIKE, UNKNOWN = "#009E73", "#D55E00", "white"  # frames: same class, another one, no labels


def draw_neighbours(gallery: Mapping[str, Any]) -> Drawing:
    """One row per query: the query, and the most similar training images."""
    names: Sequence[str] = gallery["class_names"]
    rows = [
        [_tile(row["query"], names), *(_tile(near, names, row["query"]["label"]) for near in row["nearest"])]
        for row in gallery["neighbours"]
    ]
    caption = (
        f"Nearest neighbours after epoch {gallery['epoch']}. Left: the same images at every evaluation; right: the "
        "training images with the largest cosine, which is the number."
    )
    if names:
        caption += " Green frames: of the same class; orange: of another."
    return Drawing(sheet(rows), caption)


def draw_map(gallery: Mapping[str, Any]) -> Drawing:
    """The images by their first two principal components."""
    from matplotlib.figure import Figure

    points, names = gallery["map"], gallery["class_names"]
    classes = coloured(points["label"])
    figure = Figure((6, 5.2), dpi=100)
    axes = figure.add_axes((0.02, 0.12, 0.96, 0.86))
    groups: list[tuple[int | None, str, str]] = [(None, "others", "0.75" if classes else "C0")]
    groups += [(label, str(names[label])[:16], f"C{i}") for i, label in enumerate(classes)]
    for group, title, colour in groups:
        rows = [
            i for i, label in enumerate(points["label"]) if (label if label in classes else None) == group
        ]
        if rows:
            x, y = ([points[axis][i] for i in rows] for axis in "xy")
            axes.scatter(x, y, 10, color=colour, linewidths=0, label=title)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_color("0.8")
    if classes:
        figure.legend(loc="lower center", ncols=5, fontsize=8, frameon=False, markerscale=2)
    shares = " and ".join(f"{100 * share:.0f} %" for share in points["explained"])
    caption = (
        f"Map of the features after epoch {gallery['epoch']}: {len(points['x']):,} images by their first two "
        f"principal components, with {shares} of the variance."
    )
    return Drawing(figure, caption)


def _tile(image: Mapping[str, Any], names: Sequence[str], query: int | None = None) -> Tile:
    """``query`` is the class of the image that this one is compared with."""
    from PIL import Image

    label = image["label"]
    text = f"image {image['sample_id']}" if label is None else str(names[label])
    if "cosine" in image:
        text = f"{image['cosine']:.2f} {text}"
    frame = UNKNOWN if query is None or label is None else ALIKE if label == query else UNLIKE
    data = io.BytesIO(base64.b64decode(image["image"]))
    return Tile(Image.open(data) if image["image"] else None, text, frame)
