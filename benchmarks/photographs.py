"""JPEG files like those of ImageNet: 500 x 375 pixels, about 99 KB.

They are cut at random from the photograph that ships with matplotlib, enlarged by at most 1.1, and get the grain and
the JPEG quality that lead to this size. Decoding takes 1.1 to 1.2 ms, as for other photographs of this size.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
_QUALITY, _GRAIN = 94, 7.5


def write_photographs(folder: Path, count: int) -> None:
    """Write ``count`` files to ``folder``."""
    rng = np.random.default_rng(0)
    with Image.open(Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg") as file:
        photograph = file.convert("RGB")
    for i in range(count):
        width = int(rng.uniform(WIDTH / 1.1, photograph.width))
        height = width * HEIGHT // WIDTH
        left, top = rng.integers(0, (photograph.width - width + 1, photograph.height - height + 1)).tolist()
        cut = photograph.resize((WIDTH, HEIGHT), box=(left, top, left + width, top + height))
        grain = rng.normal(0, _GRAIN, (HEIGHT, WIDTH, 1))
        pixels = np.clip(np.asarray(cut) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=_QUALITY)
