"""The online probe: isolated, equal to separately trained ones, the same on any number of ranks, exact on resume."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.callbacks.evaluation import FeatureEvaluation
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.online_probe import OnlineProbe
from sslzoo.callbacks.representation import Representation
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.data.module import SSLDataModule
from sslzoo.data.sources import FakeSource
from sslzoo.evaluate.metrics import within_top
from sslzoo.evaluate.sgd_probe import EPS, STATISTICS_RATE, SGDProbe
from sslzoo.evaluate.task import Features, Task, roles
from sslzoo.method import SSLMethod
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, MethodConfig, ProbeConfig, SGDConfig, ViewConfig
from sslzoo.testing.ranks import run_ranks

CPU = torch.device("cpu")
CLASSES, WIDTH = 4, 6


def _cfg(lrs: tuple[float, ...] = (0.05, 0.5, 2.0), **changes: Any) -> ProbeConfig:
    return ProbeConfig(lrs=lrs, holdout=0.25, **changes)


def _problem(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features around a mean per class, and labels."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(CLASSES, (n,), generator=generator)
    means = torch.randn(CLASSES, WIDTH, generator=generator, dtype=dtype)
    return 3 + means[y] + torch.randn(n, WIDTH, generator=generator, dtype=dtype), y


# -- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
def test_all_rates_at_once_equal_separate_probes_trained_by_autograd(running: bool) -> None:
    x, y = _problem(12 * 32, torch.float64)
    cfg = _cfg(momentum=0.8, weight_decay=0.01)
    held_out = torch.rand(len(x)) < 0.25
    probe = SGDProbe(CLASSES, WIDTH, cfg, device=CPU, dtype=torch.float64, running=running)
    layers = [nn.Linear(WIDTH, CLASSES).double() for _ in cfg.lrs]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    sgd = [
        torch.optim.SGD([{"params": [m.weight], "weight_decay": 0.01}, {"params": [m.bias]}], lr, 0.8)
        for m, lr in zip(layers, cfg.lrs, strict=True)
    ]
    mean = variance = torch.zeros(WIDTH, dtype=torch.float64)
    for step, rows in enumerate(torch.arange(len(x)).split(32)):
        factor = 0.5 * (1 + cos(pi * step / 12))
        probe.accumulate(x[rows], y[rows], held_out[rows])
        probe.start(factor)
        batch_mean, batch_variance = x[rows].mean(0), x[rows].var(0, unbiased=False)
        if step == 0 and running:
            mean, variance = batch_mean, batch_variance
            continue
        used = rows[~held_out[rows]]
        z = (x[used] - mean) / (variance + EPS).sqrt() if running else x[used]
        for layer, optimizer, lr in zip(layers, sgd, cfg.lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(z), y[used]).backward()
            optimizer.step()
        if running:
            mean = mean + STATISTICS_RATE * (batch_mean - mean)
            variance = variance + STATISTICS_RATE * (batch_variance - variance)
    state = probe.state_dict()
    expected = torch.stack([torch.cat([m.bias[:, None], m.weight], 1) for m in layers]).detach()
    torch.testing.assert_close(state["weight"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state["mean"], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state["variance"], variance, rtol=1e-10, atol=1e-10)


def _trained(
    x: Tensor, y: Tensor, held_out: Tensor, parts: int, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Six steps over ``x``, each in ``parts`` micro-batches; of which rank ``share[0]`` of ``share[1]``
    sees its contiguous part."""
    probe = SGDProbe(CLASSES, WIDTH, _cfg(), device=CPU, dtype=x.dtype)
    for step, rows in enumerate(torch.arange(len(x)).chunk(6)):
        for micro in rows.chunk(parts):
            own = micro.chunk(share[1])[share[0]]
            probe.accumulate(x[own], y[own], held_out[own])
        probe.start(1 - step / 10)
    return probe.state_dict()


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    x, y = _problem(6 * 24, torch.float64)
    held_out = torch.rand(len(x)) < 0.25
    whole, parts = _trained(x, y, held_out, 1), _trained(x, y, held_out, 3)
    for name in ("weight", "velocity", "mean", "variance"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-12)


def test_held_out_and_unknown_labels_change_nothing() -> None:
    x, y = _problem(6 * 24)
    held_out = torch.rand(len(x)) < 0.25
    clean = _trained(x, y, held_out, 1)
    poisoned = _trained(x, torch.where(held_out, (y + 1) % CLASSES, y), held_out, 1)
    unknown = _trained(x, torch.where(held_out, -1, y), torch.zeros_like(held_out), 1)
    trained_on = _trained(x, torch.where(held_out, (y + 1) % CLASSES, y), torch.zeros_like(held_out), 1)
    assert torch.equal(clean["weight"], poisoned["weight"])
    assert torch.equal(clean["weight"], unknown["weight"])
    assert not torch.equal(clean["weight"], trained_on["weight"])


def test_a_diverging_rate_harms_no_other_and_is_never_right() -> None:
    x, y = _problem(6 * 24)
    probe = SGDProbe(CLASSES, WIDTH, _cfg((0.1, 1e38)), device=CPU)
    for rows in torch.arange(len(x)).chunk(6):
        probe.accumulate(x[rows], y[rows], torch.zeros(len(rows), dtype=torch.bool))
        probe.start(1.0)
    probe.finish()
    assert probe.weight[0].isfinite().all() and not probe.weight[1].isfinite().all()
    right = within_top(probe.logits(x), y, 1).sum(1)
    assert right[0] > len(x) / CLASSES and right[1] == 0


# -- several processes ------------------------------------------------------------------------

TRAIN, TEST = 101, 67  # prime: shares are unequal


def _measured(rank: int, world: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Train on four steps of 24 samples and judge this rank's shares, through the callback's hooks."""
    x, y = _problem(4 * 24 + TRAIN + TEST)
    method = Tiny(MethodConfig(name="tiny"), nn.Identity(), WIDTH)
    method.plan = TrainingPlan(dataset_size=96, global_batch_size=24, max_epochs=1)
    trainer: Any = SimpleNamespace()
    probe = OnlineProbe(_cfg(layers=("backbone", "double")), classes=CLASSES, seed=5)
    probe.on_train_start(trainer, method)
    for step in range(4):
        own = torch.arange(step * 24, (step + 1) * 24).chunk(world)[rank]
        method.publish(backbone=x[own], double=2 * x[own])
        method.optimizer_steps += 1
        probe.on_train_batch_end(trainer, method, None, Batch((), (), own, y[own]), step)
    probe.on_validation_start(trainer, method)
    shares = [
        torch.arange(start + rank * size // world, start + (rank + 1) * size // world)
        for start, size in ((96, TRAIN), (96 + TRAIN, TEST))
    ]
    train, test = (Features(x[own], y[own], own) for own in shares)
    cfg = _cfg()
    evaluation = EvalConfig(every_epochs=1, size=8, knn_k=5, knn_temperature=0.1)
    task = Task(train, test, roles(train.sample_id, len(x), cfg, evaluation, 5), CLASSES)
    found = {f"{layer} {k}": v for layer in probe.layers for k, v in probe.judge(task, layer).items()}
    return found, {k: v.tolist() for k, v in probe.state_dict()["backbone"].items() if k != "updates"}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_unequal_shards_equal_one_process(world: int) -> None:
    alone, state = _measured(0, 1)
    assert set(alone) == {
        f"{layer} online_{metric}" for metric in ("top1", "top5", "lr") for layer in ("backbone", "double")
    }
    assert alone["backbone online_top1"] > 0.6
    ranks = run_ranks(world, _measured)
    for results, other in ranks:
        assert results == alone
        assert other == ranks[0][1]  # to the bit: rank 0's state is everybody's
        for name, values in state.items():
            torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)


# -- in a real run ----------------------------------------------------------------------------


class Tiny(SSLMethod[MethodConfig]):
    """Invariance and a spread of one view: enough to move a backbone."""

    Config = MethodConfig

    def loss(self, batch: Batch) -> Tensor:
        h, other = (self.backbone(v) for v in batch.global_views)
        self.publish(backbone=h)
        return (h - other).square().mean() - 0.1 * h.std(0).mean()


SIZE, BATCH, EPOCHS = 64, 16, 3


def _run(
    folder: Path, *, probe: bool = True, epochs: int = EPOCHS, resume: Path | None = None
) -> tuple[Tiny, OnlineProbe, FeatureEvaluation]:
    torch.manual_seed(0)
    cfg = _cfg()
    plan = TrainingPlan(dataset_size=SIZE, global_batch_size=BATCH, max_epochs=EPOCHS)
    view = ViewConfig(size=8, scale=(0.5, 1.0), count=2, flip_p=0.5)
    data = DataConfig(dataset="fashion_mnist", global_batch_size=BATCH, mean=(0.5,), std=(0.25,))
    evaluation = EvalConfig(every_epochs=1, size=8, knn_k=5, knn_temperature=0.1, batch_size=20)
    datamodule = SSLDataModule(data, (view,), evaluation, cfg, plan, 0, FakeSource(SIZE, 1, 8, 4))
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    method = Tiny(MethodConfig(name="tiny"), backbone, 8)
    optim = SGDConfig(lr=0.1, lr_scaling="none", weight_decay=0.0, warmup_epochs=0)
    method.prepare(plan, optim, 0)
    online = OnlineProbe(cfg, classes=4, seed=0)
    judge = FeatureEvaluation([online], Representation(folder, seed=0), cfg, evaluation, seed=0)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[StepSeeding(), *([online, judge] if probe else []), Meter(folder, every_steps=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    # The plan's epochs, not the run's, set the schedules: a shorter run is a run cut off.
    trainer.fit(method, datamodule=datamodule, ckpt_path=resume, weights_only=True if resume else None)
    trainer.save_checkpoint(folder / "end.ckpt")
    return method, online, judge


# Lightning's own, about torch's pytree.
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")


def test_no_gradient_reaches_the_backbone(tmp_path: Path) -> None:
    with_probe, online, _ = _run(tmp_path / "with")
    without, _, _ = _run(tmp_path / "without", probe=False)
    assert online.probes["backbone"].weight.abs().sum() > 0  # it did learn
    assert "val/online_top1" in (tmp_path / "with" / "metrics.csv").read_text()
    for name, value in with_probe.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name


def test_state_survives_a_restart(tmp_path: Path) -> None:
    _, whole, judged = _run(tmp_path / "whole")
    _run(tmp_path / "cut", epochs=2)
    stored = torch.load(tmp_path / "cut" / "end.ckpt", weights_only=True)
    assert any("OnlineProbe" in name for name in stored["callbacks"])
    _, resumed, judged_again = _run(tmp_path / "resumed", resume=tmp_path / "cut" / "end.ckpt")
    for name, value in whole.state_dict()["backbone"].items():
        assert torch.equal(torch.as_tensor(resumed.state_dict()["backbone"][name]), torch.as_tensor(value)), (
            name
        )
    assert judged_again.latest == judged.latest is not None


def test_a_checkpoint_with_other_rates_is_refused() -> None:
    stored = SGDProbe(CLASSES, WIDTH, _cfg(), device=CPU).state_dict()
    with pytest.raises(ValueError, match=r"probe\.lrs"):
        SGDProbe(CLASSES, WIDTH, _cfg((0.1,)), device=CPU).load_state_dict(stored)
