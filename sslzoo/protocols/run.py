"""Linear evaluation by a protocol that trains on augmented views: the encoder sees each image anew in every epoch."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.checks import require
from sslzoo.data.module import EvalSet, SSLDataModule
from sslzoo.data.sampler import ProbeSampler
from sslzoo.data.sources import resized
from sslzoo.distributed import all_reduce_sum, gather_detached, rank, world_size
from sslzoo.evaluate.figures import figure_name
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import roles
from sslzoo.files import atomically
from sslzoo.nn.batchnorm import to_sync
from sslzoo.nn.weights import fingerprint
from sslzoo.protocols.adapt import adapted
from sslzoo.protocols.classifiers import Classifiers, Length
from sslzoo.protocols.protocol import Best, LinearResult, ViewProtocol
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Recipe

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)


def evaluate_linear(
    protocol: ViewProtocol,
    encoder: nn.Module,
    recipe: Recipe,
    data: SSLDataModule,
    *,
    device: torch.device,
    method: SSLMethod[Any] | None = None,
    folder: Path | None = None,
    report: Report = unseen,
    after_epoch: Callable[[int, Classifiers], None] | None = None,
) -> dict[str, LinearResult]:
    """The result on each labelled data set of ``data``, by name (see ``figure_name``). Collective.

    ``encoder`` maps images to features (N, F), in evaluation mode on ``device``; it stays as it is. ``method`` is the
    method that it belongs to, which some protocols need. ``folder`` keeps the state of an evaluation: started again
    after a kill, with the same encoder, recipe and protocol, it continues, and ends with the same numbers.
    ``after_epoch`` is called with each finished epoch (from 1) and its classifiers.

    Raises ``ValueError`` if nothing is labelled, or the protocol needs another encoder.
    """
    encoder = encoder_of(protocol, encoder, method)
    sets = data.eval_sets()
    require(
        len(sets) > 0,
        f"protocol {protocol.name} needs labels: {recipe.data.dataset} has none; see probe.data",
    )
    results: dict[str, LinearResult] = {}
    pairs = list(zip(sets[::2], sets[1::2], strict=True))
    for i, (train, test) in enumerate(pairs):
        name = figure_name(train.name)
        run = _Evaluation(protocol, encoder, recipe, train, test, device)
        results[name] = run.result(
            None if folder is None else folder / f"{protocol.name}_{name}.pt",
            lambda done, i=i: report((i + done) / len(pairs)),
            after_epoch,
        )
    return results


def encoder_of(protocol: ViewProtocol, encoder: nn.Module, method: SSLMethod[Any] | None) -> nn.Module:
    """What ``protocol`` evaluates: ``encoder``, or what it makes of ``method``; ``ValueError`` if it cannot."""
    if protocol.encoder is not None:
        require(
            method is not None,
            f"protocol {protocol.name} evaluates all backbones of a method; give a run directory or a checkpoint "
            "instead of an export or a backbone",
        )
        assert method is not None
        encoder = protocol.encoder(method)
    if protocol.layers is not None:
        protocol.layers(encoder)
    return encoder


@dataclass
class _Look:
    """A look at the test images."""

    epoch: int  # finished epochs
    correct: list[list[int]]  # at top-1 and top-5, by classifier
    n: int


class _Evaluation:
    """The evaluation on one data set."""

    def __init__(
        self,
        protocol: ViewProtocol,
        encoder: nn.Module,
        recipe: Recipe,
        train: EvalSet,
        test: EvalSet,
        device: torch.device,
    ) -> None:
        size = len(train.source)
        role = roles(torch.arange(size), size, recipe.probe, recipe.eval, recipe.seed)
        self.held_out = role.held_out if protocol.held_out else torch.zeros_like(role.held_out)
        self.learned = (role.learned | role.held_out) & ~self.held_out
        n = int(self.learned.sum())
        require(n > 0, "no training image is left to learn from: all are held out; lower probe.holdout")
        dataset = train.name or recipe.data.dataset
        self.protocol, self.adapted = adapted(protocol, recipe, train.source, n)
        shown = train.source
        if self.protocol.view.padding is not None and recipe.eval.resize is not None:
            shown = resized(shown, recipe.eval.resize)
        self.train, self.test, self.device = train, test, device
        self.data = SSLDataModule(
            recipe.data,
            [self.protocol.view],
            recipe.eval,
            recipe.probe,
            TrainingPlan(dataset_size=size, global_batch_size=self.protocol.batch_size, max_epochs=1),
            recipe.seed,
            source=shown,
            plain=self.protocol.plain,
        )
        self.data.device = device
        whole, rest = divmod(n, self.protocol.batch_size)
        per_epoch = whole + (1 if rest and self.protocol.keep_last else 0)
        total = self.protocol.iterations.get(dataset, per_epoch * self.protocol.epochs)
        self.length = Length(per_epoch, total)
        self.save_every = recipe.logging.checkpoint_every_steps
        self.identity = _identity(
            self.protocol,
            encoder,
            [s.source.fingerprint for s in (train, test)],
            [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (self.learned, test.sample_id)],
            [recipe.data.mean, recipe.data.std, recipe.eval.resize],
            recipe.seed,
            self.length,
        )
        self._with_encoder(encoder, recipe.seed)
        self.looks: list[_Look] = []

    def _with_encoder(self, encoder: nn.Module, seed: int) -> None:
        self.dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
        self.training = self.protocol.batch_norm == "train"
        if self.training:
            encoder = copy.deepcopy(encoder)  # its running statistics change
            encoder = to_sync(encoder, uneven=True) if world_size() > 1 else encoder
        self.encoder = encoder.eval()
        layers = self.protocol.layers
        self._features = (lambda image: {"": encoder(image)}) if layers is None else layers(encoder)
        example = self.data.example_batch(1).global_views[0]
        widths = {name: x.shape[1] for name, x in self.features(example.to(self.device)).items()}
        self.classifiers = Classifiers(
            self.protocol,
            widths,
            self.train.num_classes,
            self.length,
            seed=seed,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def features(self, image: Tensor) -> Mapping[str, Tensor]:
        """Features (N, F) of normalised images, by kind."""
        return self._features(image.to(self.dtype))

    # -- training -----------------------------------------------------------------------------

    def result(
        self, state: Path | None, report: Report, after_epoch: Callable[[int, Classifiers], None] | None
    ) -> LinearResult:
        """Train, from ``state`` if it has the beginning, and test."""
        start = self._load(state)
        starts = gather_detached(torch.tensor([start], device=self.device)).tolist()
        require(
            len(set(starts)) == 1, f"the processes do not all see {state}; its folder must be a shared one"
        )
        self._set_norms(training=self.training)
        sampler = self._sampler(start)
        parts = iter(self.data.view_loader(sampler, among=self.learned))
        for step in sampler.steps:
            places = sampler.parts(step)
            if self.training and not places:
                self.features(self._no_images())  # the other ranks wait for this one's part of the statistics
            for _ in places:
                batch = self.data.finish(next(parts), self.device)
                assert batch.label is not None
                self.classifiers.add(self.features(batch.global_views[0]), batch.label)
            self.classifiers.step(step)
            epoch, left = divmod(step + 1, self.length.per_epoch)
            ended, last = left == 0, step + 1 == self.length.total
            if ended:
                self.data.share_unreadable([self.data.train_source])
                if after_epoch is not None:
                    after_epoch(epoch, self.classifiers)
            if last or (ended and self.protocol.test_epochs and epoch % self.protocol.test_epochs == 0):
                self._look(epoch + (left > 0))
            if ended or last or (step + 1) % self.save_every == 0:
                self._save(state, step + 1)
            report((step + 1) / self.length.total)
        return self._finished()

    def _sampler(self, start: int) -> ProbeSampler:
        batch_size = self.protocol.batch_size
        return ProbeSampler(
            self.learned,
            batch_size=batch_size,
            # Batch norm in training mode needs all images of a step at once.
            part_size=batch_size if self.training else self.data.eval.batch_size,
            steps_per_epoch=self.length.per_epoch,
            steps=range(start, self.length.total),
            seed=self.data.seed,
            rank=rank(),
            world_size=world_size(),
        )

    def _no_images(self) -> Tensor:
        size = self.protocol.view.size
        return torch.zeros((0, self.train.source.channels, size, size), device=self.device)

    def _set_norms(self, *, training: bool) -> None:
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.train(training)

    # -- tests --------------------------------------------------------------------------------

    def _look(self, epoch: int) -> None:
        correct, n = self._tested(self.test)
        self.looks.append(_Look(epoch, correct.tolist(), n))

    def _tested(self, on: EvalSet) -> tuple[Tensor, int]:
        """Numbers of images that are correct, (2, L), and of all that could be read. Collective."""
        self._set_norms(training=False)
        names = self.classifiers.names
        counts = torch.zeros(2 * len(names) + 1, dtype=torch.int64, device=self.device)
        for raw in self.data.eval_loader(on):
            batch = self.data.finish_eval(raw, on.source, self.device)
            assert batch.label is not None
            counts[:-1] += self.classifiers.correct(self.features(batch.image), batch.label).flatten()
            counts[-1] += len(batch.label)
        self.data.share_unreadable([on.source])
        counts = all_reduce_sum(counts)
        require(int(counts[-1]) > 0, f"no image of {on.source.name} split {on.source.split!r} can be read")
        self._set_norms(training=self.training)
        return counts[:-1].view(2, -1), int(counts[-1])

    def _finished(self) -> LinearResult:
        names, lrs, last = self.classifiers.names, self.classifiers.lrs, self.looks[-1]
        chosen, held_out_top1 = 0, None
        if self.protocol.held_out:
            positions = self.held_out.nonzero().squeeze(1)
            require(len(positions) > 0, "no training image is held out to choose by; raise probe.holdout")
            correct, n = self._tested(replace(self.train, sample_id=positions))
            chosen = max(range(len(names)), key=lambda i: (int(correct[0, i]), -lrs[i]))
            held_out_top1 = int(correct[0, chosen]) / n
        return LinearResult(
            top1=last.correct[0][chosen] / last.n,
            top5=last.correct[1][chosen] / last.n,
            classifier=names[chosen],
            held_out_top1=held_out_top1,
            best=self._best() if self.protocol.reported == "best" else None,
            n_train=int(self.learned.sum()),
            n_held_out=int(self.held_out.sum()),
            n_test=last.n,
            n_unreadable=int(self._unreadable.sum()) + self.test.size - last.n,
            adapted=self.adapted,
        )

    def _best(self) -> Best:
        names = self.classifiers.names
        every = [
            Best(
                look.correct[0][i] / look.n,
                look.correct[1][i] / look.n,
                look.epoch,
                name if len(names) > 1 else "",
            )
            for look in self.looks
            for i, name in enumerate(names)
        ]
        return max(every, key=lambda best: best.top1)  # the first of equal ones

    # -- state --------------------------------------------------------------------------------

    @property
    def _unreadable(self) -> Tensor:
        """Mask (N,) of the training images that are known to be unreadable."""
        return self.data.bad_images(self.data.train_source).seen

    def _save(self, path: Path | None, step: int) -> None:
        if path is None or rank() > 0:
            return
        content = {
            "of": self.identity,
            "step": step,
            "looks": [(look.epoch, look.correct, look.n) for look in self.looks],
            "classifiers": self.classifiers.state_dict(),
            "norms": dict(self.encoder.named_buffers()) if self.training else {},
            "unreadable": self._unreadable.nonzero().squeeze(1),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as part:
            torch.save(content, part)

    def _load(self, path: Path | None) -> int:
        """Continue from ``path``; the next step. A state of something else is not used, and later overwritten."""
        if path is None or not path.exists():
            return 0
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["of"] != self.identity:
            log.warning("%s belongs to another evaluation; starting anew", path)
            return 0
        self.looks = [_Look(*look) for look in content["looks"]]
        self.classifiers.load_state_dict(content["classifiers"])
        for name, buffer in self.encoder.named_buffers():
            if name in content["norms"]:
                buffer.copy_(content["norms"][name])
        self._unreadable[content["unreadable"]] = True
        return content["step"]


def _identity(protocol: ViewProtocol, encoder: nn.Module, *others: object) -> str:
    """A hash of what a state belongs to: another encoder, protocol or data set cannot continue it."""
    settings = {f.name: getattr(protocol, f.name) for f in fields(protocol)}
    settings = {name: value for name, value in settings.items() if not callable(value)}
    return hashlib.sha256(repr((settings, others, fingerprint(encoder))).encode()).hexdigest()
