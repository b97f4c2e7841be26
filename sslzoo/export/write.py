"""Writing an export: the file is verified in a temporary folder and only then published."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sslzoo.checkpoints import sync_folder
from sslzoo.export.about import About
from sslzoo.export.card import card
from sslzoo.export.encoder import EXPORTED, Encoder, read_encoder
from sslzoo.export.formats import Format, Safetensors, format_of
from sslzoo.export.verify import Verified, verify
from sslzoo.nn.backbones import build_backbone
from sslzoo.recipe.sections import Recipe

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    path: Path  # a file, or a folder
    card: Path
    verified: Verified


def export(
    path: Path,
    name: str,
    *,
    out: Path | None = None,
    recipe: str | None = None,
    with_projector: bool = False,
) -> Exported:
    """Write the encoder in ``path`` in the format ``name``, verify it and publish it, with its card, in the folder
    ``out``: by default ``exported/`` in the run directory, or next to the file.

    Raises:
        ValueError: for whatever is wrong with path, recipe or weights, and for a format that the encoder does not
            have.
        VerificationError: the file does not give the encoder's features; what was there before stays.
    """
    encoder = read_encoder(path, recipe=recipe, with_projector=with_projector)
    form = format_of(name, encoder)
    folder = out or default_folder(path)
    with _staged(folder) as stage:
        form.write(stage / form.file)
        verified = verify(form, stage)
        written = _publish(form, verified, stage, folder)
    return Exported(path=folder / form.file, card=written, verified=verified)


def write_at_end(
    method: SSLMethod[Any],
    recipe: Recipe,
    run: Path,
    *,
    manifest: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path:
    """Write what a finished run leaves in its directory: ``exported/backbone.safetensors`` and its card, not verified
    yet. Returns the file. Raises ``OSError`` if it cannot be written."""
    with torch.random.fork_rng(devices=[]):
        backbone, features = build_backbone(recipe.backbone, start=False)
    backbone.load_state_dict(method.backbone.state_dict())  # to float32 on the CPU
    about = About.of(
        recipe, features=features, step=method.optimizer_steps, manifest=manifest, results=results
    )
    form = Safetensors(Encoder(about=about, backbone=backbone))
    file = run / EXPORTED
    with _staged(file.parent) as stage:
        form.write(stage / form.file)
        _publish(form, None, stage, file.parent)
    return file


def default_folder(path: Path) -> Path:
    """Where the exports of ``path`` go: ``exported/`` in a run directory, otherwise next to the file."""
    path = path.absolute()
    run = path if path.is_dir() else path.parent
    run = run.parent if run.name in ("checkpoints", EXPORTED.parent.name) else run
    return run / EXPORTED.parent


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder in ``folder``, which is made, to write into; it is removed however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(form: Format, verified: Verified | None, stage: Path, folder: Path) -> Path:
    """Move what lies in ``stage`` into ``folder``, on disk first, and return the card."""
    made = stage / form.file
    text = (made / "README.md") if made.is_dir() else stage / f"{form.file}.md"
    text.write_text(card(form, verified), encoding="utf-8")
    for file in [path for path in stage.rglob("*") if path.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    target = folder / form.file
    if made.is_dir():
        if target.exists():
            target.rename(stage / "before")  # a folder is not replaced in one step
        made.rename(target)
    else:
        text.replace(folder / text.name)
        made.replace(target)
    sync_folder(folder)
    return target / "README.md" if target.is_dir() else folder / text.name
