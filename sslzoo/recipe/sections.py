"""The typed sections of a recipe. Plain dataclasses: importing this file costs no torch.

A number that recipes vary has no default here and stands in every recipe. A structural constant
has its default here and stands in no recipe. Ranges are checked in ``__post_init__``, whose
``ConfigError`` names the field; who reads the recipe adds the path to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sslzoo.checks import ConfigError, check_field, check_positive, did_you_mean, one_of
from sslzoo.recipe.class_lists import CLASS_LISTS


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config. ``name`` is the method's registered name, or ``module:Class``."""

    RENAMED: ClassVar[
        Mapping[str, str]
    ] = {}  # keys of earlier versions, dotted below the section: what to use now

    name: str

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Names of the features that the method publishes, in training and of plain views: ``probe.layers`` chooses
        among them."""
        return ("backbone",)

    def check(self, recipe: Recipe) -> None:
        """Raise ``ConfigError``, with the key as the recipe has it, where this method cannot do what the rest of
        ``recipe`` asks."""


OutputNorm = Literal["none", "batch", "batch_no_affine", "batch_no_shift"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projector or predictor: linear layers with ReLU between them (see ``sslzoo.nn.heads.build_head``)."""

    widths: tuple[int, ...]  # of the layers' outputs, embedding last
    hidden_norm: bool = True  # batch norm before each ReLU
    hidden_bias: bool = False  # a bias before those norms too; without norms there always is one
    output_norm: OutputNorm = "none"  # batch_no_affine: no scale, no shift; batch_no_shift: shift frozen at 0
    output_bias: bool = True

    def __post_init__(self) -> None:
        check_field(
            len(self.widths) > 0, "widths", "must hold at least the embedding width, such as [2048, 128]"
        )
        check_positive(self, "widths")
        check_field(
            self.hidden_norm or len(self.widths) > 1,
            "hidden_norm",
            "must be true with one width: there is no hidden layer",
        )
        check_field(
            not self.hidden_bias or (self.hidden_norm and len(self.widths) > 1),
            "hidden_bias",
            "must be false without a norm before each ReLU: hidden layers then have a bias anyway, if there are any",
        )


# Crops that pass a network at once, and share the statistics of its batch norms: see sslzoo.nn.passes.
CropBatching = Literal["per_crop", "per_resolution", "joint"]

STEMS = ("imagenet", "small", "cifar")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which encoder: ``resnet18`` (torchvision), ``timm/vit_small_patch16_224``, ``conv5`` (ours)."""

    name: str
    stem: str = "imagenet"  # small: 3x3 stride 1, max-pool kept; cifar: and max-pool removed
    in_channels: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # constructor arguments, as the library names them

    def __post_init__(self) -> None:
        one_of("stem", self.stem, STEMS)
        check_field(self.in_channels > 0, "in_channels", f"must be positive, got {self.in_channels}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of images on disk (or embedded), with or without labels."""

    dataset: str
    root: str = ""  # not needed by embedded data
    split: str = "train"
    classes: str | tuple[str, ...] = ()  # to keep, in label order, or a known list's name; empty keeps all

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) and self.classes not in CLASS_LISTS:
            hint = did_you_mean(self.classes, CLASS_LISTS)
            raise ConfigError(
                "classes",
                f"no list of classes {self.classes!r}{hint} (known: {', '.join(CLASS_LISTS)}; "
                f"for this class alone write [{self.classes}])",
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes to keep, in label order; empty keeps all."""
        return CLASS_LISTS[self.classes].names if isinstance(self.classes, str) else self.classes


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """The training images and how they are fed."""

    global_batch_size: int  # samples per optimiser step, over all devices and accumulated micro-batches
    # Per channel, images in [0, 1]. A recipe that leaves both out, or null, takes them from its data set.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int = 0  # processes per device that decode files; images in memory need none
    max_bad_fraction: float = 0.01  # of the data set; more unreadable images than this stop the run

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            self.global_batch_size > 1,
            "global_batch_size",
            f"must be at least 2, got {self.global_batch_size}",
        )
        check_field(
            len(self.mean) == len(self.std) > 0 and all(s > 0 for s in self.std),
            "std",
            f"must hold one positive number for each of data.mean={list(self.mean)}, got {list(self.std)}",
        )
        check_field(self.workers >= 0, "workers", f"must not be negative, got {self.workers}")
        check_field(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            f"must lie in [0, 1], got {self.max_bad_fraction}",
        )


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """``count`` crops drawn from one policy. An operation that is not stated is not applied.

    Order: random resized crop, colour jitter, grayscale, blur, solarise, flip, normalise.
    """

    size: int  # pixels, square
    scale: tuple[float, float]  # range of the crop's area, as a fraction of the image
    role: str = "global"  # or local: seen by the online branch only
    count: int = 1
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"  # or bicubic; both antialiased
    flip_p: float = 0.0
    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_p: float = 0.0
    blur_p: float = 0.0
    blur_kernel: int = 23  # taps, odd
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        one_of("role", self.role, ("global", "local"))
        one_of("interpolation", self.interpolation, ("bilinear", "bicubic"))
        check_positive(self, "size", "count")
        check_field(
            0 < self.scale[0] <= self.scale[1] <= 1,
            "scale",
            f"must satisfy 0 < low <= high <= 1, got {self.scale}",
        )
        check_field(
            0 < self.ratio[0] <= self.ratio[1], "ratio", f"must satisfy 0 < low <= high, got {self.ratio}"
        )
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            check_field(0 <= getattr(self, name) <= 1, name, f"is a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            check_field(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")
        check_field(0 <= self.hue <= 0.5, "hue", f"must lie in [0, 0.5], got {self.hue}")
        check_field(self.blur_kernel % 2 == 1, "blur_kernel", f"must be odd, got {self.blur_kernel}")
        check_field(
            0 < self.blur_sigma[0] <= self.blur_sigma[1],
            "blur_sigma",
            f"must be positive, got {self.blur_sigma}",
        )


OPTIMIZERS = ("lars", "sgd", "adamw", "adam")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule; epochs are fractional, steps are derived from them."""

    name: str
    lr: float  # before scaling with the global batch
    lr_scaling: str  # linear: lr * batch / 256; sqrt: lr * sqrt(batch); none
    weight_decay: float
    warmup_epochs: float
    schedule: str = "cosine"  # cosine | constant | step
    warmup_ramp: str = "closed"  # closed: s/(W-1); open: s/W; shifted: (s+1)/(W+1)
    warmup_start_lr: float = 0.0  # absolute, not scaled
    min_lr: float = 0.0  # absolute, not scaled
    milestones: tuple[int, ...] = ()  # epochs, for schedule: step
    gamma: float = 0.1  # factor at each milestone
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    decay_1d: bool = False  # weight decay on biases and norm parameters too (LARS never does)
    trust_coefficient: float = 0.001  # LARS
    clip_trust: bool = False  # LARS: never step further than plain SGD would

    def __post_init__(self) -> None:
        one_of("name", self.name, OPTIMIZERS)
        one_of("lr_scaling", self.lr_scaling, ("linear", "sqrt", "none"))
        one_of("schedule", self.schedule, ("cosine", "constant", "step"))
        one_of("warmup_ramp", self.warmup_ramp, ("closed", "open", "shifted"))
        check_field(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        check_field(self.weight_decay >= 0, "weight_decay", f"must not be negative, got {self.weight_decay}")
        check_field(
            self.warmup_epochs >= 0, "warmup_epochs", f"must not be negative, got {self.warmup_epochs}"
        )
        check_field(0 <= self.momentum < 1, "momentum", f"must lie in [0, 1), got {self.momentum}")
        check_field(
            (self.schedule == "step") == bool(self.milestones),
            "milestones",
            "goes with optim.schedule=step, and that schedule needs them",
        )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probes trained beside the method on detached features, several learning rates at once."""

    lrs: tuple[float, ...]  # all are trained; the best on held-out training labels is reported
    holdout: float = 0.1  # fraction of the training labels kept for that choice
    momentum: float = 0.9
    weight_decay: float = 0.0
    layers: tuple[str, ...] = ("backbone",)  # names that the method publishes
    data: tuple[SourceConfig, ...] = ()  # labelled data elsewhere; empty: the training data's own labels

    def __post_init__(self) -> None:
        check_field(
            len(self.lrs) > 0 and all(lr > 0 for lr in self.lrs),
            "lrs",
            f"must be positive, got {self.lrs}",
        )
        check_field(0 < self.holdout < 1, "holdout", f"must lie in (0, 1), got {self.holdout}")
        check_field(len(self.layers) > 0, "layers", "must name at least one layer, such as backbone")


PCA_WIDTH = 64  # principal components of the pixels that the final evaluation measures


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how frozen features are measured while training and at its end."""

    every_epochs: int  # and always after the last
    size: int  # pixels of the square that the encoder sees
    knn_k: int
    knn_temperature: float
    resize: int = 0  # shorter side before the centre crop of ``size``; 0: the image is used as it is
    batch_size: int = 256  # per device
    bank_size: int = 0  # training samples in the k-NN bank and the probe's held-out part; 0: all
    test_split: str = "test"
    baselines: bool = False  # the final table also shows raw pixels, their PCA and random initialisation

    def __post_init__(self) -> None:
        check_field(self.every_epochs > 0, "every_epochs", f"must be positive, got {self.every_epochs}")
        check_field(self.knn_k > 0, "knn_k", f"must be positive, got {self.knn_k}")
        check_field(
            self.knn_temperature > 0, "knn_temperature", f"must be positive, got {self.knn_temperature}"
        )
        check_field(
            self.resize == 0 or self.resize >= self.size,
            "resize",
            f"must be 0 or at least eval.size={self.size}, got {self.resize}",
        )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; ``auto`` is online where a login exists and offline elsewhere."""

    project: str = "sslzoo"
    entity: str = ""
    mode: str = "auto"  # auto | online | offline
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("auto", "online", "offline"))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """``metrics.csv`` is always written; the rest by choice."""

    every_steps: int = 50  # optimiser steps between rows
    checkpoint_every_steps: int = 500  # optimiser steps between saves; epoch ends are saved too
    keep_epochs: tuple[int, ...] = ()  # epochs whose checkpoint is kept for good
    tensorboard: bool = False
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        check_field(self.every_steps > 0, "every_steps", f"must be positive, got {self.every_steps}")
        check_field(
            self.checkpoint_every_steps > 0,
            "checkpoint_every_steps",
            f"must be positive, got {self.checkpoint_every_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Base of every analysis's config. ``name`` is its registered name, or ``module:Class``.

    A field of a subclass is an option of ``sslzoo analyze`` too; its metadata may say ``help``, ``metavar``, and
    ``option`` where that is called differently.
    """

    name: str
    every_steps: int = 100  # optimiser steps between two looks while a method trains

    def __post_init__(self) -> None:
        check_positive(self, "every_steps")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One complete experiment."""

    seed: int
    backbone: BackboneConfig
    method: MethodConfig
    data: DataConfig
    views: tuple[ViewConfig, ...]
    optim: OptimConfig
    probe: ProbeConfig
    eval: EvalConfig
    trainer: dict[str, Any]  # to lightning.Trainer as it is
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    analyses: tuple[AnalysisConfig, ...] = ()
    name: str = "unnamed"  # the file's stem

    def __post_init__(self) -> None:
        names = [analysis.name for analysis in self.analyses]  # what they log and remember goes by these
        for i, name in enumerate(names):
            check_field(
                name not in names[:i], f"analyses.{i}.name", f"{name} stands in the list twice; keep one"
            )
        self.method.check(self)

    @property
    def crops(self) -> int:
        """Views of each image."""
        return sum(view.count for view in self.views)

    @property
    def global_crops(self) -> int:
        """Those of them with the role ``global``."""
        return sum(view.count for view in self.views if view.role == "global")

    @property
    def max_epochs(self) -> int:
        """The length of the run."""
        return self.trainer["max_epochs"]

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimiser step."""
        return self.trainer.get("accumulate_grad_batches", 1)

    @property
    def nodes(self) -> int:
        """Machines."""
        return int(self.trainer.get("num_nodes", 1))

    @property
    def devices(self) -> int | None:
        """Processes on each machine. None: as many as it has GPUs."""
        devices = self.trainer.get("devices", "auto")
        if isinstance(devices, str) and "," in devices:
            devices = [device for device in devices.split(",") if device.strip()]
        if devices in ("auto", -1, "-1"):
            return 1 if self.trainer.get("accelerator") == "cpu" else None
        count = str(len(devices) if isinstance(devices, list) else devices)
        check_field(
            count.isdigit() and int(count) > 0,
            "trainer.devices",
            f"must be a number of devices, a list of their indices or auto, got {devices!r}",
        )
        return int(count)
