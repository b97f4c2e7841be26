"""The memory of a step is counted to the byte, extrapolated to the recipe's batch, and fits the header's hardware."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import recipes
from sslzoo.recipe.sections import Recipe
from sslzoo.run.dry_run import build_rehearsal, few_images, train
from sslzoo.run.memory import DeviceMemory, PeakMemory, device_memory, shared_memory

SPARE = 0.2  # of a device's memory, for CUDA itself, workspaces of convolutions, and fragments
GPU = re.compile(r"# hardware: .*?GPUs? of (\d+) GB")
ON_A_CPU = re.compile(r"# hardware: .*CPU cores")


def test_tensors_are_counted_until_they_are_freed_and_views_once() -> None:
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del a
        assert (memory.held, memory.peak) == (4000, 8000)
        b.mul_(2)
        c = b.double()
        assert (memory.held, memory.peak) == (12_000, 12_000)
        del b, c
    assert (memory.held, memory.peak) == (0, 12_000)


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    with PeakMemory() as memory:
        x = torch.ones(100, 10)
        for _ in range(5):
            x = (x @ weight).relu()
        loss = x.sum()
        del x
        assert memory.held == 4 * (
            6 * 1000 + 1
        )  # the input and five activations, of which relu keeps its result
        loss.backward()
        del loss
        assert memory.held == 4 * 100  # the gradient


def _needed(recipe: Recipe, folder: Path, images: tuple[int, int]) -> DeviceMemory:
    runs = [build_rehearsal(recipe, folder / str(n), images=n) for n in images]
    return device_memory(runs[0], runs[1], train)


def test_two_sizes_tell_the_memory_of_a_third(tmp_path: Path) -> None:
    recipe = load_recipe("sce_fashion_mnist", ["data.global_batch_size=96"]).recipe
    predicted = _needed(recipe, tmp_path, few_images(recipe))
    assert predicted.images == 96
    measured = _needed(recipe, tmp_path, (96, 48))  # nothing is extrapolated
    assert predicted.total == pytest.approx(measured.total, rel=0.15)  # small batches also hold gradients


def test_shared_memory_is_that_of_the_batches_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("sce_in1k").recipe
    assert shared_memory(recipe, 512, 8) == 8 * 12 * 2 * 512 * 2 * 3 * 224 * 224
    assert shared_memory(load_recipe("sce_cifar10", ["data.workers=4"]).recipe, 512, 8) == 0
    anywhere = load_recipe("sce_in1k", ["trainer.accelerator=auto"]).recipe
    for gpu, item in ((True, 1), (False, 4)):  # without one, the workers make views in float32
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert shared_memory(anywhere, 512, 8) == item * 8 * 12 * 2 * 512 * 2 * 3 * 224 * 224


def test_headers_say_how_much_memory_a_gpu_has() -> None:
    for name, path in recipes().items():
        text = path.read_text(encoding="utf-8")
        assert GPU.search(text) or ON_A_CPU.search(text), (
            f"{name}: write '# hardware: 8 GPUs of 80 GB' or the like"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, path in recipes().items() if GPU.search(path.read_text(encoding="utf-8"))]
)
def test_a_recipe_fits_the_hardware_of_its_header(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    needed = _needed(recipe, tmp_path, few_images(recipe)).total / 2**30
    header = GPU.search(recipes()[name].read_text(encoding="utf-8"))
    assert header is not None
    assert needed <= (1 - SPARE) * int(header[1]), f"{needed:.1f} GiB of {header[1]}"
