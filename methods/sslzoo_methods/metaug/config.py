"""What a MetAug recipe states under ``method:``."""

from __future__ import annotations

from dataclasses import dataclass

from sslzoo.checks import check_field, one_of
from sslzoo.recipe.sections import MethodConfig, Recipe, refuse_idle


@dataclass(frozen=True, kw_only=True)
class MetAugConfig(MethodConfig):
    """Numbers without a default stand in every recipe; the switches default to the two-crop plug-in."""

    aug_weight: float  # alpha: weight of the terms with generated features
    margin_weight: float  # beta: weight of the margin-injected regulariser R
    margin_pos_weight: float  # lambda+: weight of R's positives; 1 in the paper, 1e-4 in the official code
    virtual_lr: float  # eta_v: the encoder's virtual step
    generator_optim: str  # sgd | adam
    generator_lr: float  # constant
    generator_weight_decay: float
    proj_hidden: int  # projector: features -> proj_hidden -> proj_dim
    proj_dim: int
    gen_hidden: int  # width of a generator's hidden layers
    gen_layers: int = 3  # linear layers of a generator
    share_generator: bool = False  # one for all views
    generator_momentum: float = 0.9  # sgd
    generator_loss_scale: float = 1.0  # of the outer loss, hence of the generators' gradient
    views: str = "crops"  # lab: L, ab and all of CIELAB of one crop, an encoder each
    n_views: int = 2  # global crops; 3 with lab
    color_space: str = "lab"  # ycbcr; for views: lab
    keys: str = "batch"  # bank: memory banks, as the official code
    bank_negatives: int = 1024  # K
    bank_momentum: float = 0.5  # of the old row
    bank_updates: str = "once"  # official: three times a step, once with the virtual encoder's features
    gamma: float = 16.0
    scale: float = 16.0
    weighting: str = "none"  # circle (paper)
    shift: bool = False  # decision margins 1 - m and m (paper)
    m: float = 0.25
    contrast_set: str = "terms"  # unified: one term with original and generated queries
    same_view_negatives: bool = False  # other samples of the query's own view repel too
    margin: str = "large"  # small | mean
    margin_in: str = "both"  # generator (R in the generators' step only) | none
    margin_pairs: str = "generated"  # official (three views, banks)
    detach_sigma: bool = False  # no gradient through R's thresholds
    meta_order: int = 2  # 1: without second derivatives
    meta_every: int = 1  # steps; 0: never, generators stay as initialised
    meta_precision: int = 32  # 16: the bilevel step's forward passes under the run's autocast
    virtual_params: str = "all"  # projector: the virtual step moves the projector alone
    virtual_step_sync: bool = True  # false: each rank steps on its own gradient; not world-size invariant
    ramp_epochs: float = 0.0  # aug_weight and margin_weight grow from 0 over so many

    @property
    def published_layers(self) -> tuple[str, ...]:
        """Before and after the projector; the backbone's with the generated features beside them."""
        return ("backbone", "projector", "backbone+generated")

    @property
    def contrast_temperature(self) -> float:
        """2 / gamma: gamma multiplies (1 + cos) / 2."""
        return 2 / self.gamma

    def __post_init__(self) -> None:
        for name, allowed in {
            "generator_optim": ("sgd", "adam"),
            "views": ("crops", "lab"),
            "color_space": ("lab", "ycbcr"),
            "keys": ("batch", "bank"),
            "bank_updates": ("once", "official"),
            "weighting": ("none", "circle"),
            "contrast_set": ("terms", "unified"),
            "margin": ("large", "small", "mean"),
            "margin_in": ("both", "generator", "none"),
            "margin_pairs": ("generated", "official"),
            "virtual_params": ("all", "projector"),
        }.items():
            one_of(name, getattr(self, name), allowed)
        for name in ("virtual_lr", "generator_lr", "generator_loss_scale", "gamma", "scale"):
            check_field(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        for name in ("proj_hidden", "proj_dim", "gen_hidden", "gen_layers", "bank_negatives"):
            check_field(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        for name in ("aug_weight", "margin_weight", "margin_pos_weight", "generator_weight_decay"):
            check_field(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")
        for name in ("bank_momentum", "generator_momentum"):
            check_field(0 <= getattr(self, name) < 1, name, f"must lie in [0, 1), got {getattr(self, name)}")
        check_field(0 <= self.m <= 1, "m", f"must lie in [0, 1], got {self.m}")
        check_field(self.meta_order in (1, 2), "meta_order", f"must be 1 or 2, got {self.meta_order}")
        check_field(self.meta_every >= 0, "meta_every", f"must not be negative, got {self.meta_every}")
        check_field(
            self.meta_precision in (16, 32),
            "meta_precision",
            f"must be 16 or 32, got {self.meta_precision}",
        )
        check_field(self.ramp_epochs >= 0, "ramp_epochs", f"must not be negative, got {self.ramp_epochs}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        bank = self.keys == "bank"
        check_field(self.n_views >= 2, "n_views", f"must be at least 2, got {self.n_views}")
        check_field(
            self.views == "crops" or self.n_views == 3,
            "n_views",
            f"must be 3 with method.views=lab, got {self.n_views}",
        )
        check_field(
            self.margin_pairs == "generated" or (bank and self.n_views == 3),
            "margin_pairs",
            "official is defined for method.keys=bank and three views",
        )
        check_field(
            bank or self.bank_updates == "once", "bank_updates", "official goes with method.keys=bank"
        )
        check_field(
            not bank or (self.contrast_set == "terms" and not self.same_view_negatives),
            "keys",
            "must be batch with method.contrast_set=unified and with method.same_view_negatives",
        )

        check_field(
            self.contrast_set == "terms" or self.aug_weight == 0,
            "contrast_set",
            "unified has one term, which nothing weighs: set method.aug_weight=0",
        )
        heeded = {
            "bank_negatives": (bank, "method.keys=bank"),
            "bank_momentum": (bank, "method.keys=bank"),
            "color_space": (self.views == "lab", "method.views=lab"),
            "generator_momentum": (self.generator_optim == "sgd", "method.generator_optim=sgd"),
            "m": (self.weighting == "circle" or self.shift, "method.weighting=circle or method.shift=true"),
        }
        refuse_idle(self, heeded)

    def check(self, recipe: Recipe) -> None:
        """Refuse what manual optimisation, half precision or the views cannot do."""
        trainer, data = recipe.trainer, recipe.data
        check_field(
            recipe.accumulate == 1,
            "trainer.accumulate_grad_batches",
            "must be 1: MetAug's bilevel step needs the whole batch",
        )
        check_field(
            not trainer.get("gradient_clip_val"),
            "trainer.gradient_clip_val",
            "must be left out: MetAug steps its optimisers itself and does not clip",
        )
        precision = str(trainer.get("precision", "32-true"))
        precision = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(precision, precision)  # Lightning's aliases
        check_field(
            precision not in ("16-true", "bf16-true"),
            "trainer.precision",
            f"must not be {precision}: a virtual step is lost in half-precision weights; use bf16-mixed",
        )
        check_field(
            precision != "16-mixed" or self.meta_precision == 32,
            "method.meta_precision",
            "must be 32 with trainer.precision=16-mixed, where the generators' gradients underflow or overflow",
        )
        crops = sum(view.count for view in recipe.views if view.role == "global")
        wanted = 1 if self.views == "lab" else self.n_views
        check_field(
            crops == wanted,
            "views",
            f"must hold {wanted} global view(s) for method.views={self.views} with method.n_views={self.n_views}, "
            f"got {crops}",
        )
        if self.views == "lab":
            check_field(
                crops == sum(view.count for view in recipe.views),
                "views",
                "must not be local with method.views=lab",
            )
            check_field(
                tuple(data.mean) == (0, 0, 0) and tuple(data.std) == (1, 1, 1),
                "data.mean",
                "must be [0, 0, 0], and data.std [1, 1, 1], with method.views=lab, which converts RGB in [0, 1] itself",
            )
