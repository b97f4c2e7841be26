"""ImageNet training step of each method on one GPU: images per second, memory, host waits, and the data loader.

Each row trains with the real ``Trainer`` and the callbacks of a run, on crops that are already in memory, including
augmentation and probe. The batch is one device's share of the recipe's batch. The last table measures JPEG decoding
with all CPUs, which shows how many cores a GPU needs. Without a GPU nothing is measured.

    python benchmarks/gpu.py [--steps 20] [--method sce ...] [--no-compile] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sslzoo.callbacks.batchnorm import BroadcastBatchNormStats
from sslzoo.callbacks.meter import Meter
from sslzoo.callbacks.seeding import StepSeeding
from sslzoo.data.bundling import bundle
from sslzoo.data.loading import RawBatch, ViewDataset
from sslzoo.data.module import EvalSet, SSLDataModule
from sslzoo.data.sampler import GlobalBatchSampler
from sslzoo.data.sources import FileSource, ImageSource
from sslzoo.data.views import applied_together, draw_uniforms, draw_view
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import build_experiment
from sslzoo.run.trainer import build_trainer

RECIPES = {
    "simclr": "simclr_in1k",
    "sce": "sce_in1k",
    "sce, multi-crop": "sce_in1k_multicrop",
    "mmcl": "mmcl_in1k",
    "sogclr": "sogclr_in1k",
    "metaug": "metaug_in1k",
    "margin": "margin_mocov3_in100",
}
IMAGES = 1_281_167  # state per training sample has this many rows
CLASSES = 1000
WARM_UP = 6
WATCHED = 2  # steps whose waits are counted


class Pretended(ImageSource):
    """A source with labels of 1,000 classes but no images, because the crops are given."""

    is_array = False

    def __init__(self) -> None:
        labels = np.arange(IMAGES, dtype=np.int64) % CLASSES
        super().__init__("pretended", "train", 3, labels, [str(i) for i in range(CLASSES)])

    def __len__(self) -> int:
        return IMAGES

    def _identity(self) -> bytes:
        return b""

    def read(self, sample_id: int) -> Tensor:
        raise NotImplementedError


class Crops(SSLDataModule):
    """Yields a few batches of random crops repeatedly."""

    steps = 1

    def eval_sets(self) -> list[EvalSet]:
        """The evaluation sets, which the probe needs."""
        ids = torch.arange(IMAGES)
        return [EvalSet(name="", split="train", num_classes=CLASSES, source=self.train_source, sample_id=ids)]

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """A loader over batches in pinned memory, as data workers would provide them."""
        n = self.plan.micro_batch_size
        draw = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(3):
            ids = torch.randperm(IMAGES, generator=draw)[:n]
            images, drawn = [], []
            for group in applied_together(self.views, 3):
                views = [self.views[k] for k in group]
                shape = (n * len(views), 3, views[0].size, views[0].size)
                images.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw))
                drawn.append(draw_view(views, [draw_uniforms(self.seed, 0, k, ids) for k in group], 3))
            batches.append(RawBatch(tuple(images), *bundle(tuple(drawn)), ids, ids % CLASSES, ()))
        schedule: list[RawBatch] = [batches[k % len(batches)] for k in range(self.steps)]
        return DataLoader(schedule, batch_size=None, pin_memory=True)  # type: ignore[arg-type]


def _place() -> str:
    """The innermost line of sslzoo or a method on the stack, otherwise of any library except torch."""
    frame, other = sys._getframe(2), "elsewhere"
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] in ("sslzoo", "sslzoo_methods"):
            return f"{module}:{frame.f_lineno}"
        if other == "elsewhere" and module.partition(".")[0] not in ("torch", "warnings", "__main__"):
            other = f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class Watch(Callback):
    """Time and peak memory of the steps after a warm-up, and the places where the host waited for the device."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count = steps, 0
        self.marks: list[float] = []
        self.waits: Counter[str] = Counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """After the timed steps, run two more in torch's sync debug mode."""
        if self.count == WARM_UP + self.steps:
            self._showing, warnings.showwarning = warnings.showwarning, self._note
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _note(self, message: Warning | str, *_: Any) -> None:
        if "synchronizing" in str(message):
            self.waits[_place()] += 1

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the clock before and after the timed steps, once the device has finished."""
        self.count += 1
        if self.count == WARM_UP + self.steps + WATCHED:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._showing
        if self.count in (WARM_UP, WARM_UP + self.steps):
            torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        if self.count == WARM_UP:
            torch.cuda.reset_peak_memory_stats()

    @property
    def ms(self) -> float:
        """Milliseconds per step."""
        return (self.marks[1] - self.marks[0]) * 1e3 / self.steps


def measure(
    name: str,
    micro: int,
    steps: int,
    *,
    precision: str = "",
    channels_last: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Measure one row: the recipe ``name`` with ``micro`` samples per step."""
    overrides = [
        f"data.global_batch_size={micro}",
        "trainer.devices=1",
        "trainer.max_epochs=2",
        "data.workers=0",
    ]
    overrides += ["trainer.sync_batchnorm=false", "trainer.accelerator=gpu"]
    overrides.append(f"speed.channels_last={str(channels_last).lower()}")
    overrides += ["speed.compile=inductor"] * compile
    if precision:
        overrides.append(f"trainer.precision={precision}")
    recipe: Recipe = load_recipe(name, overrides).recipe
    source = Pretended()
    experiment = build_experiment(recipe, source=source)
    method = experiment.method
    data = Crops(
        data=recipe.data,
        views=recipe.views,
        eval=recipe.eval,
        probe=recipe.probe,
        plan=experiment.plan,
        seed=recipe.seed,
        source=source,
    )
    data.steps = WARM_UP + steps + WATCHED
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Callback] = [
            StepSeeding(),
            BroadcastBatchNormStats(),
            Meter(Path(folder), every_steps=10 * data.steps),
        ]
        options = {k: v for k, v in recipe.trainer.items() if k != "num_nodes"}
        options |= {"max_epochs": 1, "limit_val_batches": 0}
        trainer = build_trainer(options, run_dir=Path(folder), callbacks=[*callbacks, watch])
        trainer.fit(method, datamodule=data)
    return {
        "recipe": name,
        "batch": micro,
        "precision": str(recipe.trainer.get("precision", "32-true")),
        "channels_last": channels_last,
        "compile": compile,
        "ms": round(watch.ms, 1),
        "images_per_second": round(micro / watch.ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "waits_per_step": sum(watch.waits.values()) / WATCHED,
        "wait_places": dict(watch.waits.most_common(12)),
    }


def fitting(name: str, steps: int, **options: Any) -> dict[str, Any]:
    """Measure the recipe with one device's share of its batch, halved until it fits."""
    recipe = load_recipe(name).recipe
    micro = recipe.data.global_batch_size // int(recipe.trainer["devices"])
    micro //= int(recipe.trainer.get("num_nodes", 1)) * int(recipe.trainer.get("accumulate_grad_batches", 1))
    share = micro
    while True:
        try:
            return measure(name, micro, steps, **options) | {"share": share}
        except torch.OutOfMemoryError:
            micro //= 2
            if micro < 2:
                raise
        gc.collect()
        torch.cuda.empty_cache()


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    kind = row["precision"] + ", channels_last" * row["channels_last"] + ", compiled" * row["compile"]
    batch = f"{row['batch']}" + (f" of {row['share']}" if row["batch"] != row["share"] else "")
    print(
        f"{row['recipe']:22s} {kind:38s} batch {batch:12s} {row['ms']:8.1f} ms  {row['images_per_second']:6d} images/s"
        f"  {row['peak_gib']:5.1f} GiB  {row['waits_per_step']:6.1f} waits",
        flush=True,
    )


def loader(folder: Path, seconds: float) -> dict[str, Any]:
    """Images per second that all CPUs decode and crop for SCE's views, from JPEG files of ImageNet's typical size."""
    draw = np.random.default_rng(0)
    paths = []
    for k in range(256):
        coarse = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noise = draw.normal(0, 12, (375, 500, 3))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        paths.append(f"{k}.jpg")
        Image.fromarray(pixels).save(folder / paths[-1], quality=90)
    size = statistics.mean((folder / p).stat().st_size for p in paths) / 1024
    files = FileSource("files", "train", folder, paths * 64, None)
    recipe = load_recipe("sce_in1k").recipe
    workers = len(os.sched_getaffinity(0))
    plan = TrainingPlan(dataset_size=len(files), global_batch_size=256, max_epochs=100)
    batches = DataLoader(
        ViewDataset(files, recipe.views, 0, 256),
        batch_sampler=GlobalBatchSampler(plan, 0, 0, lambda: 0),
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=True,
    )
    stream = iter(batches)
    for _ in range(workers):
        next(stream)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        count += len(next(stream).sample_id)
    return {
        "workers": workers,
        "kib_an_image": round(size),
        "images_per_second": round(count / (time.perf_counter() - begun)),
    }


def _as_it_is(batch: Any) -> Any:
    return batch


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU found: nothing was measured")
        sys.exit()
    torch.set_float32_matmul_precision("highest")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    print(f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, torch {torch.__version__}")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": []}
    for method in options.method:
        name = RECIPES[method]
        variants: list[dict[str, Any]] = [{}, {"channels_last": True}]
        if method in ("simclr", "sce") and not options.no_compile:
            variants += [{"compile": True}, {"channels_last": True, "compile": True}]
        if method in ("simclr", "mmcl"):
            variants.append({"precision": "bf16-mixed" if method == "mmcl" else "32-true"})
        for variant in variants:
            try:
                report["rows"].append(fitting(name, options.steps, **variant))
                show(report["rows"][-1])
            except Exception as error:  # one row may fail, the others are still worth having
                print(
                    f"{name} {variant}: {type(error).__name__}: {str(error).splitlines()[0][:300]}",
                    flush=True,
                )
            gc.collect()
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        report["loader"] = loader(Path(folder), 15.0)
    print(
        "loader: {images_per_second} images/s by {workers} workers, files of {kib_an_image} KiB".format(
            **report["loader"]
        )
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
