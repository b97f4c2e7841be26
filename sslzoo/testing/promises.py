"""The promises that methods make, and the check of each promise."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.batch import Batch
from sslzoo.checkpoints import latest, load_checkpoint
from sslzoo.checks import ConfigError, listed
from sslzoo.method import SSLMethod
from sslzoo.nn.per_sample import tables_of
from sslzoo.nn.queue import FeatureQueue
from sslzoo.recipe.sections import LoggingConfig, Recipe
from sslzoo.run.build import build_experiment
from sslzoo.testing import kills
from sslzoo.testing.course import Course, train
from sslzoo.testing.pretend import PretendedGPU, pretend
from sslzoo.testing.ranks import RankFailed, run_ranks
from sslzoo.testing.small import small_images

N = 8  # samples of a single batch
WORLDS = (2, 3)
# Tolerance for float64 results computed in a different order, relative to the largest entry of a tensor. It allows
# intermediate float32 computations; a wrong factor or a missing term exceeds it by far.
SAME = 1e-5


class Broken(Exception):
    """A promise is broken: what was found, and what to do about it."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}; {advice}")
        self.found, self.advice = found, advice


class NotTried(Exception):
    """A promise cannot be tested with this recipe; the message says why."""


@dataclass(frozen=True)
class Promise:
    """A promise of the contract. ``check`` raises :class:`Broken` or :class:`NotTried`; it may return a remark."""

    name: str
    words: str
    check: Callable[[Recipe, Path], str]


PROMISES: dict[str, Promise] = {}


def _promise(
    name: str, words: str
) -> Callable[[Callable[[Recipe, Path], str]], Callable[[Recipe, Path], str]]:
    """Add a function to :data:`PROMISES`; it is called with a small recipe of the method and an empty folder."""

    def add(check: Callable[[Recipe, Path], str]) -> Callable[[Recipe, Path], str]:
        PROMISES[name] = Promise(name, words, check)
        return check

    return add


def _expect(condition: bool, found: str, advice: str) -> None:
    if not condition:
        raise Broken(found, advice)


def _built(recipe: Recipe) -> tuple[SSLMethod[Any], Batch]:
    """The method before its first step, and a batch."""
    built = build_experiment(recipe, source=small_images(recipe, 2))
    return built.method, built.data.example_batch(N)


def _placed(recipe: Recipe, *, world: int = 1, **trainer: Any) -> Recipe:
    """``recipe`` on ``world`` processes, with further trainer settings."""
    return replace(recipe, trainer=recipe.trainer | {"devices": world} | trainer)


def _refusal(recipe: Recipe) -> str:
    """Why the method refuses two micro-batches per step; empty if it accepts them."""
    try:
        _placed(recipe, accumulate_grad_batches=2)
    except ConfigError as error:
        return str(error)
    return ""


# -- one batch ------------------------------------------------------------------------------------


@_promise("publishing", "the loss is one finite number, and it publishes the features that probes read")
def publishes(recipe: Recipe, folder: Path) -> str:
    """Check the loss, and shapes and names of published features and recorded values."""
    method, batch = _built(recipe)
    loss = method.loss(batch)
    number = isinstance(loss, Tensor) and loss.shape == () and bool(loss.isfinite())
    shown = f"the tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.ndim else repr(loss)
    _expect(number, f"loss returns {shown}", "return the mean over this rank's samples, a scalar")
    published = method.published
    _expect(
        "backbone" in published,
        f"loss publishes {listed(list(published)) if published else 'nothing'}",
        "call self.publish(backbone=h) once, where h is the backbone's output for one view",
    )
    wrong = [
        f"{name} {tuple(layer.shape)}"
        for name, layer in published.items()
        if layer.ndim != 2 or len(layer) != N
    ]
    _expect(
        not wrong, f"loss publishes {listed(wrong)} for {N} images", "publish features (N, F) of one view"
    )
    width = published["backbone"].shape[1]
    _expect(
        width == method.feature_dim,
        f"the published backbone has {width} features, the encoder {method.feature_dim}",
        "publish the backbone's output, or pass its width to super().__init__",
    )
    _check_layers(method, published)
    misnamed = [name for name in (*method.recorded, *method.settings) if not name.startswith("method/")]
    _expect(not misnamed, f"recorded as {listed(misnamed)}", "begin the names of measurements with method/")
    return ""


def _check_layers(method: SSLMethod[Any], layers: dict[str, Tensor]) -> None:
    names, declared = sorted(layers), sorted(method.cfg.published_layers)
    _expect(
        names == declared,
        f"the published layers are {listed(names)}, but the config declares {listed(declared)}",
        "list in the config's published_layers what loss publishes and features returns",
    )


@_promise(
    "evaluation", "evaluation changes nothing, and an image's features do not depend on the rest of the batch"
)
def evaluates(recipe: Recipe, folder: Path) -> str:
    """Call ``features`` in evaluation mode with two batch sizes."""
    method, batch = _built(recipe)
    method.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    view = batch.global_views[0]
    with torch.no_grad():
        whole, part = method.features(view), method.features(view[:2])
    _check_layers(method, whole)
    changed = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    _expect(not changed, f"features changes {listed(changed)}", "change state only in loss or after_step")
    other = [name for name in whole if not torch.allclose(whole[name][:2], part[name], rtol=1e-3, atol=1e-5)]
    _expect(
        not other,
        f"{listed(other)} of two images differ when they are part of a batch of {N}",
        "compute the features of an image from that image only; module.eval() is called before",
    )
    return ""


@_promise("labels", "the loss does not depend on the labels")
def ignores_labels(recipe: Recipe, folder: Path) -> str:
    """Compare the loss with labels, with other labels, and without labels."""
    losses = []
    for change in (lambda label: label, lambda label: label.flip(0) + 1, lambda label: None):
        method, batch = _built(recipe)
        assert batch.label is not None
        torch.manual_seed(0)
        try:
            losses.append(method.loss(batch._replace(label=change(batch.label))).detach())
        except Exception as error:
            _expect(
                not losses,
                f"loss raises {type(error).__name__} without labels: {error}",
                "use only batch.global_views, batch.local_views and batch.sample_id",
            )
            raise
    _expect(
        torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2]),
        f"the loss is {losses[0]:.6g}, with other labels {losses[1]:.6g}, without labels {losses[2]:.6g}",
        "use only batch.global_views, batch.local_views and batch.sample_id",
    )
    return ""


@_promise("bf16", "under bf16 autocast loss and gradients are finite, and close to those in float32")
def bears_bf16(recipe: Recipe, folder: Path) -> str:
    """Compare loss and gradients of a batch under autocast with those in float32."""
    full, batch = _built(recipe)
    half, _ = _built(recipe)
    torch.manual_seed(0)
    expected = full.loss(batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = half.loss(batch)
    loss.backward()
    advice = (
        "compute similarities, softmax and logarithms in float32, with normalize() and autocast_off() from "
        "sslzoo.nn.numerics"
    )
    _expect(bool(loss.isfinite()), f"the loss is {loss.item()}, but {expected:.4g} in float32", advice)
    _expect(loss.dtype == torch.float32, f"the loss is {loss.dtype}", advice)
    spoilt = [n for n, p in half.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    _expect(not spoilt, f"the gradient of {listed(spoilt)} is not finite", advice)
    # bf16 has 8 bits of precision: features have errors of about 1 %, which a sharp loss amplifies.
    close = torch.allclose(loss, expected, rtol=0.1, atol=0.1)
    _expect(close, f"the loss is {loss:.4g}, but {expected:.4g} in float32", advice)
    return ""


# -- a few steps ----------------------------------------------------------------------------------


@_promise("gradients", "every trainable parameter gets a gradient")
def reaches_parameters(recipe: Recipe, folder: Path) -> str:
    """Train two steps in float64; every parameter must get a non-zero gradient or change."""
    names = [name for name, p in _built(recipe)[0].named_parameters() if p.requires_grad]
    course = train(replace(recipe, trainer=recipe.trainer | {"precision": "64-true"}), folder, steps=2)
    first, last = course.states[0], course.states[-1]
    reached = {n for gradients in course.gradients for n, value in gradients.items() if value.any()}
    reached |= {name for name in names if not torch.equal(first[name], last[name])}
    missed = [name for name in names if name not in reached]
    _expect(
        not missed,
        f"no gradient reaches {listed(missed)}",
        "use it in the loss, or call requires_grad_(False), because DDP waits for all gradients",
    )
    return ""


@_promise("seed", "the same seed gives the same numbers, whatever else uses random generators")
def is_seeded(recipe: Recipe, folder: Path) -> str:
    """Initialise and train two steps twice, with different states of the generators of torch, numpy and Python."""
    advice = (
        "draw random numbers as a function of position, not from a global generator: uniforms(key('mine: noise', "
        "self.seed, self.step), ids, n) from sslzoo.randomness"
    )
    courses: list[Course] = []
    for start in (1, 2):
        _move_generators(start)
        courses.append(train(recipe, folder / str(start), steps=2))
    for state, other in zip(*(course.states for course in courses), strict=True):
        differ = [name for name in state if not _equal(state[name], other[name])]
        when = "two builds give" if state is courses[0].states[0] else "two trainings give"
        _expect(not differ, f"{when} different values of {listed(differ)}", advice)
    losses, others = (torch.stack(course.losses) for course in courses)
    _expect(_equal(losses, others), "two trainings record different losses", advice)
    return ""


def _move_generators(start: int) -> None:
    random.seed(start)
    np.random.seed(start)  # noqa: NPY002 third-party methods may use it
    torch.manual_seed(start)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125))


@_promise("world-size", "1, 2 and 3 processes give the same loss, measurements, gradients and state")
def ignores_world_size(recipe: Recipe, folder: Path) -> str:
    """Compare two steps in float64, with synchronised batch norm and without dropout."""
    try:
        _synchronised(recipe, 1)
    except ConfigError as error:
        raise NotTried(f"this config refuses synchronised batch norm: {error}") from None
    compare_worlds({"": recipe}, folder)
    return ""


def compare_worlds(recipes: Mapping[str, Recipe], folder: Path, worlds: Sequence[int] = WORLDS) -> None:
    """Check the promise ``world-size`` for several small recipes, by name; each number of processes is started once.

    Raises :class:`Broken` at the first difference.
    """
    one = _courses(0, 1, recipes, folder)
    for world in worlds:
        try:
            parts = run_ranks(world, _courses, recipes, folder)
        except RankFailed as failed:
            raise Broken(
                f"{world} processes: {failed.reason}", "the method must train on several processes as on one"
            ) from failed
        for name in recipes:
            says = f"{name}, {world} processes:" if name else f"{world} processes:"
            _compare(says, one[name], [part[name] for part in parts])


def _courses(rank: int, world: int, recipes: Mapping[str, Recipe], folder: Path) -> dict[str, Course]:
    return {
        name: train(
            _synchronised(recipe, world),
            folder / f"{i}-{world}",
            steps=2,
            dropout=False,
        )
        for i, (name, recipe) in enumerate(recipes.items())
    }


def _synchronised(recipe: Recipe, world: int) -> Recipe:
    return _placed(recipe, world=world, sync_batchnorm=True, precision="64-true")


def _compare(says: str, one: Course, parts: Sequence[Course]) -> None:
    """Raise :class:`Broken` for the first difference: in a loss, then in a gradient, then in the state."""
    for step, expected in enumerate(one.losses):
        got = torch.stack([part.losses[step] for part in parts]).mean()
        _expect(
            _close(got, expected),
            f"{says} the loss of step {step + 1} is {_against(got, expected)} the {expected:.4g} of one process",
            "average over this rank's rows, compare them with those of all ranks (gather from sslzoo.distributed), "
            "draw random numbers by sample, and never multiply by the world size",
        )
        _check_measured(says, one.measured[step], [part.measured[step] for part in parts])
        _check_gradients(says, one.gradients[step], parts[0].gradients[step])
        for rank, part in enumerate(parts):
            state = part.states[step + 1]
            # Without the optimiser's state, which follows from gradients: Adam amplifies gradients near rounding level.
            differ = [
                name
                for name, value in one.states[step + 1].items()
                if not name.startswith("optimizer.") and not _close(state[name], value)
            ]
            _expect(
                not differ,
                f"{says} after step {step + 1} rank {rank} has different values of {listed(differ)}",
                "update state on every rank from the rows of all ranks: gather_detached from sslzoo.distributed",
            )


def _check_measured(says: str, one: dict[str, Tensor], several: Sequence[dict[str, Tensor]]) -> None:
    differ = [
        name
        for name, value in one.items()
        if not _close(torch.stack([part[name] for part in several]).mean(dim=0), value)
    ]
    _expect(
        not differ,
        f"{says} the loss is the same, but {listed(differ)} changes with the number of processes",
        "record means over this rank's images; for ratios and standard deviations, what ratio and moments from "
        "sslzoo.nn.measurements return",
    )


def _check_gradients(says: str, one: dict[str, Tensor], several: dict[str, Tensor]) -> None:
    largest = max((value.abs().max().item() for value in one.values()), default=0.0)
    # Gradients at rounding level, such as that of a bias before a batch norm, may differ in every digit.
    differ = [
        name for name, value in one.items() if not _close(several[name], value, atol=0.1 * SAME * largest)
    ]
    if not differ:
        return
    name = max(differ, key=lambda n: (several[n] - one[n]).abs().max().item())
    raise Broken(
        f"{says} the loss is the same, but the gradient of {name} is {_against(several[name], one[name])} that of "
        "one process",
        "gathered rows must propagate gradients: gather from sslzoo.distributed instead of gather_detached; DDP takes "
        "the mean over ranks, so never multiply by the world size",
    )


def _close(a: Tensor, b: Tensor, atol: float = 0.0) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = a[finite], b[finite]
    return not a.numel() or (a - b).abs().max().item() <= SAME * b.abs().max().item() + atol


def _against(got: Tensor, expected: Tensor) -> str:
    """The difference in words: a factor if that explains it, the number itself, or a relative error."""
    factor = (got * expected).sum() / (expected * expected).sum()
    if _close(got, factor * expected) and expected.numel() > 1:
        return f"{factor:.4g} times"
    if expected.numel() == 1:
        return f"{got:.4g} ({factor:.4g} times) instead of"
    off = ((got - expected).norm() / expected.norm()).item()
    return f"{100 * off:.2g} % off"


@_promise(
    "accumulation", "with gradient accumulation, state changes once per step (or the config refuses it)"
)
def accumulates(recipe: Recipe, folder: Path) -> str:
    """Check that the first micro-batch of a step changes nothing but batch-norm statistics and tables."""
    refusal = _refusal(recipe)
    if refusal:
        return f"refused: {refusal}"
    course = train(_placed(recipe, accumulate_grad_batches=2), folder, steps=2)
    _expect(
        len(course.skipped) == 2,
        f"{len(course.losses)} micro-batches led to {len(course.skipped)} optimiser steps instead of 2",
        "accumulate yourself, or refuse trainer.accumulate_grad_batches in check() of the config",
    )
    method, _ = _built(recipe)
    free = (*tables_of(method), *(n for n, m in method.named_modules() if isinstance(m, _BatchNorm)))
    before, between, after = course.states[:3]
    early = [
        name
        for name, value in before.items()
        if not _equal(value, between[name]) and not name.startswith(tuple(f"{module}." for module in free))
    ]
    _expect(
        not early,
        f"{listed(early)} changes in the middle of a step",
        "change it in after_step, from what loss has collected, or refuse trainer.accumulate_grad_batches",
    )
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    _expect(
        any(not torch.equal(before[name], after[name]) for name in trained),
        "no weight changes at the end of a step",
        "let Lightning take the step, or take it yourself at the last micro-batch",
    )
    return ""


@_promise(
    "not-finite",
    "a non-finite image corrupts neither state nor checkpoints, and fp16 skips that step entirely",
)
def survives_infinity(recipe: Recipe, folder: Path) -> str:
    """Train with a non-finite image, once with a loss scaler, in the last micro-batch of a step on the second of two
    processes, and once without."""
    accumulate = 1 if _refusal(recipe) else 2
    recipe = replace(recipe, logging=LoggingConfig(every_steps=2, checkpoint_every_steps=2))
    placed = _placed(recipe, world=2, accumulate_grad_batches=accumulate)
    spoilt = (_BAD + 1) * accumulate - 1
    try:
        course, _ = run_ranks(2, _with_infinity, placed, folder / "fp16", spoilt)
    except RankFailed as failed:
        raise Broken(
            f"in fp16 {failed.reason}", "a step that the scaler skips must not end the run"
        ) from failed
    _check_skipped(course, accumulate)
    alone = _placed(recipe)
    course = train(alone, folder / "fp32", steps=_STEPS, labelled=True, spoilt=(_BAD, 0))
    _check_ended(_built(alone)[0], course, folder / "fp32")
    return ""


_STEPS, _BAD = 5, 2  # number of optimiser steps, and the step with the non-finite image


def _with_infinity(rank: int, world: int, recipe: Recipe, folder: Path, spoilt: int) -> Course:
    return train(recipe, folder, steps=_STEPS, labelled=True, fp16=True, spoilt=(spoilt, 1))


def _check_skipped(course: Course, accumulate: int) -> None:
    """Check that the step was skipped without any effect, and that the run went on."""
    expected = [step == _BAD for step in range(_STEPS)]
    _expect(
        course.skipped == expected,
        f"in fp16 the steps {[i + 1 for i, skipped in enumerate(course.skipped) if skipped]} were skipped instead of "
        f"only step {_BAD + 1}",
        "state written in loss keeps non-finite values: write it in after_step, or to a PerSampleTable",
    )
    before, after = (course.states[step * accumulate] for step in (_BAD, _BAD + 1))
    changed = [name for name, value in before.items() if not _equal(value, after[name])]
    _expect(
        not changed,
        f"in fp16 the skipped step changes {listed(changed)}",
        "change it in after_step, which is not called for skipped steps",
    )
    spoilt = _spoilt(before, course.states[-1])
    _expect(
        not spoilt,
        f"in fp16 {listed(spoilt)} is not finite after later steps",
        "drop in after_skipped_step what loss has collected for after_step",
    )


def _check_ended(method: SSLMethod[Any], course: Course, folder: Path) -> None:
    """Check that the run ended, and that tables, queues and the newest checkpoint are finite."""
    _expect(
        course.diverged,
        "in float32 the run goes on after a loss that is not finite",
        "return the loss unchanged: the framework ends the run, and keeps the checkpoint before it",
    )
    before, after = course.states[_BAD], course.states[-1]
    tables = tuple(f"{name}." for name in tables_of(method))
    queues = tuple(f"{name}." for name, m in method.named_modules() if isinstance(m, FeatureQueue))
    changed = [n for n, value in before.items() if n.startswith(tables) and not _equal(value, after[n])]
    changed = changed if tables else []
    spoilt = [name for name in _spoilt(before, after) if queues and name.startswith(queues)]
    _expect(
        not (changed or spoilt),
        f"in float32 {listed([*changed, *spoilt])} stores non-finite values",
        "write rows with PerSampleTable.write or FeatureQueue.push, which skip those",
    )
    newest = latest(folder / "checkpoints")
    _expect(newest is not None, "there is no checkpoint from before", "do not write or delete checkpoints")
    assert newest is not None
    lost = _spoilt(before, load_checkpoint(newest)["state_dict"])
    _expect(
        newest.name == f"step={_BAD:09d}.ckpt" and not lost,
        f"the newest checkpoint, {newest.name}, has non-finite values of {listed(lost)}",
        "change state only in loss or after_step",
    )


def _spoilt(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of tensors with values that were finite before and are not any more."""
    return [
        name
        for name, value in before.items()
        if name in after and bool((value.isfinite() & ~after[name].isfinite()).any())
    ]


# -- a run ----------------------------------------------------------------------------------------


@_promise("resuming", "a run that is killed and resumed ends bit for bit like one that was never killed")
def resumes(recipe: Recipe, folder: Path) -> str:
    """Kill the run in the middle of an epoch, between two checkpoints, and again in the next epoch."""
    accumulate = 1 if _refusal(recipe) else 2
    recipe = _placed(recipe, max_epochs=2, accumulate_grad_batches=accumulate)
    job = kills.Job(recipe=recipe, samples=4 * recipe.data.global_batch_size)
    faults = [kills.Fault("batch", 4 * accumulate - 1), kills.Fault("start", 5 * accumulate)]
    try:
        whole = kills.start(job, folder / "whole")
        killed = kills.run(job, folder / "killed", faults)
        undisturbed = kills.finish(job, folder / "whole", whole)
    except kills.Failed as failed:
        raise Broken(failed.reason, "a run must start, and continue from its checkpoint") from failed
    differ = [part for part, digest in undisturbed.digest.items() if killed.digest.get(part) != digest]
    differ += [] if killed.metrics == undisturbed.metrics else ["metrics.csv"]
    _expect(
        not differ,
        f"the resumed run ends with different values of {listed(differ)}",
        "keep state that loss needs in buffers, parameters or on_save_checkpoint, and draw random numbers by "
        "self.step",
    )
    return ""


@_promise("gpu", "runs on a GPU without stray CPU tensors, and no training step makes the host wait for it")
def suits_a_gpu(recipe: Recipe, folder: Path) -> str:
    """Train on a pretended GPU, one of two, in a new run and a resumed run."""
    recipe = replace(recipe, logging=LoggingConfig(every_steps=4, checkpoint_every_steps=2))
    for stop_at in (2, None):
        gpu = PretendedGPU(2)
        try:
            pretend(gpu, recipe, small_images(recipe, 6), folder, stop_at=stop_at)
        except Exception:
            if (
                not gpu.broken()
            ):  # otherwise the error follows from an operation that a GPU would have refused
                raise
        for kind, what in (("mixed", "an operation on the GPU"), ("nccl", "a collective of GPUs")):
            places = gpu.places(kind)
            _expect(
                not places,
                f"{what} gets a CPU tensor at {listed(places, 2)}",
                "create tensors on the device of the other operands, with x.new_zeros(n) or torch.arange(n, "
                "device=x.device), or keep them in buffers",
            )
    waits = list(gpu.notes_of("step", 4).places["sync"])
    _expect(
        not waits,
        f"the host waits at {listed(waits, 2)}",
        "keep values on the device: pass tensors to record(), use torch.where instead of if, keep constants in buffers",
    )
    return ""
