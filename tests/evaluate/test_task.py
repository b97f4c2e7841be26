"""Features on the host, in a memory map, while computations run on a device."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sslzoo.evaluate import knn, logistic, sgd_probe
from sslzoo.evaluate import task as task_module
from sslzoo.evaluate.knn import knn_accuracies
from sslzoo.evaluate.logistic import QUICK, linear_probe
from sslzoo.evaluate.metrics import standardizer
from sslzoo.evaluate.sgd_probe import sgd_evaluation
from sslzoo.evaluate.task import Features, Roles, Task
from sslzoo.recipe.sections import ProbeConfig
from sslzoo.testing.pretend import CUDA, PretendedGPU

CLASSES, WIDTH, CHUNK = 4, 6, 64


def _features(n: int, seed: int, device: torch.device, folder: Path) -> Features:
    """Overlapping classes, one sample not finite; the features in a file."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = 2 * torch.eye(CLASSES, WIDTH)[y] + torch.randn(n, WIDTH, generator=draw)
    x[5, 2] = torch.nan
    file = folder / f"{seed}.npy"
    np.save(file, x.numpy())
    mapped = torch.from_numpy(np.load(file, mmap_mode="c"))
    return Features(mapped, y.to(device), torch.arange(n).to(device))


def _figures(device: torch.device, folder: Path) -> list[object]:
    train, test = (_features(n, seed, device, folder) for n, seed in ((500, 0), (200, 1)))
    held_out, bank = (train.sample_id % k == 0 for k in (5, 2))
    task = Task(train, test, Roles(~held_out, held_out, bank), CLASSES)
    scale = standardizer(train, train.finite().nonzero().squeeze(1)).scale
    return [
        linear_probe(task, effort=QUICK),
        sgd_evaluation(task, ProbeConfig(lrs=(0.01, 0.1)), seed=0, brief=True),
        knn_accuracies(task, (1, 5), (0.1, 1.0)),
        scale.cpu().tolist(),
    ]


def test_mapped_features_go_to_the_device_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (task_module, logistic):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(logistic, "KEPT", 0)
    monkeypatch.setattr(sgd_probe, "BATCH", CHUNK)
    for name in ("QUERIES", "BANK"):
        monkeypatch.setattr(knn, name, CHUNK)
    expected = _figures(torch.device("cpu"), tmp_path)
    with PretendedGPU() as gpu:
        assert _figures(CUDA, tmp_path) == expected
        assert gpu.broken() == []
        copied = [
            int(size) for place in gpu.notes.places["h2d"] for size in re.findall(r"(\d+) bytes", place)
        ]
    assert 0 < max(copied) <= CHUNK * WIDTH * 4
