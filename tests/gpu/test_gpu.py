"""The command on a real GPU: the numbers of the CPU, exact resume, one rank of NCCL, and how a run ends.

    pytest -m gpu

Without a GPU all of it is skipped. The processes share the GPU, four at a time.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sslzoo.data.sources import fake_source
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.registry import methods
from sslzoo.run.build import build_experiment
from sslzoo.testing.ranks import free_port
from tests.command import Command, shell, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# Of the first loss, relative; and of the mean of the last five, in units of how far the loss fell or rose at all:
# the runs drift apart as rounding differs.
TOLERANCE = {"32-true": (1e-3, 0.1), "bf16-mixed": (0.02, 0.1), "16-mixed": (0.005, 0.1)}
SHORT = ("trainer.max_epochs=1", "eval.baselines=false", "logging.every_steps=1", "eval.bank_size=2000")
ON_GPU = ("trainer.accelerator=gpu", "trainer.devices=1")
ON_CPU = ("trainer.accelerator=cpu", "trainer.devices=1")
REPORT = os.environ.get("GPU_REPORT")  # a file for the figures behind the assertions


def report(**figures: Any) -> None:
    """Add ``figures`` to the report, where one is kept."""
    if REPORT:
        with Path(REPORT).open("a") as file:
            file.write(json.dumps(figures) + "\n")


def fit(
    folder: Path, recipe: str, *overrides: str, limit: float = 400, threads: int = 4, **options: Any
) -> Command:
    """``sslzoo fit`` on the GPU, to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = shell(
        folder,
        "fit",
        "--recipe",
        recipe,
        "--out",
        folder / "run",
        *overrides,
        environment=environment,
        **options,
    )
    command.wait(limit)
    return command


def column(run: Path, key: str) -> list[float]:
    """The values of ``key`` in a run's metrics."""
    with (run / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Command]]:
    """One epoch of each method on the CPU, and on the GPU in each precision."""
    root = tmp_path_factory.mktemp("runs")
    pool = ThreadPoolExecutor(4)
    started = {}
    for name, where in itertools.product(methods(), ("cpu", *PRECISIONS)):
        place = ON_CPU if where == "cpu" else (*ON_GPU, f"trainer.precision={where}")
        folder = root / f"{name}-{where}"
        started[name, where] = pool.submit(fit, folder, f"{name}_fashion_mnist", *SHORT, *place)
    return started


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", methods())
def test_numbers_are_those_of_the_cpu(name, precision, runs):
    cpu, gpu = runs[name, "cpu"].result(), runs[name, precision].result()
    assert cpu.wait() == 0, cpu.said
    assert gpu.wait() == 0, gpu.said
    expected, found = (column(c.folder / "run", "train/loss") for c in (cpu, gpu))
    first = abs(found[0] - expected[0]) / abs(expected[0])
    last = abs(mean(found[-5:]) - mean(expected[-5:])) / (max(expected) - min(expected))
    accuracy = [column(c.folder / "run", "val/knn_top1")[-1] for c in (cpu, gpu)]
    report(method=name, precision=precision, first_loss=first, last_losses=last, knn_top1=accuracy)
    assert len(found) == len(expected)
    assert first < TOLERANCE[precision][0]
    assert last < TOLERANCE[precision][1]
    assert abs(accuracy[0] - accuracy[1]) < 0.04  # of 2,000 test images


@pytest.mark.parametrize(
    ("name", "precision"), [("sce", "32-true"), ("sogclr", "bf16-mixed"), ("metaug", "16-mixed")]
)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(name, precision, tmp_path):
    overrides = (
        *SHORT, *ON_GPU, f"trainer.precision={precision}", "trainer.deterministic=true",
        "logging.checkpoint_every_steps=5",
    )  # fmt: skip
    whole = fit(tmp_path / "whole", f"{name}_fashion_mnist", *overrides)
    assert whole.wait() == 0, whole.said
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = shell(
        folder, "fit", "--recipe", f"{name}_fashion_mnist", "--out", folder / "run", *overrides,
        environment={"OMP_NUM_THREADS": "4", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )  # fmt: skip
    checkpoint = folder / "run" / "checkpoints" / "step=00000010.ckpt"
    assert until(lambda: list(checkpoint.parent.glob("step=*10.ckpt")) or killed.ended, 200), killed.said
    killed.signal(signal.SIGKILL)
    killed.wait()
    resumed = fit(folder, f"{name}_fashion_mnist", "--resume", "auto", *overrides, name="resumed")
    assert resumed.wait() == 0, resumed.said
    a, b = ((f / "run" / "metrics.csv").read_bytes() for f in (tmp_path / "whole", folder))
    report(resume=name, precision=precision, equal=a == b)
    assert a == b


def test_a_terminated_run_saves_and_says_so(tmp_path):
    command = shell(
        tmp_path, "fit", "--recipe", "sce_fashion_mnist", "--out", tmp_path / "run", *ON_GPU, "logging.every_steps=1",
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.csv"
    assert until(
        lambda: (metrics.exists() and len(metrics.read_text().splitlines()) > 5) or command.ended, 200
    )
    begun = time.monotonic()
    command.signal(signal.SIGTERM)
    assert command.wait() == 75, command.said
    report(sigterm_seconds=time.monotonic() - begun, last=command.last)
    assert list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_memory_that_does_not_suffice_is_one_line(tmp_path):
    command = fit(
        tmp_path, "simclr_fashion_mnist", *ON_GPU, "trainer.max_epochs=1", "backbone.name=resnet50",
        "data.global_batch_size=12000", "views.0.size=224",
    )  # fmt: skip
    report(out_of_memory=command.wait(), last=command.last)
    assert command.wait() == 1, command.said
    assert "memory" in command.last
    assert "Traceback" not in command.err


def _loss_and_gradients(name: str) -> tuple[float, torch.Tensor]:
    recipe = load_recipe(f"{name}_fashion_mnist", ["data.global_batch_size=64"]).recipe
    experiment = build_experiment(recipe, source=fake_source(64, 1, 28, 10))
    method, batch = experiment.method.cuda(), experiment.data.example_batch(64)
    batch = batch._replace(
        global_views=tuple(view.cuda() for view in batch.global_views),
        local_views=tuple(view.cuda() for view in batch.local_views),
        sample_id=batch.sample_id.cuda(),
    )
    loss = method.loss(batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", methods())
def test_one_rank_of_nccl_computes_what_none_does(name):
    alone = _loss_and_gradients(name)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        grouped = _loss_and_gradients(name)
    finally:
        dist.destroy_process_group()
    difference = float((alone[1] - grouped[1]).abs().max() / alone[1].abs().max())
    report(nccl=name, loss=abs(alone[0] - grouped[0]), gradients=difference)
    assert abs(alone[0] - grouped[0]) < 1e-5
    assert difference < 1e-4
