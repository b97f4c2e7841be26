"""One image that is not finite, in one rank's part of one batch: what the run carries afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.callbacks.linear_probe import LinearProbe
from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.data.sources import FakeSource
from sslzoo.distributed import gather_detached
from sslzoo.exits import Diverged
from sslzoo.method import SSLMethod
from sslzoo.nn.numerics import normalize
from sslzoo.nn.per_sample import PerSampleTable, tables_of
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import MethodConfig, OptimConfig
from sslzoo.run.build import build_run
from sslzoo.run.directory import Run
from sslzoo.run.placement import place
from sslzoo.testing.ranks import run_ranks
from tests.chaos import TinyBackbone

STEPS, BAD = 5, 2  # optimiser steps, and the one that meets the image
BATCH = 8

SMALL = (
    "backbone.name=tests.chaos:TinyBackbone",
    "views.0.size=8",
    "optim.warmup_epochs=0.4",
    "eval.size=8",
    "eval.knn_k=3",
    "eval.every_epochs=1",
    "logging.every_steps=2",
    "logging.checkpoint_every_steps=2",
    "trainer.max_epochs=1",
)
BANK = "method.keys={{name: bank, negatives: 8, updates: {}}}"
MOCO = "method.base={name: mocov2, temperature: 0.2, queue_size: 40, momentum_start: 0.9}"
INDIVIDUAL = "{name: individual, rho: 0.3, eta: 0.1, beta: 0.9, tau_min: 0.05, tau_max: 0.7}"
LEARNABLE = "{name: global_learnable, rho: 6.0, tau_min: 0.1, lr_factor: 2.0}"
BIMODAL = f"{{name: gcl_bimodal, gamma: 0.9, temperature_rule: {LEARNABLE}}}"
# A method's recipe for 12,000 images and what to change in it.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "simclr": ("simclr", ()),
    "sce": ("sce", ("method.queue_size=40",)),
    "mmcl": ("mmcl", ()),
    "sogclr": ("sogclr", ()),
    "sogclr, individual": ("sogclr", (f"method.loss.temperature_rule={INDIVIDUAL}",)),
    "sogclr, learnable": ("sogclr", (f"method.loss={BIMODAL}",)),
    "metaug": ("metaug", ()),
    "metaug, bank": ("metaug", (BANK.format("once"),)),
    "metaug, official bank": ("metaug", (BANK.format("official"),)),
    "margin, moco": ("margin", (MOCO,)),
    "a stranger's": ("simclr", (f"method={{name: '{__name__}:Stranger'}}",)),
}


class Stranger(SSLMethod[MethodConfig]):
    """Somebody else's method: a memory of every image, and a centre that its loss moves."""

    Config = MethodConfig
    centre: Tensor

    def __init__(self, cfg: MethodConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = nn.Linear(feature_dim, 8)
        self.register_buffer("centre", torch.zeros(8))

    def prepare(self, plan: TrainingPlan, optim: OptimConfig, seed: int) -> None:
        super().prepare(plan, optim, seed)
        self.memory = PerSampleTable(
            key=torch.zeros(plan.dataset_size, 8), seen=torch.zeros(plan.dataset_size).long()
        )

    def loss(self, batch: Batch) -> Tensor:
        first, second = (self.backbone(view) for view in batch.global_views)
        self.publish(backbone=first)
        z = normalize(self.projector(first))
        target = self.memory.read("key", batch.sample_id) + self.projector(second).detach() - self.centre
        ids = gather_detached(batch.sample_id)
        self.memory.write(ids, key=gather_detached(z), seen=self.memory.read("seen", ids) + 1)
        self.centre.lerp_(gather_detached(z).mean(0), 0.1)
        return F.mse_loss(z, target)


# -- a run ------------------------------------------------------------------------------------------


@dataclass
class Seen(Callback):
    """Spoils the first image of a micro-batch, and keeps what the run carries at the start of each step."""

    bad: int  # micro-batch
    rank: int
    method: SSLMethod[Any]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    diverged: bool = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.datamodule.position % pl_module.plan.accumulate == 0:
            self.states.append(_carried(trainer, pl_module))
        if trainer.datamodule.position == self.bad and trainer.global_rank == self.rank:
            batch.global_views[0][0, 0, 0, 0] = torch.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.datamodule.position % pl_module.plan.accumulate == 0:
            self.skipped.append(pl_module.step_skipped)


def _carried(trainer: Any, method: SSLMethod[Any]) -> dict[str, Tensor]:
    """Copies of all tensors of a run that steps move, by name."""
    found = dict(method.state_dict())
    for i, optimizer in enumerate(trainer.optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{p}.{name}": value for name, value in state.items()}
    for probe in (c for c in trainer.callbacks if isinstance(c, LinearProbe)):
        for layer, state in probe.state_dict().items():
            found |= {f"probe.{layer}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items() if isinstance(value, Tensor)}


def train(
    case: str,
    folder: Path,
    *,
    precision: str = "16-mixed",
    world: int = 1,
    accumulate: int = 1,
    bad: int = BAD,
    bad_rank: int = 0,
) -> Seen:
    """A short run, as one process of ``world``."""
    name, changes = CASES[case]
    batch = BATCH * accumulate
    small = (
        f"data.global_batch_size={batch}",
        f"trainer.devices={world}",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    recipe = load_recipe(f"{name}_fashion_mnist", [*SMALL, *small, *changes]).recipe
    fp16 = precision == "16-mixed"
    options = {"limit_val_batches": 0, "precision": "32-true" if fp16 else precision}
    built = build_run(
        replace(recipe, trainer=recipe.trainer | options),
        Run(folder, "test"),
        source=FakeSource(STEPS * batch, 1, 8, 4),
        placement=place(),
    )
    trainer: Any = built.trainer
    seen = Seen(bad, bad_rank, built.method)
    trainer.callbacks.append(seen)
    if fp16:  # Lightning refuses it on a CPU; at this scale only what is not finite overflows
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    try:
        trainer.fit(seen.method, datamodule=built.data)
    except Diverged:
        seen.diverged = True
    seen.states.append(_carried(trainer, seen.method))
    return seen


def _is_sound(name: str, value: Tensor) -> bool:
    if name.endswith("log_u"):  # -inf: never visited
        value = value.nan_to_num(torch.nan, torch.nan, 0.0)
    return bool(value.isfinite().all())


def _check_half(seen: Seen) -> None:
    """The step is skipped and leaves nothing; the run goes on."""
    assert seen.skipped == [step == BAD for step in range(STEPS)]
    before, after = seen.states[BAD], seen.states[BAD + 1]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    last = seen.states[-1]
    assert [name for name, value in last.items() if not _is_sound(name, value)] == []
    assert any(not torch.equal(last[name], after[name]) for name in last if name.startswith("backbone."))


@pytest.mark.parametrize("case", CASES)
def test_fp16_skips_the_step_and_nothing_remembers_it(case: str, tmp_path: Path) -> None:
    """With two micro-batches a step, where the method bears them: the first is sound, the second is not."""
    accumulate = 1 if "metaug" in case else 2
    seen = train(case, tmp_path, accumulate=accumulate, bad=(BAD + 1) * accumulate - 1)
    _check_half(seen)
    text = (tmp_path / "metrics.csv").read_text()
    assert "nan" not in text and "inf" not in text


def test_a_scale_that_no_longer_helps_ends_the_run() -> None:
    method = Stranger(MethodConfig(name="stranger"), TinyBackbone(1), TinyBackbone.num_features)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-13)
    method._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))  # type: ignore[assignment]

    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    assert method.attempt(lambda: step(1.0))
    assert not method.attempt(lambda: step(torch.nan))
    with pytest.raises(Diverged, match="overflows at any loss scale, even 3"):
        method.attempt(lambda: step(torch.inf))


def _rank(rank: int, world: int, case: str, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    _check_half(train(case, folder, world=world, bad_rank=1))


@pytest.mark.parametrize(
    "case", ["sce", "sogclr, individual", "metaug, bank", "margin, moco", "a stranger's"]
)
def test_fp16_skips_the_step_of_all_ranks(case: str, tmp_path: Path) -> None:
    """The image is in the second rank's share; the others carry nothing but running statistics."""
    run_ranks(2, _rank, case, tmp_path)


WITHOUT_SCALER = [("32-true", case) for case in CASES]
WITHOUT_SCALER += [("bf16-mixed", case) for case in ("sce", "sogclr, individual", "metaug, bank")]


@pytest.mark.parametrize(("precision", "case"), WITHOUT_SCALER)
def test_without_a_scaler_the_run_ends_and_no_table_queue_or_checkpoint_is_spoilt(
    precision: str, case: str, tmp_path: Path
) -> None:
    """Nothing undoes the weights there: the run ends at the row that would report the loss."""
    seen = train(case, tmp_path, precision=precision)
    assert seen.diverged
    before, after = seen.states[BAD], seen.states[-1]
    tables = tuple(f"{name}." for name in tables_of(seen.method))
    assert bool(tables) == any(word in case for word in ("sogclr", "bank", "stranger"))
    for name, value in after.items():
        if name.startswith(tables):
            assert torch.equal(value, before[name]), name
        if "queue." in name or name.startswith(("generators.", "optimizer.1.")):
            assert value.isfinite().all(), name
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == f"step={BAD:09d}.ckpt"
    assert all(_is_sound(name, value) for name, value in load_checkpoint(newest)["state_dict"].items())
