"""Mistakes that people make in a method of their own, each told by ``check-method``.

The method is a correct one, and each mistake a change of its source. It lies in a temporary folder, as a stranger's
does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from sslzoo.cli.main import main
from sslzoo.testing.contract import check, small_recipe
from sslzoo.testing.promises import PROMISES
from tests.command import fork

GOOD = '''
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sslzoo.distributed import gather, gather_detached, rank, world_size
from sslzoo.method import SSLMethod
from sslzoo.nn.momentum import MomentumEncoder
from sslzoo.nn.numerics import autocast_off, normalize
from sslzoo.nn.per_sample import PerSampleTable
from sslzoo.nn.queue import FeatureQueue
from sslzoo.randomness import key, uniforms
from sslzoo.recipe.sections import MethodConfig


@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    temperature: float


class Mine(SSLMethod[MineConfig]):
    """Two views find each other among the batch and a queue; each image also stays near what it was."""

    Config = MineConfig

    def __init__(self, cfg, backbone, feature_dim):
        super().__init__(cfg, backbone, feature_dim)
        self.head = nn.Linear(feature_dim, 8)
        self.target = MomentumEncoder(self.backbone, self.head)
        self.queue = FeatureQueue(40, 8)
        self.register_buffer("centre", torch.zeros(8))
        self.pending = []

    def prepare(self, plan, optim, seed):
        super().prepare(plan, optim, seed)
        self.memory = PerSampleTable(seen=torch.zeros(plan.dataset_size, 8))

    def loss(self, batch):
        first, second = batch.global_views
        h = self.backbone(first)
        self.publish(backbone=h)
        noise = uniforms(key("mine: noise", self.seed, self.step), batch.sample_id, 8).to(h.dtype)
        z = [normalize(self.head(x) + 0.1 * noise) for x in (h, self.backbone(second))]
        keys = gather_detached(normalize(self.target(second)))
        self.pending.append(keys)
        candidates = gather(z[1])
        with autocast_off(h):
            logits = z[0] @ torch.cat([candidates, self.queue.features.clone().to(h.dtype)]).T
            rows = rank() * len(h) + torch.arange(len(h), device=h.device)
            loss = F.cross_entropy(logits.float() / self.cfg.temperature, rows)
        near = F.mse_loss(z[0].float(), self.memory.read("seen", batch.sample_id).float())
        loss = loss + near + F.mse_loss(z[0].float(), self.centre.expand(len(h), 8).float())
        self.memory.write(gather_detached(batch.sample_id), seen=gather_detached(z[0]))
        self.record("method/near", near)
        return loss

    def after_step(self, step):
        keys = torch.cat(self.pending)
        self.pending = []
        self.target.update(self.backbone, self.head, coefficient=0.9)
        self.queue.push(keys)
        self.centre.lerp_(keys.mean(0).to(self.centre.dtype), 0.1)

    def after_skipped_step(self, step):
        self.pending = []
'''


class Mistake(NamedTuple):
    """What stands in the source instead of what, by which promise it is found, and what is said of it."""

    right: str
    wrong: str
    promise: str
    said: str


MISTAKES = {
    "a gather without gradient": Mistake(  # but for the own rows, as in much published code
        "candidates = gather(z[1])",
        "candidates = list(gather_detached(z[1]).chunk(world_size()))\n"
        "        candidates[rank()] = z[1]\n"
        "        candidates = torch.cat(candidates)",
        "world-size",
        r"2 processes: the loss is the same, but the gradient of \S+ is .* % off that of one process; .*gather",
    ),
    "a factor of the world size": Mistake(
        "return loss",
        "return loss * world_size()",
        "world-size",
        r"2 processes: the loss of step 1 is .* \(2 times\) instead of .*never multiply by the world size",
    ),
    "negatives of this rank alone": Mistake(
        "candidates = gather(z[1])\n",
        "candidates = z[1].repeat(world_size(), 1)\n",
        "world-size",
        "2 processes: the loss of step 1 is .* compare them with those of all ranks",
    ),
    "a measurement of one process's images": Mistake(
        'self.record("method/near", near)',
        'self.record("method/near", z[0].std(0).mean())',
        "world-size",
        "the loss is the same, but method/near changes with the number of processes; record means .*moments",
    ),
    "a buffer that depends on the rank": Mistake(
        "keys = gather_detached(normalize(self.target(second)))",
        "keys = normalize(self.target(second)).repeat(world_size(), 1)",
        "world-size",
        r"after step 1 rank \d has different values of .*queue\.features.*gather_detached",
    ),
    "torch's global generator": Mistake(
        'noise = uniforms(key("mine: noise", self.seed, self.step), batch.sample_id, 8).to(h.dtype)',
        "noise = torch.rand_like(h[:, :8])",
        "world-size",
        "the loss of step 1 .* draw random numbers by sample",
    ),
    "numpy's global generator": Mistake(
        'noise = uniforms(key("mine: noise", self.seed, self.step), batch.sample_id, 8).to(h.dtype)',
        "noise = torch.from_numpy(np.random.rand(8)).to(h)",
        "seed",
        r"two trainings give different values of .*; draw random numbers as a function.*uniforms",
    ),
    "state that no checkpoint has": Mistake(
        'self.register_buffer("centre", torch.zeros(8))',
        "self.centre = torch.zeros(8)",
        "resuming",
        "the resumed run ends with different values of .*; keep state that loss needs in buffers",
    ),
    "a constant on the CPU": Mistake(
        "torch.arange(len(h), device=h.device)",
        "torch.arange(len(h))",
        "gpu",
        r"an operation on the GPU gets a CPU tensor at \S+:\d+ loss \[.*; create tensors on the device",
    ),
    "a host that waits": Mistake(
        "return loss",
        "return loss if loss > 0.01 else loss * 0.5",
        "gpu",
        r"the host waits at \S+:\d+ loss \[.*; keep values on the device",
    ),
    "state written before a step that is skipped": Mistake(
        "keys = gather_detached(",
        "self.target.update(self.backbone, self.head, coefficient=0.9)\n        keys = gather_detached(",
        "not-finite",
        r"in fp16 the skipped step changes target\.\S+.*; change it in after_step",
    ),
    "state that moves with each micro-batch": Mistake(
        "self.pending.append(keys)",
        "self.pending.append(keys)\n        self.centre.lerp_(keys.mean(0), 0.1)",
        "accumulation",
        "centre changes in the middle of a step; change it in after_step",
    ),
    "labels in the loss": Mistake(
        "return loss",
        "return loss if batch.label is None else loss + 0.1 * batch.label.float().mean()",
        "labels",
        "the loss is .*, with other labels .*, without labels .*; use only batch.global_views",
    ),
    "labels that must be there": Mistake(
        "return loss",
        "return loss + 0 * batch.label.float().mean()",
        "labels",
        "loss raises AttributeError without labels",
    ),
    "a parameter without gradient": Mistake(
        "self.pending = []\n\n    def prepare",
        "self.pending = []\n        self.unused = nn.Linear(8, 8)\n\n    def prepare",
        "gradients",
        "no gradient reaches unused.weight, unused.bias; use it in the loss, or call requires_grad_",
    ),
    "a logarithm in half precision": Mistake(
        "return loss\n",
        "return loss + (1.0001 - F.linear(z[0], z[0]).diagonal()).log().mean()\n",
        "bf16",
        "the loss is -inf, but .* in float32; compute similarities, softmax and logarithms in float32",
    ),
    "a loss for each sample": Mistake(
        "rows)\n",
        "rows, reduction='none')\n",
        "publishing",
        r"loss returns the tensor \(8,\); return the mean",
    ),
    "features that nobody sees": Mistake(
        "self.publish(backbone=h)", "pass", "publishing", "loss publishes nothing; call self.publish"
    ),
    "features that are not stated": Mistake(
        "self.publish(backbone=h)",
        "self.publish(backbone=h, head=self.head(h))",
        "publishing",
        "the published layers are backbone, head, but the config declares backbone; list in the config",
    ),
    "features that depend on the neighbours": Mistake(
        "    def after_step",
        "    def features(self, x):\n        h = self.backbone(x)\n        return {'backbone': h - h.mean(0)}\n\n"
        "    def after_step",
        "evaluation",
        "backbone of two images differ when they are part of a batch of 8",
    ),
}


def write(folder: Path, source: str, module: str) -> str:
    """The method in a module in ``folder``; its name for the command line."""
    (folder / f"{module}.py").write_text(source)
    return f"{module}:Mine"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mistake = MISTAKES[name]
    assert GOOD.count(mistake.right) == 1
    module = f"mistake_{list(MISTAKES).index(name)}"
    method = write(tmp_path, GOOD.replace(mistake.right, mistake.wrong), module)
    result = check(PROMISES[mistake.promise], small_recipe(method, overrides=["method.temperature=0.2"]))
    assert re.search(mistake.said, f"{result.found}; {result.advice}"), (result.found, result.advice)


def test_a_correct_method_of_a_stranger_keeps_every_promise(tmp_path: Path) -> None:
    """By the command, in a folder that has nothing but the module."""
    command = fork(tmp_path, "check-method", write(tmp_path, GOOD, "mine"), "method.temperature=0.2")
    assert command.wait() == 0, command.said
    assert f"mine:Mine keeps {len(PROMISES)} of {len(PROMISES)} promises" in command.out
    for name in PROMISES:
        assert re.search(rf"^{name} +ok +\d+\.\d s  \w", command.out, re.MULTILINE), name
    assert command.err == ""


def test_what_cannot_be_tried_is_said(tmp_path: Path) -> None:
    base = "{name: mocov2, temperature: 0.2, queue_size: 8, momentum_start: 0.9, momentum_batchnorm: shuffle}"
    command = fork(tmp_path, "check-method", "margin", f"method.base={base}", "--only", "world-size")
    assert command.wait() == 0, command.said
    assert command.out.startswith("world-size    -  ") and "refuses synchronised batch norm" in command.out
    assert command.out.endswith("margin keeps 0 of 1 promises, 1 not tried\n")


def test_a_broken_promise_is_the_exit_code(tmp_path: Path) -> None:
    source = GOOD.replace("return loss", "return loss + batch.label.float().mean()")
    arguments = ["--only", "publishing,labels", "method.temperature=0.2"]
    command = fork(tmp_path, "check-method", write(tmp_path, source, "mine"), *arguments)
    assert command.wait() == 1, command.said
    publishing, labels = command.out.index("publishing    ok"), command.out.index("labels        FAILED")
    assert publishing < labels
    assert "-> use only batch.global_views" in " ".join(command.out.split())
    assert "mine:Mine keeps 1 of 2 promises" in command.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "unknown method 'nothing' (known: "),
        (["mine:Yours"], "'mine:Yours' cannot be loaded"),
        (["mine:MineConfig"], "not a subclass of sslzoo.method.SSLMethod"),
        (
            ["mine:Mine"],
            "mine:Mine has no recipe, and its config has no default for temperature (float); add method.",
        ),
        (
            ["mine:Mine", "method.temprature=1"],
            "method.temprature: unknown key; did you mean method.temperature?",
        ),
        (
            ["mine:Mine", "method.temperature=hot"],
            "override: method.temperature: expected a number, got 'hot'",
        ),
        (
            ["mine:Mine", "method.temperature=1", "--recipe", "quickstart"],
            "quickstart trains sce, not mine:Mine",
        ),
        (["simclr", "--only", "label"], "unknown promise 'label'; did you mean labels? (known: publishing, "),
        (["simclr", "views.0.count=1"], "views: must have at least two global views, got 1"),
    ],
)
def test_bad_input_is_said_in_a_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD, "mine")
    assert main(["check-method", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
