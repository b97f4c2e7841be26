"""``fit --dry-run`` goes through each stage of a run once, finds a fault in any of them, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sslzoo.exits import ExitCode
from tests.command import Command, fork, until, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies."""
    folder = tmp_path_factory.mktemp("dry")
    write_recipe(folder)
    return folder


def _try(folder: Path, temporary: Path, *overrides: str, faults: dict[str, Any] | None = None) -> Command:
    def forget() -> None:
        tempfile.tempdir = None  # this interpreter's own

    return fork(
        folder,
        "fit",
        "--recipe",
        "tiny.yaml",
        "--dry-run",
        *overrides,
        faults=faults,
        environment={"TMPDIR": str(temporary)},
        before=forget,
    )


def _nothing_is_left(folder: Path, temporary: Path) -> bool:
    """But the locks of processes that list the same folder of images."""
    left = [path.name for path in temporary.iterdir() if path.name != f"sslzoo-{os.getuid()}"]
    return not left and not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "on 8 generated images, one validation batch, probe and k-NN, a checkpoint of"),
        (
            ("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"),
            "on 8 generated images, one validation batch, probe and k-NN, a checkpoint of",
        ),
        (("trainer.accumulate_grad_batches=2",), "on 16 generated images, one validation batch"),
        (
            ("eval.baselines=true", "eval.stop_on_collapse=true"),
            "probe and k-NN, the final table, a checkpoint of",
        ),
        (
            ("data.dataset=folder", "probe={}"),
            "on 8 generated images without labels, one validation batch, representation, a checkpoint of",
        ),
    ],
)
def test_it_says_what_was_done(folder: Path, overrides: tuple[str, ...], said: str, tmp_path: Path) -> None:
    command = _try(folder, tmp_path, *overrides)
    assert command.wait() == 0, command.said
    assert not command.err
    assert re.search(r"memory of a device +\d+\.\d MiB for tensors with (8|16) images", command.out)
    last = command.out.splitlines()[-1]
    assert last.startswith("one training step ") and said in last
    assert re.search(r"a checkpoint of \d+\.\d MiB written and read: passed$", last)
    assert _nothing_is_left(folder, tmp_path)


def test_fp16_is_tried_as_bf16_for_a_gpu_and_refused_for_a_cpu(folder: Path, tmp_path: Path) -> None:
    for_gpu = _try(folder, tmp_path, "trainer.precision=16-mixed", "trainer.accelerator=gpu")
    assert for_gpu.wait() == 0, for_gpu.said
    assert "8 generated images (in bf16-mixed, since fp16 needs a GPU)" in for_gpu.out
    assert not for_gpu.err
    for_cpu = _try(folder, tmp_path, "trainer.precision=16-mixed")
    assert for_cpu.wait() == ExitCode.USAGE, for_cpu.said
    assert for_cpu.err == (
        "sslzoo fit: trainer.precision=16-mixed: fp16 is not available on a CPU; set trainer.precision=bf16-mixed or "
        "trainer.precision=32-true\n"
    )


@dataclass(frozen=True)
class Case:
    """A fault of a method, how the dry run ends, and what it says."""

    faults: dict[str, Any]
    code: ExitCode
    said: str


CASES = {
    "step": Case(
        {"raise_at": [0, 0]}, ExitCode.FAILURE, "while training: RuntimeError: this rank cannot train"
    ),
    "loss": Case({"nan_at": 0}, ExitCode.NAN, "while training: train/loss is nan by step 1"),
    "validation": Case(
        {"raise_in_evaluation": 0},
        ExitCode.FAILURE,
        "while evaluating: RuntimeError: this rank cannot evaluate",
    ),
    "probe": Case(
        {"publishes": "features"}, ExitCode.USAGE, r"while training: layer 'backbone' .* publishes features"
    ),
    "checkpoint": Case(
        {"saves_code": True}, ExitCode.USAGE, r"while reading its checkpoint: .*fractions\.Fraction"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_finds_a_fault_in_each_stage(name: str, folder: Path, tmp_path: Path) -> None:
    case = CASES[name]
    command = _try(folder, tmp_path, faults=case.faults)
    assert command.wait() == case.code, command.said
    assert re.match(f"sslzoo fit: the dry run failed {case.said}", command.last), command.said
    assert "passed" not in command.out
    # A word suffices where the fault has a name; a bug shows where it is.
    assert ("Traceback" in command.err) == (case.code == ExitCode.FAILURE)
    assert _nothing_is_left(folder, tmp_path)


def test_a_signal_ends_it_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = _try(folder, tmp_path, faults={"evaluation_pause": 5.0})
    assert until(lambda: command.ended or list(tmp_path.rglob("metrics.csv"))), command.said
    command.signal(signal.SIGTERM)
    assert command.wait() == ExitCode.PREEMPTED, command.said
    assert command.last.startswith("sslzoo fit: SIGTERM")
    assert _nothing_is_left(folder, tmp_path)
