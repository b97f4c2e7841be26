"""What a training step costs on a GPU may only fall: kernels, copies, collectives and waits of every method.

The numbers are those of small recipes on the pretended GPU, from the transfer of a batch to the end of its step, where
nothing is logged or saved. ``python -m tests.contract.test_budgets`` measures them anew and writes ``budgets.json``.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from sslzoo.recipe.sections import LoggingConfig, Recipe
from sslzoo.testing.contract import small_recipe
from sslzoo.testing.pretend import PretendedGPU, pretend
from sslzoo.testing.small import small_images
from tests.contract.test_methods import HEAD, METHODS, VARIANTS, recipe_of

BUDGETS = Path(__file__).parent / "budgets.json"
STEP = 2  # the first steps also initialise
PHASES = ("transfer", "callbacks before", "step", "callbacks after")
CASES = [(method, "", world) for method in METHODS for world in (1, 8)]
CASES += [(method, variant, 8) for method, variants in VARIANTS.items() for variant in variants]
COLOUR = (
    "flip_p: 0.5, jitter_p: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1, grayscale_p: 0.2"
)
VIEWS = (
    f"{{size: 8, scale: [0.3, 1.0], {COLOUR}, blur_p: 1.0}}",
    f"{{size: 8, scale: [0.3, 1.0], {COLOUR}, blur_p: 0.1, solarize_p: 0.2}}",
    f"{{size: 6, count: 2, role: local, scale: [0.1, 0.4], {COLOUR}, blur_p: 0.5}}",
)
FP16 = {"precision": "16-mixed"}
# What all methods have in common, each with one of them: the recipe, what is changed in it, and trainer settings.
COMMON: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    "colour, local crops": ("simclr", "simclr_cifar10", (f"views=[{', '.join(VIEWS)}]",), {}),
    "Lab views": ("metaug", "metaug_official_cifar10", ("method.meta.order=1",), {}),
    "16-mixed": ("simclr", "simclr_fashion_mnist", (), FP16),
    "16-mixed, two optimisers": ("metaug", "metaug_fashion_mnist", ("method.meta.order=1",), FP16),
}
CASES += [(COMMON[kind][0], kind, 8) for kind in COMMON]
# One in ten updates of the duals, of which these take 20, and 80 for each of two views; torch's loss scaler, which must
# know whether a gradient overflowed.
WAITS = {
    "mmcl, pgd; W=8": 2,
    "mmcl, pgd_adaptive; W=8": 16,
    "simclr, 16-mixed; W=8": 1,
    "metaug, 16-mixed, two optimisers; W=8": 1,
}


def name_of(method: str, variant: str, world: int) -> str:
    """The key of a case in the file of budgets."""
    return f"{', '.join(filter(None, (method, variant)))}; W={world}"


def _common(kind: str) -> Recipe:
    method, name, changes, trainer = COMMON[kind]
    overrides = [f"method.projector={HEAD}", *METHODS[method], *changes]
    recipe = small_recipe(method, recipe=name, overrides=overrides)
    return replace(recipe, trainer=recipe.trainer | trainer)


def cost(method: str, variant: str, world: int) -> dict[str, int]:
    """The cost of a step, by kind."""
    recipe = _common(variant) if variant in COMMON else recipe_of(method, variant)
    size = recipe.data.global_batch_size * max(1, world // 2)  # several images for each rank
    recipe = replace(
        recipe,
        data=replace(recipe.data, global_batch_size=size),
        logging=LoggingConfig(every_steps=100, checkpoint_every_steps=100),
    )
    gpu = PretendedGPU(world)
    with tempfile.TemporaryDirectory() as folder:
        pretend(gpu, recipe, small_images(recipe, STEP + 2), Path(folder), stop_at=STEP + 1)
    notes = [gpu.notes_of(phase, STEP) for phase in PHASES]
    return {
        "waits": sum(sum(n.places["sync"].values()) for n in notes),
        "copies": sum(sum(n.places["h2d"].values()) for n in notes),
        "kernels": sum(sum(n.kernels.values()) for n in notes),
        "collectives": sum(sum(n.collectives.values()) for n in notes),
        "bytes sent": sum(sum(n.collective_bytes.values()) for n in notes),
    }


def test_every_case_has_a_budget() -> None:
    assert json.loads(BUDGETS.read_text()).keys() == {name_of(*case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_a_step_costs_no_more_than_before(case: tuple[str, str, int]) -> None:
    found, budget = cost(*case), json.loads(BUDGETS.read_text())[name_of(*case)]
    more = {
        kind: f"{number} instead of {budget[kind]}" for kind, number in found.items() if number > budget[kind]
    }
    assert not more, f"a step costs more: {more}; find the cause with python -m sslzoo.testing.pretend"


def test_the_host_waits_for_nothing_but_criteria_and_the_loss_scaler() -> None:
    budgets = json.loads(BUDGETS.read_text())
    assert {name: budget["waits"] for name, budget in budgets.items() if budget["waits"]} == WAITS


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps({name_of(*case): cost(*case) for case in CASES}, indent=1) + "\n")
