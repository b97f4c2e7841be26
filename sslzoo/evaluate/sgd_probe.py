"""Softmax classifiers trained by SGD, on frozen features as in the papers, or alongside a training.

Shapes: N samples in a batch, F features, C classes, L learning rates. Classifiers for all learning rates are
trained at once, and the best is selected on held-out training samples.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslzoo.checks import require
from sslzoo.distributed import all_reduce_sum, gather_detached, world_size
from sslzoo.evaluate.metrics import Standardizer, standardizer, within_top
from sslzoo.evaluate.progress import Report, unseen
from sslzoo.evaluate.task import Features, Task, rows_to_learn
from sslzoo.randomness import PROBE, hash64, key
from sslzoo.recipe.sections import ProbeConfig

EPOCHS = 50  # epochs of linear evaluation on extracted features,
STEPS = 1000  # or more, to reach this many steps
BATCH = 256  # samples per step of linear evaluation, over all ranks: so many, or a multiple of it,
MOST_STEPS = 15_000  # to reach the epochs in at most so many steps
STATISTICS_RATE = 0.1  # update rate of the running feature statistics, which average about ten steps
EPS = 1e-5  # added to the variance, as in batch norm


class SGDProbe:
    """L softmax classifiers on the same features, one per learning rate, trained by SGD with momentum.

    Features are standardised, so that the same learning rates suit different encoders. With ``running=True``,
    for an encoder in training, running statistics of the previous steps are used (like batch norm without
    affine parameters; the first step only initialises them). With ``running=False``, inputs must already be
    standardised, and mean and variance stay 0. The gradient is computed in closed form and cannot propagate
    to the encoder. All sums of a step are in one vector, for a single all-reduce that overlaps with the
    computation of the next batch.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        cfg: ProbeConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        running: bool = True,
    ) -> None:
        self.running = running
        self.classes, self.width, self.cfg = classes, width, cfg
        rates = len(cfg.lrs)
        self.lrs = torch.tensor(cfg.lrs, device=device, dtype=dtype)[:, None, None]
        self.weight = torch.zeros(rates, classes, 1 + width, device=device, dtype=dtype)  # bias first
        self.velocity = torch.zeros_like(self.weight)
        self.mean = torch.zeros(width, device=device, dtype=dtype)
        self.variance = torch.zeros_like(self.mean)
        self.updates = 0  # number of steps
        self._class_index = torch.arange(classes, device=device)[:, None]
        self._ones = torch.ones(1, 1, device=device, dtype=dtype)
        # Sums over the step: gradient, first and second moments of the features, number of samples used for the
        # gradient, number of samples used for the moments.
        sizes = (self.weight.numel(), 2 * width, 1, 1)
        self._sums = torch.zeros(sum(sizes), device=device, dtype=dtype)
        gradient, moments, self._trained, self._seen = self._sums.split(sizes)
        self._gradient, self._moments = gradient.view(rates * classes, 1 + width), moments.view(2, width)
        self._work: Any = None
        self._factor: float | None = None  # learning-rate factor of the step in progress, if there is one

    def logits(self, z: Tensor) -> Tensor:
        """Logits (L, N, C) of standardised features ``z`` (N, F)."""
        return self._with_bias(z.to(self.mean.dtype)) @ self.weight.mT

    def _with_bias(self, z: Tensor) -> Tensor:
        return torch.cat([self._ones.expand(len(z), 1), z], dim=1)  # (N, 1+F)

    @torch.no_grad()
    def accumulate(self, x: Tensor, label: Tensor, held_out: Tensor) -> None:
        """Add a micro-batch: features (N, F), labels (N,), negative if unknown, and the mask of held-out samples
        (N,), which are used for the statistics but not for the gradient."""
        self.finish()
        z = x.detach().to(self.mean.dtype)
        if self.running:
            self._seen += len(z)
            z = z - self.mean
            self._moments += torch.stack([z, z * z]).sum(1)
            if self.updates == 0:
                return
            z *= (self.variance + EPS).rsqrt()
        trains = ~held_out & (label >= 0)
        self._trained += trains.sum()
        z = self._with_bias(z)
        # (L, C, N), because softmax over few neighbouring numbers is slow on CPUs.
        error = (self.weight.flatten(0, 1) @ z.T).view(*self.weight.shape[:2], len(z)).softmax(1)
        error.add_(label == self._class_index, alpha=-1)  # (C, N), one comparison for all learning rates
        error *= trains
        self._gradient.addmm_(error.flatten(0, 1), z)

    @torch.no_grad()
    def start(self, factor: float) -> None:
        """Start the step, with ``factor`` times the configured learning rates."""
        self._factor = factor
        if world_size() > 1:
            self._work = dist.all_reduce(self._sums, async_op=True)

    @torch.no_grad()
    def drop(self) -> None:
        """Drop the micro-batches added since the last step."""
        self._sums.zero_()

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the step in progress, if there is one."""
        if self._factor is None:
            return
        if self._work is not None:
            self._work.wait()
        if self.updates > 0 or not self.running:
            gradient = (self._gradient / self._trained.clamp_min(1)).view_as(self.weight)
            if self.cfg.weight_decay:
                gradient[..., 1:].add_(self.weight[..., 1:], alpha=self.cfg.weight_decay)
            self.velocity.mul_(self.cfg.momentum).add_(gradient)
            self.weight.addcmul_(self.lrs, self.velocity, value=-self._factor)
        if self.running:
            rate = STATISTICS_RATE if self.updates else 1.0
            shift, square = self._moments / self._seen
            self.variance.lerp_(square.addcmul_(shift, shift, value=-1).clamp_min_(0), rate)
            self.mean.add_(shift, alpha=rate)
        self.updates += 1
        self._sums.zero_()
        self._factor = self._work = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and one integer, equal on all ranks."""
        self.finish()
        tensors = {"weight": self.weight, "velocity": self.velocity}
        return tensors | {"mean": self.mean, "variance": self.variance, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; raises ``ValueError`` if shapes differ."""
        for name in ("weight", "velocity", "mean", "variance"):
            current, stored = getattr(self, name), state[name]
            require(
                current.shape == stored.shape,
                f"the checkpoint's probe {name} has shape {tuple(stored.shape)}, this run's "
                f"{tuple(current.shape)}; keep probe.lrs, backbone and data as they were",
            )
            current.copy_(stored)
        self.updates = state["updates"]


class SGDResult(NamedTuple):
    """Results of the selected classifier; accuracies are fractions."""

    top1: float
    top5: float
    lr: float
    holdout_top1: float


def choose(probe: SGDProbe, task: Task, standardize: Standardizer) -> SGDResult:
    """Test accuracy of the learning rate that is best on the held-out samples (ties: the smallest). Collective."""
    held_out = task.roles.held_out.nonzero().squeeze(1)
    chosen = _counts(probe, task.train, held_out, standardize)
    tested = _counts(probe, task.test, None, standardize)
    require(chosen[2][0] > 0, "no training sample is held out to choose the probe; raise probe.holdout")
    require(tested[2][0] > 0, "the test set is empty")
    lrs = probe.cfg.lrs
    best = max(range(len(lrs)), key=lambda i: (chosen[0][i], -lrs[i]))
    return SGDResult(
        tested[0][best] / tested[2][best],
        tested[1][best] / tested[2][best],
        lrs[best],
        chosen[0][best] / chosen[2][best],
    )


def _counts(
    probe: SGDProbe, data: Features, rows: Tensor | None, standardize: Standardizer
) -> list[list[int]]:
    """Numbers of ``rows`` (default: all) correct at top-1, correct at top-5, and in total, by learning rate and over
    all ranks."""
    counts = torch.zeros(3, len(probe.weight), dtype=torch.int64, device=data.device)
    for x, label in data.chunks(rows):
        logits = probe.logits(standardize(x))
        for i, k in enumerate((1, 5)):
            counts[i] += within_top(logits, label, k).sum(1)
        counts[2] += len(label)
    return all_reduce_sum(counts).tolist()


class SGDSchedule(NamedTuple):
    """Length of linear evaluation."""

    epochs: int
    steps: int  # per epoch
    batch: (
        int  # samples per step, over all ranks; the learning rates are for ``BATCH`` and grow in proportion
    )


def sgd_schedule(samples: int, *, brief: bool = False) -> SGDSchedule:
    """Length of linear evaluation on ``samples`` samples; ``brief``: one epoch."""
    batch = BATCH * max(1, -(-EPOCHS * samples // (BATCH * MOST_STEPS)))
    steps = -(-samples // batch)
    return SGDSchedule(1 if brief else max(EPOCHS, -(-STEPS // steps)), steps, batch)


@torch.no_grad()
def sgd_evaluation(
    task: Task, cfg: ProbeConfig, *, seed: int, report: Report = unseen, brief: bool = False
) -> SGDResult:
    """Train on extracted features, standardised with the statistics of the training set, and test once.

    The order is a function of (seed, epoch, sample_id), so each step has the same samples for any number of ranks.
    Non-finite training samples are skipped; non-finite held-out and test samples count as wrong. If no training
    samples remain, the accuracy is 0. The rate in the result is that of ``cfg``, before it grows with the batch (see
    :func:`sgd_schedule`). ``brief`` trains for one epoch, for dry runs. Collective.
    """
    train = task.train
    fit, total = rows_to_learn(task)
    if total == 0:
        return SGDResult(0.0, 0.0, min(cfg.lrs), 0.0)
    all_ids = _of_all_ranks(train.sample_id[fit])
    standardize = standardizer(train, fit)
    epochs, steps, batch = sgd_schedule(total, brief=brief)
    ends = torch.tensor([len(part) for part in torch.arange(total).tensor_split(steps)]).cumsum(0)
    ends = ends.to(fit.device)  # end of each step in the order of an epoch
    probe = SGDProbe(task.classes, train.x.shape[1], cfg, device=fit.device, running=False)
    for epoch in range(epochs):
        stream = key(PROBE, seed, epoch)
        place = torch.searchsorted(
            hash64(stream, all_ids).sort().values, hash64(stream, train.sample_id[fit])
        )
        place, order = place.sort()  # positions of this rank's samples in the order of the epoch
        sizes = torch.bincount(torch.searchsorted(ends, place, right=True), minlength=steps).tolist()
        for i, (x, y) in enumerate(train.chunks(fit[order], sizes)):
            # Standardised per batch, because a copy of all features would double their memory.
            probe.accumulate(standardize(x), y, torch.zeros_like(y, dtype=torch.bool))
            probe.start(batch / BATCH * 0.5 * (1 + cos(pi * (epoch * steps + i) / (epochs * steps))))
        report((epoch + 1) / epochs)
    probe.finish()
    return choose(probe, task, standardize)


def _of_all_ranks(sample_id: Tensor) -> Tensor:
    """The ids (N,) of all ranks, which may have different numbers of them, in no particular order."""
    if world_size() == 1:
        return sample_id
    sizes = gather_detached(torch.tensor([len(sample_id)], device=sample_id.device)).tolist()
    padded = torch.cat([sample_id, sample_id.new_zeros(max(sizes) - len(sample_id))])
    shares = gather_detached(padded).view(len(sizes), -1)
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])
