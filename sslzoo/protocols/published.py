"""The published figure of a recipe, and whether a result of ours can be compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sslzoo.protocols.protocol import Protocol
from sslzoo.recipe.header import read_header
from sslzoo.recipe.load import leaves, load_recipe
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import Recipe

# What decides on the encoder, apart from chance and the number of devices.
SECTIONS = ("backbone", "method", "data", "views", "optim")
FREE = ("data.root", "data.workers", "data.augment_on", "data.timeout", "data.max_bad_fraction")
ALSO = ("trainer.max_epochs", "trainer.accumulate_grad_batches", "trainer.sync_batchnorm")


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figure in the header of the bundled recipe with the same name."""

    figure: str  # linear top-1 in per cent, with as many digits as the source gives
    protocol: str  # of the figure; empty: not known, or not offered
    source: str
    differs: tuple[str, ...]  # keys in which the recipe differs from the bundled one

    def incomparable(self, protocol: Protocol, adapted: Sequence[str] = ()) -> str:
        """Why a result of ``protocol`` cannot be compared with the figure; empty if it can. ``adapted`` are the changes
        of the protocol for its result."""
        if self.protocol != protocol.name:
            known = (
                f"protocol {self.protocol}"
                if self.protocol
                else "a protocol that is not known or not offered"
            )
            return f"by {known}"
        if self.differs:
            return f"the recipe differs in {', '.join(self.differs)}"
        return "the protocol is adapted" if adapted else ""


def published(recipe: Recipe) -> Published | None:
    """The published figure for the training data of ``recipe``; None if there is none, or the recipe is not bundled."""
    path = recipes().get(recipe.name)
    if path is None:
        return None
    header = read_header(path)
    if not header.published:
        return None
    ours, bundled = (dict(leaves(r)) for r in (recipe, load_recipe(recipe.name).recipe))
    keys = dict.fromkeys([*ours, *bundled])
    differs = [
        key
        for key in keys
        if (key.split(".")[0] in SECTIONS and key not in FREE) or key in ALSO
        if ours.get(key) != bundled.get(key)
    ]
    return Published(
        figure=header.published[0], protocol=header.protocol, source=header.source, differs=tuple(differs)
    )
