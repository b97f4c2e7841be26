"""A run on several GPUs never hands a CPU tensor to a collective or to an operation on the device."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sslzoo.callbacks.meter import Meter
from sslzoo.checkpoints import load_checkpoint
from sslzoo.data.module import SSLDataModule
from sslzoo.distributed import gather_detached
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.sections import ViewConfig
from sslzoo.testing.pretend import CUDA, STEPS, UNFINISHED, Job, Moment, PretendedGPU, main, train
from tests.images import data_module, write_photos

SMALL = {
    "sce_fashion_mnist": ("method.queue_size=64",),
    "sce_in1k_multicrop": (
        "backbone.name=conv5",
        "speed.channels_last=false",
        "method.queue_size=64",
        "method.projector.widths=[32,32,16]",
        "method.predictor.widths=[32,16]",
        "analyses=[{name: margins, margins: [[10.0, 0.0]]}]",
    ),
}


def _job(recipe: str, world: int) -> Job:
    return Job(recipe=recipe, world=world, overrides=SMALL.get(recipe, ()))


# -- real runs ----------------------------------------------------------------------------------


def _sums(folder: Path, step: int) -> list[list[float]]:
    """The sums of every rank that the checkpoint of ``step`` holds."""
    return load_checkpoint(folder / "checkpoints" / f"step={step:09d}.ckpt")["callbacks"]["Meter"]["sums"]


@pytest.mark.parametrize(
    ("recipe", "world"),
    [
        ("sce_fashion_mnist", 8),
        ("sce_in1k_multicrop", 2),
    ],
)
def test_a_gpu_would_refuse_nothing(recipe, world, tmp_path):
    job = _job(recipe, world)
    new, resumed = PretendedGPU(world), PretendedGPU(world)

    train(new, job, tmp_path, stop_at=UNFINISHED)
    assert new.broken() == []
    assert len(_sums(tmp_path, UNFINISHED)) == world
    assert _sums(tmp_path, UNFINISHED)[0] != []
    # The ranks share the unreadable files among the training images when they save.
    shared = {"all_reduce": 1} if recipe == "sce_in1k_multicrop" else {}
    assert new.moments[Moment("save", UNFINISHED)].collectives == {"all_gather": 1} | shared

    train(resumed, job, tmp_path)
    assert resumed.broken() == []
    assert [at.step for at in resumed.moments if at.phase == "step"] == list(range(UNFINISHED, STEPS))
    for step, collectives in ((4, {}), (STEPS - 1, {"all_gather": 1}), (STEPS, {})):
        assert resumed.moments[Moment("save", step)].collectives == collectives | shared
    assert _sums(tmp_path, STEPS) == [[]] * world
    for phase, step in (("step", 5), ("callbacks after", 5), ("validation", STEPS), ("evaluation", STEPS)):
        assert sum(resumed.moments[Moment(phase, step)].collective_bytes.values()) > 0
        assert sum(resumed.moments[Moment(phase, step)].kernels.values()) > 0
    # From the transfer of a batch to the end of its step the host waits for nothing, but for rows and epoch ends, and
    # for torch's loss scaler.
    loaded = load_recipe(recipe).recipe
    scales = loaded.trainer.get("precision") == "16-mixed"
    for phase, waits in (("transfer", 0), ("step", int(scales)), ("callbacks after", 0)):
        assert sum(resumed.moments[Moment(phase, STEPS - 2)].places["sync"].values()) == waits
    # A batch reaches the device in one copy for the views of each size of files, or for the images in memory, and three
    # more: the parameters of all views, sample_ids and labels.
    images = 1 if recipe == "sce_fashion_mnist" else len({v.size for v in loaded.views})
    copies = resumed.moments[Moment("transfer", STEPS - 2)].places["h2d"]
    assert sum(copies.values()) == images + 3
    header, *_, last = csv.reader((tmp_path / "metrics.csv").read_text().splitlines())
    assert {"val/linear_top1", "val/knn_top1"} <= set(header)
    assert last[0] == str(STEPS)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert {"linear_top1", "sgd_top1", "random_init_knn_top1", "raw_pixels_knn_top1"} <= set(summary)


def test_a_careless_gather_in_a_run_is_noticed(monkeypatch, capsys):
    state_dict = Meter.state_dict

    def careless(self: Meter) -> dict[str, Any]:
        gather_detached(torch.zeros(1))
        return state_dict(self)

    monkeypatch.setattr(Meter, "state_dict", careless)
    assert main(["simclr_fashion_mnist", "2"]) == 1
    said = capsys.readouterr().out.split("-- ")
    broken = [paragraph.partition(":")[0] for paragraph in said if "nccl: 1" in paragraph]
    assert broken == [f"save of step {step}" for step in (2, 4, 5, 6)]


# -- the pretence itself ------------------------------------------------------------------------


@pytest.fixture
def gpu():
    with PretendedGPU(world=4) as device:
        yield device


def _noted(gpu: PretendedGPU) -> dict[str, int]:
    """Notes by kind since the last call."""
    found = {kind: sum(places.values()) for kind, places in gpu.notes.places.items() if places}
    gpu.moments.clear()
    gpu.enter("test", 0)
    return found


def test_a_cpu_tensor_in_a_collective_is_noticed(gpu):
    for send in (
        dist.all_reduce,
        partial(dist.broadcast, src=1),
        gather_detached,
    ):
        send(torch.zeros(3))
        assert _noted(gpu) == {"nccl": 1, "collective": 1}
        send(torch.zeros(3, device=CUDA))
        assert _noted(gpu) == {"collective": 1}
    # A gloo group takes it.
    gloo: Any = dist.new_group(backend="gloo")
    dist.all_reduce(torch.zeros(3), group=gloo)
    assert _noted(gpu) == {}


def test_collectives_give_what_equal_ranks_would(gpu):
    x = torch.tensor([1.0, 2.0]).to(CUDA)
    assert gather_detached(x).tolist() == [1.0, 2.0] * 4
    assert gpu.notes.collective_bytes == {"all_gather": 32}
    dist.all_reduce(x)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    dist.broadcast(x, src=0)
    assert x.tolist() == [4.0, 8.0]
    assert gpu.notes.collectives == {"all_gather": 1, "all_reduce": 2, "broadcast": 1}


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, host: x + host,
        lambda x, host: host + x,
        lambda x, host: host.add_(x),
        lambda x, host: torch.where(x > 0, x, host),
        lambda x, host: torch.stack([x[0], host[0]]),
        lambda x, host: torch.cat([x, host]),
        lambda x, host: host[x.long()],
        lambda x, host: x.index_put((x.long(),), host),
        lambda x, host: host[0].add_(x[0]),
        lambda x, host: torch.rand(3, device=CUDA, generator=torch.Generator()),
        lambda x, host: x.normal_(generator=torch.Generator()),
    ],
    ids=range(11),
)
def test_a_mix_is_noticed(gpu, mix):
    x = torch.zeros(3, device=CUDA)
    _noted(gpu)
    mix(x, torch.zeros(3))
    assert _noted(gpu)["mixed"] == 1


def test_what_a_gpu_takes_from_the_host_is_no_mix(gpu):
    x = torch.zeros(3, device=CUDA)
    y = x + torch.tensor(1.0) + 1
    y = torch.where(y > 0, y, torch.tensor(0.5))
    y = y + torch.rand(3, device=CUDA, generator=torch.Generator(device=CUDA))
    y[0] = 2.0
    assert y.device == CUDA and (y.is_cuda, y.is_cpu) == (True, False)
    assert _noted(gpu) == {}
    assert y[torch.tensor([0])].device == CUDA
    assert _noted(gpu) == {"sync": 1}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(CUDA),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).copy_(x),
    ],
    ids=range(13),
)
def test_a_wait_of_the_host_is_noticed(gpu, wait):
    x = torch.zeros(3, device=CUDA)
    _noted(gpu)
    wait(x)
    assert _noted(gpu) == {"sync": 1}


def test_copies_and_float64_are_noticed(gpu):
    x = torch.ones(3).to(CUDA, non_blocking=True)
    assert _noted(gpu) == {"h2d": 1}
    x.double()
    assert _noted(gpu) == {"float64": 1}
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_kernels_and_their_bytes_are_counted_and_views_are_not(gpu):
    x = torch.ones(2, 4).to(CUDA)
    (x.view(4, 2).T * 2).sum()
    assert gpu.notes.kernels == {"mul": 1, "sum": 1}
    assert gpu.notes.kernel_bytes == 4 * (8 + 8 + 8 + 1)


def test_gradients_and_updates_are_those_of_the_cpu(gpu):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    x = torch.rand(8, 4)

    def trained(device: torch.device | str) -> list[torch.Tensor]:
        learner = deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=0.1)
        learner(x.to(device)).square().mean().backward()
        optimizer.step()
        return [value.cpu() for value in learner.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(trained(CUDA), trained("cpu"), strict=True))


def test_a_file_holds_the_numbers(gpu, tmp_path):
    torch.save({"x": torch.arange(3.0).to(CUDA)}, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["x"], torch.arange(3.0))


def test_it_leaves_nothing_behind():
    generator, all_reduce = torch.Generator, dist.all_reduce
    with PretendedGPU(world=2):
        assert dist.get_world_size() == 2
    assert torch.Generator is generator and dist.all_reduce is all_reduce
    assert not dist.is_initialized()
    assert torch.zeros(2).device.type == "cpu"


# -- augmentation -------------------------------------------------------------------------------

COLOUR = ViewConfig(
    size=16,
    count=2,
    scale=(0.2, 1.0),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_p=0.2,
    blur_p=0.5,
)


@pytest.mark.parametrize(
    ("views", "kernels"),
    [
        ([COLOUR], 100),
        ([replace(COLOUR, count=1, blur_p=1.0), replace(COLOUR, count=1, blur_p=0.1, solarize_p=0.2)], 105),
        ([COLOUR, replace(COLOUR, size=8, count=4, role="local")], 200),
        ([COLOUR, *(replace(COLOUR, size=size, count=1) for size in (14, 12, 10, 8))], 500),
    ],
    ids=["two", "two, asymmetric", "six of two sizes", "six of five sizes"],
)
def test_views_take_few_kernels(views, kernels, tmp_path):
    """As docs/gpu.md says, from the second batch on."""
    write_photos(tmp_path)
    small = data_module("imagefolder", tmp_path)
    data = SSLDataModule(
        replace(small.data, augment_on="device"), views, small.eval, small.probe, small.plan, 0,
        source=small.train_source,
    )  # fmt: skip
    first, second, *_ = data.train_dataloader()
    with PretendedGPU() as gpu:
        for step, raw in enumerate((first, second)):
            gpu.enter("views", step)
            data.finish(raw, CUDA)
    notes = gpu.notes_of("views", 1)
    assert 0.9 * kernels < sum(notes.kernels.values()) <= kernels
    assert not notes.places["sync"]
