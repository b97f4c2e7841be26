"""Self-supervised pre-training on images, with reproducible results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from sslzoo.export.about import Preprocessing

__version__ = "0.1.0"


def load_backbone(path: str | Path, *, recipe: str | None = None) -> tuple[nn.Module, Preprocessing]:
    """Load the trained encoder from ``path`` (a run directory, a checkpoint or an exported ``backbone.safetensors``).
    Returns it with the transform from a PIL image, or uint8 images (..., C, H, W), to its input.

    The encoder is on the CPU, in evaluation mode and in float32; it maps (N, C, S, S) to features (N, F)::

        encoder, transform = sslzoo.load_backbone("runs/mine/1")
        features = encoder(transform(image)[None])

    Code in the file is never executed. A custom encoder (``module:Class``) is built from the recipe of the run
    directory around the file, or from ``recipe``, a file or bundled name.

    Raises ``ValueError`` with a one-line message if the file cannot be used.
    """
    from pathlib import Path

    from sslzoo.export.encoder import read_encoder

    encoder = read_encoder(Path(path), recipe=recipe)
    return encoder.module, encoder.about.preprocessing
