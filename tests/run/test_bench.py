"""sslzoo bench measures data, model and both, and says what follows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from sslzoo.cli.main import main
from sslzoo.recipe.registry import recipes
from sslzoo.run.bench import Report, Speed, _in_flight, _load
from sslzoo.run.build import Experiment

SMALL = (
    "backbone.name=tests.tiny:TinyEncoder", "views.0.size=12", "views.0.blur_kernel=5", "data.global_batch_size=8",
)  # fmt: skip


@pytest.mark.parametrize("part", ["", "data", "model", "step"])
def test_a_recipe(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [part] if part else []
    assert main(["bench", *words, "simclr_fashion_mnist", *SMALL, "--steps", "2"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("8 images in a step on one device, cpu")
    assert ("images in memory, views on the device" in first) == (part != "model")
    assert [line.split()[0] for line in lines] == ([part] if part else ["data", "model", "step"])
    assert all(float(line.split()[1].replace(",", "")) > 0 for line in lines)
    assert ("waiting for data" in lines[-1]) == (part in ("", "step"))


def test_advice() -> None:
    report = Report(
        speeds=(Speed(part="data", rate=200.0), Speed(part="model", rate=300.0)),
        images=4,
        device="cpu",
        workers=2,
        in_workers=True,
        processors=8,
    )
    enough = "A worker delivers 100.0 images/s, and the device takes 300.0: data.workers=4 is enough"
    assert report.lines()[-1] == enough
    few = replace(report, processors=3, in_workers=False).lines()
    assert "data.workers=3 is what 3 processors per device allow; 4 would be needed. Packed" in few[-2]
    assert few[-1] == "On a CPU, data.augment_on=worker is faster"
    assert enough not in replace(report, workers=None).lines()
    # Four workers on two processors are no more than two.
    crowded = replace(report, workers=4, processors=2).lines()
    assert "A worker delivers 100.0 images/s" in crowded[-1] and "4 would be needed" in crowded[-1]


def test_batches_in_flight_are_not_counted() -> None:
    assert _in_flight(0, 5) == (3, 5) and _in_flight(1, 5) == (3, 5)
    assert _in_flight(12, 20) == (24, 24) and _in_flight(4, 20) == (8, 20)


def test_the_end_of_the_workers_is_not_counted() -> None:
    def batches() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            time.sleep(1)

    data = SimpleNamespace(
        train_dataloader=batches, finish=lambda *_: None, plan=SimpleNamespace(micro_batch_size=1)
    )
    assert _load(cast(Experiment, SimpleNamespace(data=data)), torch.device("cpu"), 3, 10).rate > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simclr_fashion_mnist", "data"], "give one recipe, got 2"),
        (
            ["data", "{here}/a=b.yaml", "data.global_batch_size=6000"],
            "lower --steps or data.global_batch_size",
        ),
        (["data", "simclr_fashion_mnist", "--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["data", "simclr_in1k"],
            "this machine has no GPU that torch can use (sslzoo doctor says why); to use its CPU, add "
            "trainer.accelerator=cpu",
        ),
        (["data", "sce_cifar10", "trainer.accelerator=cpu"], "fp16 is not available on a CPU"),
        (
            ["data", "simclr_fashion_mnist", "data.global_batch_size=6000"],
            "lower --steps or data.global_batch_size",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a=b.yaml").write_text(recipes()["simclr_fashion_mnist"].read_text())
    assert main(["bench", *(word.format(here=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("sslzoo bench: ")
