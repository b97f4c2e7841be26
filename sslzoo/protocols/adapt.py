"""A protocol adapted to a recipe and its data: images of another size, without colours, or fewer than a batch."""

from __future__ import annotations

from dataclasses import replace

from sslzoo.data.sources import ImageSource
from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, Recipe, ViewConfig

COLOURS = {"saturation": 0.0, "hue": 0.0, "grayscale_p": 0.0}  # nothing to change in grey images


def adapted(
    protocol: ViewProtocol, recipe: Recipe, source: ImageSource, n: int
) -> tuple[ViewProtocol, tuple[str, ...]]:
    """``protocol`` for ``n`` training images of ``source``, and a sentence about each change.

    The encoder sees images of ``eval.size``: crops, resizing, padding and blur keep their proportion to it.
    """
    changes: list[str] = []
    size = recipe.eval.size
    if size != protocol.view.size:
        changes.append(f"images of {size} px instead of {protocol.view.size}, all lengths in proportion")
        protocol = replace(
            protocol,
            view=_view(protocol.view, size),
            plain=_plain(protocol.plain, size / protocol.plain.size),
        )
    if protocol.plain.resize is None and protocol.plain.proportion is None:
        protocol = replace(protocol, plain=recipe.eval.view)
    if source.channels == 1 and any(getattr(protocol.view, name) for name in COLOURS):
        protocol = replace(protocol, view=replace(protocol.view, **COLOURS))
        changes.append("no saturation, hue and greyscale: the images are grey")
    if n < protocol.batch_size:
        scaled = ", with rates in proportion" if protocol.lr_scaling == "linear" else ""
        changes.append(
            f"batches of {n:,} images instead of {protocol.batch_size:,}: there are no more{scaled}"
        )
        protocol = replace(protocol, batch_size=n)
    if recipe.probe.train_size is not None:
        changes.append(f"probe.train_size={recipe.probe.train_size}")
    return protocol, tuple(changes)


def _view(view: ViewConfig, size: int) -> ViewConfig:
    ratio = size / view.size
    padding = None if view.padding is None else round(view.padding * ratio)
    kernel = view.blur_kernel
    if view.blur_p > 0:
        kernel = max(3, round(kernel * ratio) // 2 * 2 + 1)
    return replace(view, size=size, padding=padding, blur_kernel=kernel)


def _plain(plain: PlainView, ratio: float) -> PlainView:
    resize = None if plain.resize is None else round(plain.resize * ratio)
    return replace(plain, size=round(plain.size * ratio), resize=resize)
