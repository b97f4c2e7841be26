"""The ``method:`` section of MetAug recipes. For Greek letters and equation numbers, see the card (README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslzoo.checks import check_field, check_not_negative, check_positive
from sslzoo.panels import Panel
from sslzoo.recipe.sections import HeadConfig, MethodConfig, Recipe
from sslzoo_methods.metaug.panels import PANELS

ColorSpace = Literal["lab", "ycbcr"]
Thresholds = Literal["large", "small", "mean"]


# Views and keys


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Views are the recipe's global crops, and share one encoder."""

    encoders: ClassVar[int] = 1

    name: Literal["crops"] = "crops"
    count: int = 2

    def __post_init__(self) -> None:
        check_field(self.count >= 2, "count", f"must be at least 2, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class ColorChannels:
    """Three views of one crop in another colour space, each with its own encoder: the first channel, the other two, and
    all three."""

    count: ClassVar[int] = 3
    encoders: ClassVar[int] = 3

    name: Literal["color"] = "color"
    space: ColorSpace = "lab"


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Keys are the original features of the global batch."""

    name: Literal["batch"] = "batch"
    same_view_negatives: bool = False  # other samples in the query's own view are negatives too


@dataclass(frozen=True, kw_only=True)
class BankKeys:
    """Keys come from memory banks with the latest features of every training image, as in the official code."""

    name: Literal["bank"] = "bank"
    negatives: int = 1024  # K
    momentum: float = 0.5  # weight of the old row
    updates: Literal["once", "official"] = (
        "once"  # official: three times per step, last with the virtual encoder
    )

    def __post_init__(self) -> None:
        check_positive(self, "negatives")
        check_field(0 <= self.momentum < 1, "momentum", f"must lie in [0, 1), got {self.momentum}")


# The objective


@dataclass(frozen=True, kw_only=True)
class Circle:
    """Modification of the logits by circle loss, as in the paper."""

    m: float
    weights: bool = True  # weight each pair by its distance from the optimum
    shift: bool = True  # decision margins 1 - m and m

    def __post_init__(self) -> None:
        check_field(0 <= self.m <= 1, "m", f"must lie in [0, 1], got {self.m}")
        check_field(self.weights or self.shift, "weights", "and shift are both false; use method.circle=null")


@dataclass(frozen=True, kw_only=True)
class SeparateTerms:
    """One term for the original features, one for each view replaced by its generated features, and one with all views
    replaced."""

    name: Literal["separate"] = "separate"
    generated_weight: float  # alpha: weight of all terms but the first

    def __post_init__(self) -> None:
        check_not_negative(self, "generated_weight")


@dataclass(frozen=True, kw_only=True)
class UnifiedTerm:
    """One term with original and generated queries."""

    name: Literal["unified"] = "unified"


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """The regulariser R, which makes generated features hard examples."""

    weight: float  # beta
    positive_weight: float  # lambda+, weight of R's positives: 1 in the paper, 1e-4 in the official code
    thresholds: Thresholds = "large"
    detach_thresholds: bool = False
    pairs: Literal["generated", "official"] = "generated"  # official: only with banks and three views
    steps: Literal["both", "generator"] = "both"  # generator: leave R out of the encoder's step

    def __post_init__(self) -> None:
        check_field(self.weight > 0, "weight", f"must be positive, got {self.weight}; without R: margin=null")
        check_not_negative(self, "positive_weight")


# The generators and their step


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generators: one MLP per view that maps embeddings to embeddings."""

    hidden: tuple[int, ...]  # widths of the hidden layers
    shared: bool = False  # use one generator for all views

    def __post_init__(self) -> None:
        check_positive(self, "hidden")


@dataclass(frozen=True, kw_only=True)
class SGD:
    """SGD for the generators, with a constant learning rate."""

    name: Literal["sgd"] = "sgd"
    lr: float
    weight_decay: float
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_not_negative(self, "weight_decay")
        check_field(0 <= self.momentum < 1, "momentum", f"must lie in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam for the generators, with a constant learning rate."""

    name: Literal["adam"] = "adam"
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_not_negative(self, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The generators' step, which minimises the objective after a virtual step of the encoder."""

    virtual_lr: float  # eta_v
    optimizer: SGD | Adam
    every_steps: int = 1
    order: Literal[1, 2] = 2  # 1: without second derivatives
    virtual_params: Literal["all", "projector"] = "all"  # parameters that the virtual step changes
    sync_virtual_step: bool = (
        True  # false: each rank uses its own gradient; the result depends on the world size
    )
    loss_scale: float = 1.0  # factor of the outer loss, and thus of the generators' gradient
    autocast: bool = False  # run forward passes in bfloat16, like the rest of a bf16-mixed run

    def __post_init__(self) -> None:
        check_positive(self, "virtual_lr", "every_steps", "loss_scale")


@dataclass(frozen=True, kw_only=True)
class MetAugConfig(MethodConfig):
    """Config of MetAug. Every recipe must set the fields without a default; options default to the two-crop plug-in."""

    panels: ClassVar[tuple[Panel, ...]] = PANELS

    RENAMED: ClassVar[dict[str, str]] = {
        "aug_weight": "terms.generated_weight",
        "contrast_set": "terms.name",
        "margin_weight": "margin.weight",
        "margin_pos_weight": "margin.positive_weight",
        "margin_in": "margin.steps",
        "margin_pairs": "margin.pairs",
        "detach_sigma": "margin.detach_thresholds",
        "weighting": "circle.weights",
        "shift": "circle.shift",
        "m": "circle.m",
        "proj_hidden": "projector.widths",
        "proj_dim": "projector.widths",
        "gen_hidden": "generator.hidden",
        "gen_layers": "generator.hidden",
        "share_generator": "generator.shared",
        "n_views": "views.count",
        "color_space": "views.space",
        "same_view_negatives": "keys.same_view_negatives",
        "bank_negatives": "keys.negatives",
        "bank_momentum": "keys.momentum",
        "bank_updates": "keys.updates",
        "meta_every": "meta.every_steps",
        "meta_order": "meta.order",
        "meta_precision": "meta.autocast",
        "virtual_lr": "meta.virtual_lr",
        "virtual_params": "meta.virtual_params",
        "virtual_step_sync": "meta.sync_virtual_step",
        "generator_loss_scale": "meta.loss_scale",
        "generator_optim": "meta.optimizer.name",
        "generator_lr": "meta.optimizer.lr",
        "generator_weight_decay": "meta.optimizer.weight_decay",
        "generator_momentum": "meta.optimizer.momentum",
    }

    needs_double_backward = True

    views: Crops | ColorChannels = Crops()
    keys: BatchKeys | BankKeys = BatchKeys()
    projector: HeadConfig
    generator: GeneratorConfig
    gamma: float = 16.0  # sharpness, equal to a softmax temperature of 2 / gamma on the cosine
    scale: float = (
        16.0  # the softplus is multiplied by scale / gamma, so that gamma does not change its slope
    )
    circle: Circle | None = None
    terms: SeparateTerms | UnifiedTerm
    margin: MarginConfig | None
    ramp_epochs: float = 0.0  # epochs over which the weights of generated terms and of R grow from 0
    meta: MetaConfig | None  # None: the generators are not trained

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Features before and after the projector, and backbone features concatenated with generated features."""
        return ("backbone", "projector", "backbone+generated")

    def __post_init__(self) -> None:
        check_positive(self, "gamma", "scale")
        check_not_negative(self, "ramp_epochs")
        bank, separate = isinstance(self.keys, BankKeys), isinstance(self.terms, SeparateTerms)
        check_field(separate or not bank, "terms", "must be separate with method.keys bank")
        margin, weighted = self.margin, self.margin is not None
        if isinstance(self.terms, SeparateTerms):
            weighted = weighted or self.terms.generated_weight > 0
        check_field(
            weighted or self.ramp_epochs == 0, "ramp_epochs", "must be 0: there is no weight to ramp up"
        )
        check_field(
            weighted or not separate or self.meta is None,
            "meta",
            "must be null: with margin null and terms.generated_weight 0 no generated feature enters the loss",
        )
        if margin is not None:
            check_field(
                margin.pairs == "generated" or (bank and self.views.count == 3),
                "margin.pairs",
                "official is only defined for method.keys bank and three views",
            )
            check_field(
                margin.steps == "both" or self.meta is not None,
                "margin.steps",
                "must be both with method.meta null: the generators are not trained",
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that are incompatible with manual optimisation, half precision or the views."""
        trainer, data = recipe.trainer, recipe.data
        check_field(
            recipe.backbone.weights is None or not isinstance(self.views, ColorChannels),
            "backbone.weights",
            "must be left out with method.views color, whose three encoders start with random weights",
        )
        check_field(
            recipe.accumulate == 1,
            "trainer.accumulate_grad_batches",
            "must be 1: MetAug's bilevel step needs the whole batch",
        )
        check_field(
            not trainer.get("gradient_clip_val"),
            "trainer.gradient_clip_val",
            "must be left out: MetAug uses manual optimisation without clipping",
        )
        precision = str(trainer.get("precision", "32-true"))
        precision = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(precision, precision)  # Lightning's aliases
        check_field(
            precision not in ("16-true", "bf16-true"),
            "trainer.precision",
            f"must not be {precision}: half-precision weights are too coarse for virtual steps; use bf16-mixed",
        )
        check_field(
            self.meta is None or not self.meta.autocast or precision == "bf16-mixed",
            "method.meta.autocast",
            f"must be false with trainer.precision={precision}: it needs bf16-mixed (in float16 the generators' "
            "gradients underflow or overflow)",
        )
        colors = isinstance(self.views, ColorChannels)
        crops = recipe.global_crops
        needed = 1 if colors else self.views.count
        check_field(
            crops == needed,
            "views",
            f"must have {needed} global view(s) for method.views {self.views.name}"
            f"{'' if colors else f' with count={needed}'}, got {crops}",
        )
        if colors:
            check_field(
                crops == recipe.crops,
                "views",
                "must all be global with method.views color",
            )
            check_field(
                tuple(data.mean) == (0, 0, 0) and tuple(data.std) == (1, 1, 1),
                "data.mean",
                "must be [0, 0, 0], and data.std [1, 1, 1], with method.views color, which converts RGB itself",
            )
