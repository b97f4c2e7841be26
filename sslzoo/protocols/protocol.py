"""What a protocol of linear evaluation is, and where protocols come from. Importable without torch.

A protocol is registered as an entry point in the group ``sslzoo.protocols``. Those of a paper belong to the package of
its method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sslzoo.checks import require
from sslzoo.recipe.registry import protocol
from sslzoo.recipe.sections import PlainView, ProbeConfig, ViewConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sslzoo.evaluate.progress import Report
    from sslzoo.evaluate.task import Task
    from sslzoo.method import SSLMethod

    Layers = Callable[[Tensor], Mapping[str, Tensor]]  # images (N, C, H, W) -> features (N, F) by name

Schedule = Literal["cosine", "cosine_by_epoch", "linear", "steps", "constant"]


class Best(NamedTuple):
    """The highest of several accuracies on the test set, hence an optimistic one."""

    top1: float
    top5: float
    epoch: int  # after which it was measured, counted from 1
    classifier: str  # which one, if there are several


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """The result of a protocol on one data set. Accuracies are fractions of the test images."""

    top1: float  # after the last step
    top5: float
    classifier: str  # the rate, and the layers if there is a choice
    held_out_top1: float | None  # of the same classifier, chosen by it; None: nothing was chosen
    best: Best | None  # over test epochs or classifiers; None if the test set was read once
    n_train: int
    n_held_out: int
    n_test: int
    n_unreadable: int
    adapted: tuple[str, ...] = ()  # how the protocol was adapted to recipe and data, one sentence each


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Base of all protocols."""

    name: str
    source: str  # whose it is: paper, code and file
    summary: str  # in a line, for tables
    remarks: str = ""  # what else to know about its figures
    reported: Literal["last", "best"] = "last"  # the figure that its authors report: see LinearResult


@dataclass(frozen=True, kw_only=True)
class FeatureProtocol(Protocol):
    """A classifier of features of plain images, which are computed once."""

    evaluate: Callable[[Task, ProbeConfig, int, Report], LinearResult]  # of task, probe, seed, report


@dataclass(frozen=True, kw_only=True)
class ViewProtocol(Protocol):
    """Linear classifiers of features of augmented views, which are computed anew in every epoch.

    There is one classifier for each learning rate and each kind of features; all are trained at once. The loss is the
    cross-entropy, and steps, order and views are functions of seed, epoch and sample.
    """

    view: ViewConfig  # of training images
    plain: PlainView  # of test images
    batch_norm: Literal["eval", "train"] = "eval"  # of the encoder while the classifiers are trained
    initial: Literal["normal", "zeros", "default"]  # N(0, 0.01) and no bias; zeros; as torch.nn.Linear
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    lrs: tuple[float, ...]
    lr_scaling: Literal["linear", "none"]  # linear: lr * batch / 256
    schedule: Schedule
    milestones: tuple[int, ...] = ()  # of steps: epochs after which the rate is multiplied by gamma
    gamma: float = 0.1
    batch_size: int  # images per step, over all processes
    keep_last: bool  # whether the last partial batch of an epoch is a step, too
    epochs: int
    iterations: Mapping[str, int] = field(default_factory=dict)  # steps instead of epochs, by data set
    test_epochs: int | None = None  # epochs between two tests; None: one test, after the last step
    held_out: bool = False  # the classifier is chosen on held-out training images, from which none learns
    # Named features of an encoder; None: its output.
    layers: Callable[[nn.Module], Layers] | None = None
    # The encoder of a method that has several backbones; None: whatever is evaluated.
    encoder: Callable[[SSLMethod[Any]], nn.Module] | None = None

    def __post_init__(self) -> None:
        require(len(self.lrs) > 0, f"protocol {self.name}: lrs must not be empty")
        require(
            self.optimizer == "sgd" or not self.nesterov,
            f"protocol {self.name}: nesterov is an option of sgd",
        )
        several = len(self.lrs) > 1 or self.layers is not None
        require(
            self.held_out or not several,
            f"protocol {self.name}: several classifiers need held_out=True, by which one is chosen",
        )
        require(
            (self.schedule == "steps") == bool(self.milestones),
            f"protocol {self.name}: schedule steps needs milestones, and no other does",
        )
        require(
            self.reported == "last" or self.test_epochs is not None or several,
            f"protocol {self.name}: reported=best needs test_epochs",
        )

    def rate_factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The learning rate in ``step`` (from 0), relative to the first one."""
        epoch = step // steps_per_epoch
        if self.schedule == "cosine":
            return (1 + cos(pi * step / total_steps)) / 2
        if self.schedule == "cosine_by_epoch":
            return (1 + cos(pi * epoch / self.epochs)) / 2
        if self.schedule == "linear":
            return 1 - step / total_steps
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


def protocol_named(name: str) -> Protocol:
    """The protocol registered as ``name``, or ``module:attribute``. ``ValueError`` suggests the closest name."""
    found = protocol(name)
    require(isinstance(found, Protocol), f"{name} is no protocol of linear evaluation, but {found!r}")
    return found
