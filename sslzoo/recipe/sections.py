"""The typed sections of a recipe, as plain dataclasses. Importable without torch.

Values that recipes tune have no default; every recipe must set them. Structural constants have their
default here and need not be set. ``__post_init__`` checks ranges and raises a ``ConfigError`` that names
the field; the code that reads the recipe adds the path of the section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sslzoo.checks import (
    ConfigError,
    check_field,
    check_fraction,
    check_not_negative,
    check_plugin_name,
    check_positive,
    did_you_mean,
)
from sslzoo.panels import Panel
from sslzoo.recipe.class_lists import CLASS_LISTS
from sslzoo.recipe.trainer_keys import stated_devices


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config. ``name`` is the method's registered name, or ``module:Class``."""

    RENAMED: ClassVar[
        Mapping[str, str]
    ] = {}  # old key -> the key that replaces it, both dotted and relative to the section
    panels: ClassVar[tuple[Panel, ...]] = ()  # how reports and dashboards show what the method records
    # True if the method needs second derivatives, which the framework's batch norm supports, and fused kernels,
    # checkpointed blocks and compiled code do not.
    needs_double_backward: ClassVar[bool] = False

    name: str

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Names of the features that the method publishes, in training as in evaluation; ``probe.layers`` must be
        among them."""
        return ("backbone",)

    def check(self, recipe: Recipe) -> None:
        """Raise ``ConfigError``, with the full dotted key, if this method is incompatible with the rest of
        ``recipe``."""


OutputNorm = Literal["none", "batch", "batch_no_affine", "batch_no_shift"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projector or predictor: linear layers with ReLU between them (see ``sslzoo.nn.heads.build_head``)."""

    widths: tuple[int, ...]  # output width of each layer; the last is the embedding's
    hidden_norm: bool = True  # batch norm before each ReLU
    hidden_bias: bool = False  # hidden layers have a bias even before a norm; without norms they always do
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


# Which crops go through a network in one forward pass and so share batch-norm statistics; see sslzoo.nn.passes.
CropBatching = Literal["per_crop", "per_resolution", "joint"]


PRETRAINED = "pretrained"
# Constructor arguments with which torchvision and timm would load weights themselves.
LIBRARIES_WEIGHTS = ("weights", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The encoder: ``resnet18`` (torchvision), ``timm/vit_small_patch16_224``, ``conv5`` (ours), ``module:Class``."""

    name: str
    stem: Literal["imagenet", "small", "cifar"] = (
        "imagenet"  # small: 3x3 convolution, stride 1; cifar: the same, and no max-pool
    )
    in_channels: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # passed on to the library's constructor
    weights: str | None = None  # initial weights: pretrained (those of the library) or a file; None: random

    def __post_init__(self) -> None:
        check_plugin_name(self.name, "name")
        check_positive(self, "in_channels")
        check_field(
            self.stem == "imagenet" or not (self.name == "conv5" or ":" in self.name),
            "stem",
            f"must be left out: {self.name} has its own stem",
        )
        check_field(
            self.name != "conv5" or not self.options, "options", "must be left out: conv5 has no options"
        )
        self._check_weights()

    def _check_weights(self) -> None:
        without_library = self.name == "conv5" or ":" in self.name
        for key in LIBRARIES_WEIGHTS:
            check_field(
                without_library or key not in self.options,
                f"options.{key}",
                f"must be left out; set backbone.weights to {PRETRAINED} or a file instead",
            )
        check_field(
            self.weights != "", "weights", f"must be {PRETRAINED}, a file, or null for random weights"
        )
        if self.weights == PRETRAINED:
            check_field(
                not without_library,
                "weights",
                f"must be a file, or left out: {self.name} has no published weights",
            )
            check_field(
                self.stem == "imagenet",
                "stem",
                f"must be imagenet with weights {PRETRAINED}, which have that first convolution",
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of images on disk (or embedded), with or without labels."""

    dataset: str
    root: str = ""  # folder of the files; embedded data sets need none
    split: str = "train"
    classes: str | tuple[str, ...] = ()  # to keep, in label order, or the name of a class list; empty: all

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) and self.classes not in CLASS_LISTS:
            hint = did_you_mean(self.classes, CLASS_LISTS)
            raise ConfigError(
                "classes",
                f"unknown class list {self.classes!r}{hint} (known: {', '.join(CLASS_LISTS)}; "
                f"for this class alone write [{self.classes}])",
            )
        names = self.class_names
        check_field(len(set(names)) == len(names), "classes", "must list each class once")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes to keep, in label order; empty: all."""
        return CLASS_LISTS[self.classes].names if isinstance(self.classes, str) else self.classes


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """The training images and how they are fed."""

    global_batch_size: int  # samples per optimiser step, over all devices and accumulated micro-batches
    # Per channel, for images in [0, 1]. If a recipe omits both or sets both to null, the data set's are used.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int = 0  # processes per device that decode image files; images in memory need none
    # Where colour, blur, solarisation and flip are applied to crops of image files: by the data workers to one after
    # the other, or on the device to a batch. None: by the workers if the device is a CPU.
    augment_on: Literal["worker", "device"] | None = None
    max_bad_fraction: float = 0.01  # the run stops if a larger fraction of the images is unreadable
    timeout: float = 300.0  # seconds without a batch from the workers that stop the run, also in evaluation

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
        check_not_negative(self, "workers")
        check_fraction(self, "max_bad_fraction")
        check_field(
            0 < self.timeout < 600,
            "timeout",
            f"must lie between 0 and 600, when other processes give up waiting; got {self.timeout}",
        )


# Key of an operation's probability -> its parameters, and a phrase for error messages: what probability 0 means.
_OPERATIONS = {
    "jitter_p": (("brightness", "contrast", "saturation", "hue"), "never jitters"),
    "blur_p": (("blur_kernel", "blur_sigma"), "never blurs"),
    "solarize_p": (("solarize_threshold",), "never solarises"),
}
_COLOURS = ("saturation", "hue", "grayscale_p")  # meaningless for single-channel images


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """``count`` crops drawn from one augmentation policy. An operation that is not set is not applied.

    Order: random crop, colour jitter, grayscale, blur, solarise, flip, normalise. The crop has a random area within
    ``scale`` and is resized to ``size``; with ``padding`` instead, it is cut from the padded image without resizing.
    """

    size: int  # pixels, square
    scale: tuple[float, float] | None = None  # range of the crop's area, as a fraction of the image
    padding: int | None = None  # black pixels added to each side of the image before a crop without resizing
    role: Literal["global", "local"] = "global"  # local: only the online branch sees it
    count: int = 1
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # both antialiased
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
        check_positive(self, "size", "count", "scale", "ratio", "blur_sigma")
        check_not_negative(self, "padding")
        self._check_crop()
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self, name)
            check_field(low <= high, name, f"must satisfy 0 < low <= high, got {(low, high)}")
        check_fraction(self, "flip_p", "grayscale_p", "solarize_threshold", *_OPERATIONS)
        check_not_negative(self, "brightness", "contrast", "saturation")
        check_field(0 <= self.hue <= 0.5, "hue", f"must lie in [0, 0.5], got {self.hue}")
        check_field(
            self.blur_kernel % 2 == 1 and self.blur_kernel > 1,
            "blur_kernel",
            f"must be odd and at least 3, got {self.blur_kernel}",
        )
        for chance, (numbers, idle) in _OPERATIONS.items():
            changed = self._changed(*numbers) if getattr(self, chance) == 0 else []
            if changed:
                others = f"; so must {', '.join(changed[1:])}" if len(changed) > 1 else ""
                stay = f"must stay {getattr(ViewConfig, changed[0])} with {chance}=0, which {idle}{others}"
                raise ConfigError(changed[0], stay)
        check_field(
            self.jitter_p == 0 or bool(self._changed(*_OPERATIONS["jitter_p"][0])),
            "jitter_p",
            f"must be 0 without brightness, contrast, saturation or hue, got {self.jitter_p}",
        )

    def _check_crop(self) -> None:
        if self.padding is not None:
            for name in self._changed("scale", "ratio", "interpolation"):
                raise ConfigError(name, "must be left out with padding, which cuts a crop without resizing")
            return
        if self.scale is None:
            raise ConfigError("scale", "missing key; a view needs it, such as [0.2, 1.0], or padding")
        check_field(
            self.scale[0] <= self.scale[1] <= 1,
            "scale",
            f"must satisfy 0 < low <= high <= 1, got {self.scale}",
        )

    def _changed(self, *names: str) -> list[str]:
        """The given fields whose value differs from the default."""
        return [name for name in names if getattr(self, name) != getattr(ViewConfig, name)]

    def check_channels(self, channels: int, at: str) -> None:
        """Refuse colour operations on images without colour; ``at`` is the view's key in the recipe."""
        for name in self._changed(*_COLOURS, *(["contrast"] if channels > 1 else [])):
            check_field(
                channels == 3,
                f"{at}.{name}",
                f"must be 0 with backbone.in_channels={channels}: it needs RGB images",
            )


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Half a cosine period from the peak down to ``min_lr`` at the last step."""

    name: Literal["cosine"] = "cosine"
    min_lr: float = 0.0  # absolute, not scaled with the batch size

    def __post_init__(self) -> None:
        check_not_negative(self, "min_lr")


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """The peak rate until the end."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The peak, multiplied by ``gamma`` at each of the ``milestones``."""

    name: Literal["step"] = "step"
    milestones: tuple[int, ...]  # epochs
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_field(
            len(self.milestones) > 0 and list(self.milestones) == sorted(set(self.milestones)),
            "milestones",
            f"must be increasing epochs, got {list(self.milestones)}",
        )
        check_positive(self, "milestones", "gamma")
        check_field(self.gamma != 1, "gamma", "must not be 1, which changes nothing; use schedule: constant")


@dataclass(frozen=True, kw_only=True)
class _OptimConfig:
    """Settings common to all optimisers. Epochs may be fractional and are converted to steps."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "min_lr": "schedule.min_lr",
        "milestones": "schedule.milestones",
        "gamma": "schedule.gamma",
    }

    name: str
    lr: float  # before scaling with the global batch size
    lr_scaling: Literal["linear", "sqrt", "none"]  # linear: lr * batch / 256; sqrt: lr * sqrt(batch)
    weight_decay: float
    warmup_epochs: float
    warmup_ramp: Literal["closed", "open", "shifted"] = "closed"  # s/(W-1), s/W, (s+1)/(W+1)
    warmup_start_lr: float = 0.0  # absolute, not scaled with the batch size
    schedule: CosineSchedule | ConstantSchedule | StepSchedule = CosineSchedule()

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_not_negative(self, "weight_decay", "warmup_epochs", "warmup_start_lr")
        for name in ("warmup_ramp", "warmup_start_lr"):
            default = getattr(_OptimConfig, name)
            check_field(
                self.warmup_epochs > 0 or getattr(self, name) == default,
                name,
                f"must stay {default} with warmup_epochs=0, got {getattr(self, name)}",
            )


@dataclass(frozen=True, kw_only=True)
class LARSConfig(_OptimConfig):
    """LARS; biases and norm parameters get neither weight decay nor the trust ratio."""

    name: Literal["lars"] = "lars"
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    clip_trust: bool = False  # cap the step at that of plain SGD

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum)
        check_positive(self, "trust_coefficient")


@dataclass(frozen=True, kw_only=True)
class SGDConfig(_OptimConfig):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    decay_1d: bool = False  # weight decay on biases and norm parameters too

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum)
        check_field(self.momentum > 0 or not self.nesterov, "nesterov", "must be false with momentum=0")
        _check_decay_1d(self)


@dataclass(frozen=True, kw_only=True)
class AdamConfig(_OptimConfig):
    """Adam (weight decay added to the gradient) or AdamW (decoupled weight decay)."""

    name: Literal["adam", "adamw"]
    betas: tuple[float, float] = (0.9, 0.999)
    decay_1d: bool = False  # weight decay on biases and norm parameters too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            all(0 <= b < 1 for b in self.betas), "betas", f"must lie in [0, 1), got {list(self.betas)}"
        )
        _check_decay_1d(self)


OptimConfig = LARSConfig | SGDConfig | AdamConfig


def _check_momentum(momentum: float) -> None:
    check_field(0 <= momentum < 1, "momentum", f"must lie in [0, 1), got {momentum}")


def _check_decay_1d(config: SGDConfig | AdamConfig) -> None:
    check_field(
        config.weight_decay > 0 or not config.decay_1d, "decay_1d", "must be false with weight_decay=0"
    )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probes: the data that they learn from, and the settings of those trained by SGD."""

    holdout: float = 0.1  # fraction of the training labels kept to choose the L2 strength or the rate
    train_size: int | None = None  # training samples to learn from, held-out ones included; None: all
    layers: tuple[str, ...] = ("backbone",)  # features to probe, by the names that the method publishes
    data: tuple[SourceConfig, ...] = ()  # other labelled data sets; empty: the labels of the training data
    online: bool = (
        False  # also train a probe by SGD alongside the method, on the augmented views of its steps
    )
    # Settings of that probe, and of linear evaluation by SGD in the final table (eval.baselines).
    lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)  # one probe each; the best on held-out labels is reported
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "lrs")
        check_not_negative(self, "weight_decay")
        _check_momentum(self.momentum)
        check_field(0 < self.holdout < 1, "holdout", f"must lie in (0, 1), got {self.holdout}")
        check_field(
            self.train_size is None or self.train_size > 1,
            "train_size",
            f"must be at least 2, got {self.train_size}; null takes all training samples",
        )
        for name, example in (("lrs", "0.1"), ("layers", "backbone")):
            values = getattr(self, name)
            check_field(
                0 < len(set(values)) == len(values),
                name,
                f"must list one or more, such as {example}, each once; got {list(values)}",
            )

    def check_sgd(self, *, final: bool) -> None:
        """Refuse numbers of SGD where nothing learns by it: neither the online probe nor the ``final`` evaluation."""
        for name in ("lrs", "momentum", "weight_decay"):
            value, default = getattr(self, name), getattr(ProbeConfig, name)
            if value != default and not (self.online or final):
                stay = list(default) if isinstance(default, tuple) else default
                raise ConfigError(
                    f"probe.{name}",
                    f"must stay {stay}: nothing learns by SGD without probe.online=true, eval.baselines=true or "
                    "eval.after=[honest]",
                )


PCA_WIDTH = 64  # principal components of the pixels kept by the final evaluation's PCA baseline


@dataclass(frozen=True, kw_only=True)
class PlainView:
    """How evaluation shows an image to an encoder: the centre of the resized image, or, with ``proportion``, the
    centre of the image, resized."""

    size: int  # side of the square that the encoder sees, in pixels
    resize: int | None = None  # shorter side before the centre crop, in pixels; None: no resizing
    proportion: float | None = (
        None  # side of the centre crop, as a fraction of the image's, before resizing to size
    )
    # The crop of proportion is square, a fraction of the shorter side, or a fraction of either side.
    square: bool = True
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # both antialiased


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how frozen features are evaluated, during training and at its end."""

    every_epochs: int  # epochs between evaluations; the last epoch is always evaluated
    size: int  # side of the square image that the encoder sees, in pixels
    knn_k: int
    knn_temperature: float
    resize: int | None = None  # shorter side before the centre crop to ``size``, in pixels; None: no resizing
    batch_size: int = 256  # per device
    bank_size: int | None = None  # training samples in the k-NN bank; None: all
    test_split: str = "test"
    # Add raw pixels, their PCA, random initialisation and linear evaluation by SGD to the final table.
    baselines: bool = False
    stop_on_collapse: bool = False  # end the run, with exit code 77, at an evaluation that finds a collapse
    # More evaluations after the final table: knn, logistic, or protocols of linear evaluation, as in `sslzoo eval`.
    after: tuple[str, ...] = ()

    @property
    def view(self) -> PlainView:
        """How images are shown."""
        return PlainView(size=self.size, resize=self.resize)

    def __post_init__(self) -> None:
        check_positive(self, "every_epochs", "size", "knn_k", "knn_temperature", "batch_size")
        check_field(
            len(set(self.after)) == len(self.after),
            "after",
            f"must list each evaluation once, got {list(self.after)}",
        )
        check_field(
            self.resize is None or self.resize >= self.size,
            "resize",
            f"must be at least size={self.size}, got {self.resize}; null leaves the images as they are",
        )
        check_field(
            self.bank_size is None or self.bank_size > 0,
            "bank_size",
            f"must be positive, got {self.bank_size}; null takes all training samples",
        )
        check_field(
            self.bank_size is None or self.knn_k <= self.bank_size,
            "knn_k",
            f"must be at most bank_size={self.bank_size}, got {self.knn_k}",
        )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; ``auto`` means online if you are logged in, offline otherwise."""

    project: str = "sslzoo"
    entity: str | None = None  # None: the account's default
    mode: Literal["auto", "online", "offline"] = "auto"
    tags: tuple[str, ...] = ()
    notes: str = ""
    artifact: bool = False  # upload the exported encoder of the finished run


Compiler = Literal["inductor", "aot_eager", "eager"]  # torch.compile's backends; the latter two find faults


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How a step is computed. Results are the same, up to rounding."""

    channels_last: bool = False  # weights and images of the encoder in that memory layout
    # Keep only the inputs of the encoder's blocks for the backward pass, and compute each block a second time.
    activation_checkpointing: bool = False
    compile: Compiler | None = None  # encoder and loss by torch.compile; None: not compiled

    def __post_init__(self) -> None:
        check_field(
            self.compile is None or not self.activation_checkpointing,
            "compile",
            "must be null with activation_checkpointing=true: torch cannot trace how that keeps batch-norm statistics",
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is logged and saved, how often, and where. ``metrics.csv`` is always written."""

    every_steps: int = 50  # optimiser steps between rows
    checkpoint_every_steps: int = 500  # optimiser steps between saves; the end of each epoch is saved too
    keep_epochs: tuple[int, ...] = ()  # epochs whose checkpoint is never deleted
    lines: Literal["text", "json"] = "text"  # progress on stdout; json: an object a line, and no bars
    tensorboard: bool = False
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        check_positive(self, "every_steps", "checkpoint_every_steps", "keep_epochs")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Base of every analysis's config. ``name`` is its registered name, or ``module:Class``.

    Each field of a subclass is also an option of ``sslzoo analyze``; its metadata may hold ``help``, ``metavar``,
    and ``option`` if the option's name differs from the field's.
    """

    name: str
    every_steps: int = 100  # optimiser steps between two analyses during training

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
    eval: EvalConfig
    trainer: dict[str, Any]  # passed to lightning.Trainer unchanged
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    analyses: tuple[AnalysisConfig, ...] = ()
    name: str = "unnamed"  # the file's stem

    def __post_init__(self) -> None:
        check_field(
            self.name not in ("", ".", "..") and self.name.isprintable() and not {"/", "\\"} & set(self.name),
            "name",
            f"must be a single folder name, got {self.name!r}",
        )
        for i, view in enumerate(self.views):
            view.check_channels(self.backbone.in_channels, f"views.{i}")
        epochs = self.trainer.get("max_epochs")
        for i, epoch in enumerate(self.logging.keep_epochs):
            check_field(
                epochs is None or epoch <= epochs,
                f"logging.keep_epochs.{i}",
                f"must be at most trainer.max_epochs={epochs}, got {epoch}",
            )
        check_field(
            self.backbone.name != "conv5" or not self.speed.channels_last,
            "speed.channels_last",
            "must be false with backbone.name=conv5, which always has this memory layout",
        )
        for key, off in {"activation_checkpointing": False, "compile": None}.items():
            check_field(
                getattr(self.speed, key) == off or not self.method.needs_double_backward,
                f"speed.{key}",
                f"must be left out: {self.method.name} differentiates twice, and torch supports neither checkpointed "
                "blocks nor compiled code there",
            )
        names = [analysis.name for analysis in self.analyses]  # keys of what they log and save
        for i, name in enumerate(names):
            check_field(name not in names[:i], f"analyses.{i}.name", f"{name} is listed twice; keep one")
        self.probe.check_sgd(final=self.eval.baselines or "honest" in self.eval.after)
        self.method.check(self)

    @property
    def crops(self) -> int:
        """Number of views per image."""
        return sum(view.count for view in self.views)

    @property
    def global_crops(self) -> int:
        """Number of views per image with the role ``global``."""
        return sum(view.count for view in self.views if view.role == "global")

    @property
    def max_epochs(self) -> int:
        """Length of the run in epochs."""
        return self.trainer["max_epochs"]

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimiser step."""
        return self.trainer.get("accumulate_grad_batches", 1)

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return int(self.trainer.get("num_nodes", 1))

    @property
    def devices(self) -> int | None:
        """Processes per machine; None: one per GPU."""
        devices = stated_devices(self.trainer.get("devices", "auto"))
        if devices is None and self.trainer.get("accelerator") == "cpu":
            return 1
        return devices
