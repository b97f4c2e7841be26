"""One DataModule for every data set, view list and number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from sslzoo.batch import Batch, EvalBatch
from sslzoo.checks import require
from sslzoo.data.bundling import Layout
from sslzoo.data.crops import crop_batch, to_unit
from sslzoo.data.datasets import open_source
from sslzoo.data.disk import DataError
from sslzoo.data.loading import (
    BadImages,
    EvalDataset,
    ImageReader,
    Normalization,
    RawBatch,
    RawEvalBatch,
    ViewDataset,
    Waiting,
    WatchedLoader,
    leave_signals_to_parent,
    shard,
)
from sslzoo.data.photometric import normalize, normalize_
from sslzoo.data.sampler import GlobalBatchSampler, Item
from sslzoo.data.sources import ArraySource, FakeSource, ImageSource
from sslzoo.data.views import ViewDraws, applied_together, apply_view, expand_views
from sslzoo.distributed import rank, world_size
from sslzoo.randomness import is_holdout, subset
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import DataConfig, EvalConfig, PlainView, ProbeConfig, SourceConfig, ViewConfig

UNLABELLED = 25_600  # plain images that evaluation of unlabelled data runs over at most
_FIXED = 2**32  # the epoch whose draws fixed_views begins with

__all__ = ["EvalSet", "SSLDataModule", "is_holdout"]


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set that evaluation runs over; the i-th loader of ``val_dataloader`` serves the i-th."""

    name: str  # '' for the training data's own, otherwise the data set's
    split: str  # train (what probes learn from, the bank of k-NN) or test
    num_classes: int  # 0 without labels
    source: ImageSource
    sample_id: Tensor  # (n,) int64: the samples in it, over all ranks

    @property
    def size(self) -> int:
        """Samples over all ranks."""
        return len(self.sample_id)


class SSLDataModule(LightningDataModule):
    """Training batches from ``views`` and evaluation batches from a plain view.

    Workers decode, crop to uint8, and draw the parameters of the views, which are applied on the device to the
    whole batch, or, with ``data.augment_on`` = worker, by them. Images in memory need no workers and are cropped on the
    device too. ``position`` counts the micro-batches finished in the whole run: a run's callback adds one after each,
    and the order of samples continues from there after a resume.
    """

    def __init__(
        self,
        data: DataConfig,
        views: Sequence[ViewConfig],
        eval: EvalConfig,
        probe: ProbeConfig,
        plan: TrainingPlan,
        seed: int,
        source: ImageSource | None = None,
        plain: PlainView | None = None,
    ) -> None:
        """``plain`` replaces how ``eval`` shows images in evaluation."""
        super().__init__()
        self.data, self.views, self.eval, self.probe = data, expand_views(views), eval, probe
        self.plan, self.seed = plan, seed
        self.plain = eval.view if plain is None else plain
        self.train_source = source if source is not None else open_source(data)
        self._groups = applied_together(self.views, self.train_source.channels)
        if len(self.train_source) != plan.dataset_size:
            raise ValueError(
                f"the plan counts {plan.dataset_size} samples, {self.train_source.name} has {len(self.train_source)}"
            )
        if self.train_source.channels != len(data.mean):
            raise ValueError(
                f"{self.train_source.name} has {self.train_source.channels} channel(s), "
                f"data.mean and data.std have {len(data.mean)}"
            )
        self.position = 0
        self.device = torch.device("cpu")  # of collectives without a trainer
        self._waiting = Waiting()
        self._eval_sets: list[EvalSet] | None = None
        self._plain_set: EvalSet | None = None
        # By id of the source: the training data may also be evaluated.
        self._bad: dict[int, BadImages] = {}
        self._readers: dict[int, ImageReader] = {}

    # -- properties of the data ---------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes of the training data; 0 without labels."""
        return self.train_source.num_classes

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the training data, to which state per sample belongs."""
        return self.train_source.fingerprint

    @property
    def unreadable(self) -> int:
        """Unreadable training images met so far: by this rank, and by the others up to :meth:`share_unreadable`."""
        return self.bad_images(self.train_source).count

    def unreadable_by_source(self) -> dict[str, int]:
        """The same of every source that was looked at, by name and split."""
        counts: dict[str, int] = {}
        for bad in self._bad.values():
            name = f"{bad.source.name}/{bad.source.split}"
            counts[name] = counts.get(name, 0) + bad.count
        return counts

    def share_unreadable(self, sources: Iterable[ImageSource] | None = None) -> None:
        """Combine the unreadable images of all ranks, each of which has seen only its share, of all sources or of
        those given. Collective.

        Raises ``DataError`` on all ranks if they are more than ``data.max_bad_fraction`` of a source.
        """
        if world_size() == 1:
            return  # checked as they were met
        if sources is None:
            sources = (self.train_source, *(s.source for s in self.eval_sets()))
        for source in {id(source): source for source in sources}.values():
            self._shared(source).check()

    def _shared(self, source: ImageSource) -> BadImages:
        """The unreadable images of ``source`` on any rank. Collective."""
        bad = self.bad_images(source)
        if world_size() > 1 and not isinstance(source, ArraySource):
            seen = bad.seen.to(self._device, torch.uint8)
            dist.all_reduce(seen, dist.ReduceOp.MAX)
            bad.seen = seen.bool().cpu()
        return bad

    def state_dict(self) -> dict[str, Any]:
        """The position, which determines the order of samples and all random numbers, the fingerprint of the images,
        and which of them were unreadable. Collective. Too many of those do not stop a save: the epoch's end does."""
        bad = self._shared(self.train_source).seen.nonzero()[:, 0].tolist()
        accumulate = self.plan.accumulate
        state = {"position": self.position, "accumulate": accumulate}
        return state | {"fingerprint": self.fingerprint, "unreadable": bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position. ``ValueError`` for other images: no position or table belongs to them."""
        then = state_dict.get("fingerprint", self.fingerprint)
        require(
            then == self.fingerprint,
            f"the checkpoint was trained on other images: then {then}, now {self.fingerprint}; "
            "set data.dataset, data.root and data.split back, or take its weights alone",
        )
        # Steps may be divided into other micro-batches now. Runs save between two steps, so this is a whole number.
        before = state_dict.get("accumulate", self.plan.accumulate)
        self.position = int(state_dict["position"]) * self.plan.accumulate // before
        self.bad_images(self.train_source).seen[state_dict.get("unreadable", [])] = True

    def bad_images(self, source: ImageSource) -> BadImages:
        """The unreadable images of ``source`` that were met so far."""
        if id(source) not in self._bad:
            self._bad[id(source)] = BadImages(source, self.data.max_bad_fraction)
        return self._bad[id(source)]

    def _reader_of(self, source: ImageSource) -> ImageReader:
        if id(source) not in self._readers:
            self._readers[id(source)] = ImageReader(source, self._workers_for(source))
        return self._readers[id(source)]

    def _workers_for(self, source: ImageSource) -> int:
        return 0 if isinstance(source, ArraySource) else self.data.workers

    @property
    def augments_in_workers(self) -> bool:
        """Whether the data workers finish the views, or the main process without workers; otherwise the device does."""
        if isinstance(self.train_source, ArraySource):
            return False
        place = self.data.augment_on
        return self._device.type == "cpu" if place is None else place == "worker"

    @property
    def _device(self) -> torch.device:
        return self.device if self.trainer is None else self.trainer.strategy.root_device

    # -- loaders ------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """This rank's micro-batches from ``position`` to the end of the epoch, as raw batches."""
        batches = GlobalBatchSampler(self.plan, self.seed, rank(), lambda: self.position)
        loader = self.view_loader(batches)
        self._waiting = loader.waiting
        return loader

    @property
    def waited(self) -> float:
        """Seconds that the process has waited for the batches of :meth:`train_dataloader`."""
        return self._waiting.seconds

    def view_loader(self, batches: Iterable[list[Item]], *, among: Tensor | None = None) -> WatchedLoader:
        """The views of training samples in the given batches. Unreadable ones are replaced by others, ``among`` those
        of this mask (N,)."""
        return self._loader(self._view_dataset(among), batches, persistent=True)

    def val_dataloader(self) -> list[DataLoader[RawEvalBatch]]:
        """One loader for each of :meth:`validation_sets`, with this rank's contiguous share of its samples.

        No sample is padded or seen twice, hence ranks may have different numbers of batches.
        """
        return [self.eval_loader(s) for s in self.validation_sets()]

    def eval_loader(
        self, eval_set: EvalSet, batches: Sequence[Sequence[int]] | None = None
    ) -> DataLoader[RawEvalBatch]:
        """Plain images of ``eval_set`` in ``batches``, each a list of sample ids; by default this rank's contiguous
        share, without padding."""
        if batches is None:
            batches = shard(eval_set.sample_id, rank(), world_size(), self.eval.batch_size)
        return self._loader(
            EvalDataset(eval_set.source, self.plain, self._reader_of(eval_set.source)),
            batches,
            persistent=False,
        )

    def fixed_views(self, sample_id: Tensor, draws: int, device: torch.device) -> Iterator[Batch]:
        """Training samples ``sample_id`` (n,), ``draws`` times each, as the recipe's views show them: this rank's share
        of the samples, in batches of evaluation's size. Always the same views, and none that a training step sees.

        Unreadable images are replaced by others, as in training.
        """
        batches = [
            [(_FIXED + draw, i) for i in batch]
            for batch in shard(sample_id, rank(), world_size(), self.eval.batch_size)
            for draw in range(draws)
        ]
        for raw in self._loader(self._view_dataset(), batches, persistent=False):
            yield self.finish(raw, device)

    def _view_dataset(self, among: Tensor | None = None) -> ViewDataset:
        size, source = self.plan.global_batch_size, self.train_source
        finish = Normalization(self.data.mean, self.data.std) if self.augments_in_workers else None
        return ViewDataset(source, self.views, self.seed, size, self._reader_of(source), among, finish)

    def _loader(self, dataset: ViewDataset | EvalDataset, batches: Any, *, persistent: bool) -> WatchedLoader:
        workers = self._workers_for(dataset.source)
        return WatchedLoader(
            dataset,
            patience=self.data.timeout,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
            # Its own: the base seed of workers would otherwise be drawn from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )

    # -- evaluation sets ----------------------------------------------------------------------

    def eval_sets(self) -> list[EvalSet]:
        """Train and test set of the training data, if labelled, then of every entry of ``probe.data``.

        Raises ``ValueError`` if labels are missing, the classes of train and test set differ, images are too small, or
        two data sets have the same name.
        """
        if self._eval_sets is None:
            sets: list[EvalSet] = []
            if self.train_source.labels is not None:
                sets += self._pair("", self.data, self.train_source)
            for cfg in self.probe.data:
                sets += self._pair(cfg.dataset, cfg, self._open(cfg))
            names = [s.name for s in sets if s.split == "train"]
            twice = sorted({name for name in names if names.count(name) > 1})
            require(not twice, f"probe.data names {', '.join(twice)} twice; results are reported by data set")
            for s in sets:
                EvalDataset(s.source, self.plain)  # refuses images that are too small
            self._eval_sets = sets
        return self._eval_sets

    def validation_sets(self) -> list[EvalSet]:
        """What evaluation during training runs over: :meth:`eval_sets`, and the training images, at most
        ``UNLABELLED`` of them, if these have no labels."""
        if self.train_source.labels is not None:
            return self.eval_sets()
        if self._plain_set is None:
            source = self.train_source
            EvalDataset(source, self.plain)  # refuses images that are too small
            sample_id = subset(self.seed, len(source), UNLABELLED)
            self._plain_set = EvalSet(
                name="", split="train", num_classes=0, source=source, sample_id=sample_id
            )
        return [*self.eval_sets(), self._plain_set]

    def _open(self, cfg: SourceConfig) -> ImageSource:
        if isinstance(self.train_source, FakeSource):
            own = self.num_classes if cfg.dataset == self.data.dataset else 0
            classes = own or len(cfg.class_names) or dataset_info(cfg.dataset).num_classes or 10
            return self.train_source.sibling(cfg.split, classes)
        return open_source(cfg, channels=len(self.data.mean))

    def _pair(self, name: str, cfg: SourceConfig, train: ImageSource) -> list[EvalSet]:
        test = self._open(
            SourceConfig(dataset=cfg.dataset, root=cfg.root, split=self.eval.test_split, classes=cfg.classes)
        )
        for source in (train, test):
            if source.labels is None:
                raise ValueError(
                    f"evaluation needs labels, and {source.name} split {source.split!r} has none"
                )
        if train.class_names != test.class_names:
            raise ValueError(
                f"splits {train.split!r} and {test.split!r} of {train.name} have different classes "
                f"({train.num_classes} and {test.num_classes}); give both the same class folders or names"
            )
        for source in (train, test):
            require(
                len(source) > 0,
                f"{source.name} split {source.split!r} has no images to evaluate; see data.root, probe.data and "
                "eval.test_split",
            )
            require(
                len(source) >= self.plan.world_size,
                f"{source.name} split {source.split!r} has {len(source)} image(s) to evaluate, fewer than the "
                f"{self.plan.world_size} processes; set trainer.devices={len(source)} or less",
            )
        check_knn(self.eval, len(train), train.name)
        return [
            EvalSet(
                name=name,
                split=split,
                num_classes=train.num_classes,
                source=source,
                sample_id=subset(self.seed, len(source), self._needed() if split == "train" else None),
            )
            for split, source in (("train", train), ("test", test))
        ]

    def _needed(self) -> int | None:
        """Of how many training samples evaluation needs features; None: of all. The smaller subset is part of the
        larger."""
        sizes = (self.probe.train_size, self.eval.bank_size)
        return None if None in sizes else max(size for size in sizes if size is not None)

    # -- from workers to the device -----------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take note of unreadable images."""
        if isinstance(batch, RawEvalBatch):
            self.bad_images(self.validation_sets()[dataloader_idx].source).add(batch.bad)
            return EvalBatch(batch.image, batch.sample_id, batch.label)
        if isinstance(batch, RawBatch):
            self.bad_images(self.train_source).add(batch.bad)
            return batch._replace(bad=())
        return batch

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Crop (images in memory), colour, blur, solarise, flip and normalise, in float32."""
        if isinstance(batch, RawBatch):
            if (self.position + 1) % self.plan.micro_batches_per_epoch == 0:
                self.share_unreadable()
            batch = self._finish(batch)
        elif isinstance(batch, EvalBatch):
            batch = batch._replace(image=self._normalized(to_unit(batch.image)))
        # Lightning converts to the precision of the run before the transfer, when images were uint8.
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.data.mean, self.data.std)

    def _finish(self, batch: RawBatch) -> Batch:
        global_views: list[Tensor] = []
        local_views: list[Tensor] = []
        for view, images in zip(self.views, self._views(batch), strict=True):
            (global_views if view.role == "global" else local_views).append(images)
        return Batch(tuple(global_views), tuple(local_views), batch.sample_id, batch.label)

    def _views(self, batch: RawBatch) -> list[Tensor]:
        """Every view of the batch, (N, C, S, S)."""
        n = len(batch.sample_id)
        images = batch.images if batch.layout is None else self._applied(batch, batch.layout)
        views: dict[int, Tensor] = {}
        for group, together in zip(self._groups, images, strict=True):
            views.update(zip(group, together.split(n), strict=True))
        return [views[k] for k in range(len(self.views))]

    def _applied(self, batch: RawBatch, layout: Layout) -> Iterable[Tensor]:
        """The views of each group, one after the other."""
        drawn: tuple[ViewDraws, ...] = layout.unbundle(batch.draws)
        for g, (group, draws) in enumerate(zip(self._groups, drawn, strict=True)):
            view = self.views[group[0]]
            if isinstance(self.train_source, ArraySource):
                images = crop_batch(
                    batch.images[0], draws.boxes, view.size, view.interpolation, view.padding or 0
                )
            else:
                images = to_unit(batch.images[g])
            yield normalize_(apply_view(view, images, draws), self.data.mean, self.data.std)

    @torch.no_grad()
    def finish(self, raw: RawBatch, device: torch.device | str = "cpu") -> Batch:
        """A raw batch as the method gets it, outside the training loop: any rank may call it alone."""
        noted = self.on_before_batch_transfer(raw, 0)
        return self._finish(self.transfer_batch_to_device(noted, torch.device(device), 0))

    @torch.no_grad()
    def finish_eval(
        self, raw: RawEvalBatch, source: ImageSource, device: torch.device | str = "cpu"
    ) -> EvalBatch:
        """A raw batch of :meth:`eval_loader`, from ``source``, on ``device``: any rank may call it alone."""
        self.bad_images(source).add(raw.bad)
        batch = EvalBatch(raw.image, raw.sample_id, raw.label)
        batch = self.transfer_batch_to_device(batch, torch.device(device), 0)
        return batch._replace(image=self._normalized(to_unit(batch.image)))

    def example_batch(self, n: int) -> Batch:
        """The first ``n`` samples of the training data as epoch 0 shows them."""
        return self.batch_of(range(n))

    def batch_of(self, sample_id: Sequence[int], epoch: int = 0) -> Batch:
        """These samples of the training data as ``epoch`` shows them."""
        raw = self._view_dataset().__getitems__([(epoch, i) for i in sample_id])
        if isinstance(raw, DataError):
            raise raw
        return self.finish(raw)

    def varied_samples(self, n: int) -> list[int]:
        """``n`` samples of the training data, or all, of as many classes as there are; unlabelled, from all over it."""
        source = self.train_source
        n = min(n, len(source))
        chosen: dict[int, None] = {}
        if source.labels is not None:
            firsts = np.unique(source.labels, return_index=True)[1].tolist()
            classes = min(n, len(firsts))
            chosen |= dict.fromkeys(firsts[i * len(firsts) // classes] for i in range(classes))
        spread = (i * len(source) // n for i in range(n))
        chosen |= dict.fromkeys([*spread, *range(n)])
        return list(chosen)[:n]


def check_knn(cfg: EvalConfig, samples: int, name: str) -> None:
    """``ValueError`` if k-NN asks for more neighbours than the ``samples`` training images of a data set."""
    require(
        cfg.knn_k <= samples,
        f"eval.knn_k={cfg.knn_k} exceeds the {samples} training images of {name}; lower eval.knn_k",
    )


def _as_it_is(batch: Any) -> Any:
    return batch
