"""Verification of an export: a process that cannot import sslzoo loads it and must compute the same features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sslzoo.export.encoder import Encoder
from sslzoo.export.formats import Format
from sslzoo.recipe.registry import is_plugin

SEED, IMAGES = 0, 4

_SCRIPT = """\
import json, sys
from importlib.metadata import version

sys.modules["sslzoo"] = None  # from here on `import sslzoo` fails
sys.path += {paths!r}
import numpy

images = numpy.random.default_rng({seed}).standard_normal({shape!r}, dtype=numpy.float32)

{code}

{call}
numpy.save({out!r}, features)
print(json.dumps({{name: version(name) for name in {packages!r}}}))
"""


class VerificationError(RuntimeError):
    """The file does not reproduce the encoder's features and was not published."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of a verification."""

    difference: float  # the largest of any feature, as a fraction of the largest feature
    tolerance: float
    versions: dict[str, str]  # of the packages that loaded the file

    @property
    def sentence(self) -> str:
        """The result as a sentence."""
        loaded = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"verified without sslzoo by {loaded}: features of {IMAGES} random images (seed {SEED}) differ by at most "
            f"{self.difference:.1e} of the largest feature (allowed: {self.tolerance:.0e})"
        )


def verify(form: Format, folder: Path) -> Verified:
    """Load ``form``'s file in ``folder`` with its own code in a process without sslzoo, and compare features.

    Raises:
        VerificationError: the file cannot be loaded there, or the features differ by more than ``form.tolerance``.
    """
    encoder = form.encoder
    transform = encoder.about.preprocessing
    shape = (IMAGES, transform.channels, transform.size, transform.size)
    images = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
    with torch.inference_mode():
        expected = encoder.module(torch.from_numpy(images)).numpy()
    with tempfile.TemporaryDirectory(prefix="sslzoo-verify-") as scratch:
        out = Path(scratch) / "features.npy"
        script = Path(scratch) / "script.py"
        script.write_text(
            _SCRIPT.format(
                paths=_paths_of(encoder),
                seed=SEED,
                shape=shape,
                code=form.code(),
                call=form.call,
                out=str(out),
                packages=form.packages,
            ),
            encoding="utf-8",
        )
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(script)],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise VerificationError(f"{form.file} cannot be loaded without sslzoo: {said}")
        found: NDArray[np.float32] = np.load(out)
    difference = _difference(expected, found)
    if not difference <= form.tolerance:
        raise VerificationError(
            f"{form.file} gives different features: they differ by {difference:.1e} of the largest feature, more than "
            f"{form.tolerance:.0e}"
        )
    return Verified(
        difference=difference,
        tolerance=form.tolerance,
        versions=json.loads(done.stdout.splitlines()[-1]),
    )


def _difference(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Largest absolute difference over the largest absolute feature; infinite if the shapes differ or features are
    not finite."""
    if expected.shape != found.shape or not np.isfinite(expected).all() or not np.isfinite(found).all():
        return float("inf")
    largest = float(np.abs(expected).max())
    difference = float(np.abs(expected.astype(np.float64) - found).max())
    return difference / largest if largest > 0 else difference


def _paths_of(encoder: Encoder) -> list[str]:
    """Import paths that the other process needs for a custom encoder."""
    name = encoder.about.backbone.name
    if not is_plugin(name):
        return []
    module = name.partition(":")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return []
    path = Path(file).absolute()
    return [str(path.parents[module.count(".") + (path.name == "__init__.py")])]
