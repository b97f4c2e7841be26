"""What a SogCLR recipe states under ``method:``."""

from dataclasses import dataclass

from sslzoo.checks import check_field, one_of
from sslzoo.recipe.sections import MethodConfig, OutputNorm


@dataclass(frozen=True, kw_only=True)
class SogCLRConfig(MethodConfig):
    """Numbers without a default stand in every recipe; the switches default to what the card follows."""

    tau: float  # temperature, or where the learnt ones start
    gamma: float  # inner moving-average rate: weight of the new estimate; read by gamma_schedule=constant
    u_floor: float  # lower bound of u_hat; 0: none. The authors' bimodal code: 1e-20
    projector: tuple[int, ...]  # layer widths after the backbone, embedding last
    loss: str = "gcl"  # gcl | gcl_bimodal (the two views as two modalities) | ntxent (SimCLR)
    temperature: str = "constant"  # individual (iSogCLR) | global_learnable (with gcl_bimodal)
    gamma_schedule: str = "constant"  # cosine: from 1 to gamma_min, an epoch a value | per_step
    gamma_min: float = 0.0  # for the cosine schedules, which need it
    gamma_decay_epochs: int = 0  # E of the cosine; 0: half of the training epochs
    first_visit: str = "sample"  # batch (official PyTorch) | none (paper's TPU code)
    u_write: str = "mean"  # sum (paper's TPU code)
    gather_grad: str = "full"  # local (official PyTorch) | full_noreduce (as full, cheaper backward)
    loss_scale: str = "tau"  # unit: divided by tau, for learning rates of SimCLR recipes
    bimodal_scale: str = "mean"  # official: times B - 1
    separate_views: bool = False  # one network pass per view: batch-norm statistics of one view
    projector_norm: OutputNorm = (
        "batch_no_affine"  # after the last layer; batch_no_shift: the paper's TPU code
    )
    rho: float = 0.0  # learnt temperatures: radius of the robust objective
    tau_min: float = 0.0  # learnt temperatures: lower clamp
    tau_max: float = 0.0  # individual temperatures: upper clamp
    eta: float = 0.0  # individual temperatures: step
    beta: float = 0.0  # individual temperatures: weight of the new gradient
    tau_lr_factor: float = 0.0  # global_learnable: its learning rate over the others'
    histogram_every_epochs: int = 0  # of the tables, to TensorBoard and W&B; 0: never

    def __post_init__(self) -> None:
        one_of("loss", self.loss, ("gcl", "gcl_bimodal", "ntxent"))
        one_of("temperature", self.temperature, ("constant", "individual", "global_learnable"))
        one_of("gamma_schedule", self.gamma_schedule, ("constant", "cosine", "per_step"))
        one_of("first_visit", self.first_visit, ("sample", "batch", "none"))
        one_of("u_write", self.u_write, ("mean", "sum"))
        one_of("gather_grad", self.gather_grad, ("full", "local", "full_noreduce"))
        one_of("loss_scale", self.loss_scale, ("tau", "unit"))
        one_of("bimodal_scale", self.bimodal_scale, ("mean", "official"))
        one_of("projector_norm", self.projector_norm, ("batch_no_affine", "batch_no_shift", "none"))
        check_field(self.tau > 0, "tau", f"must be positive, got {self.tau}")
        check_field(0 < self.gamma <= 1, "gamma", f"must lie in (0, 1], got {self.gamma}")
        check_field(
            self.histogram_every_epochs >= 0,
            "histogram_every_epochs",
            f"must not be negative, got {self.histogram_every_epochs}",
        )
        check_field(self.u_floor >= 0, "u_floor", f"must not be negative, got {self.u_floor}")
        check_field(
            len(self.projector) > 0,
            "projector",
            "needs at least the embedding width, such as [2048, 128]",
        )
        check_field(
            self.gamma_schedule == "constant" or 0 < self.gamma_min <= 1,
            "gamma_min",
            f"must lie in (0, 1] with method.gamma_schedule={self.gamma_schedule}, got {self.gamma_min}",
        )
        smallest = self.gamma if self.gamma_schedule == "constant" else self.gamma_min
        check_field(
            self.u_write == "mean" or smallest > 0.5,
            "u_write",
            f"sum diverges for gamma <= 0.5, got {smallest}; use method.u_write=mean",
        )
        self._check_temperature()
        check_field(
            self.loss == "gcl" or self.gather_grad != "full_noreduce",
            "gather_grad",
            f"full_noreduce goes with method.loss=gcl, got {self.loss}; use full",
        )
        check_field(
            self.loss != "gcl_bimodal" or self.u_write == "mean",
            "u_write",
            "sum adds the two views' entries; with gcl_bimodal each has its own table: use mean",
        )

    def _check_temperature(self) -> None:
        allowed = {"gcl": ("constant", "individual"), "ntxent": ("constant",)}.get(self.loss)
        check_field(
            allowed is None or self.temperature in allowed,
            "temperature",
            f"{self.temperature} does not go with method.loss={self.loss}; use {' or '.join(allowed or ())}",
        )
        learnt = {
            "constant": (),
            "individual": ("rho", "eta", "beta", "tau_min", "tau_max"),
            "global_learnable": ("rho", "tau_min", "tau_lr_factor"),
        }[self.temperature]
        for name in learnt:
            check_field(
                getattr(self, name) > 0,
                name,
                f"must be positive with method.temperature={self.temperature}, got {getattr(self, name)}",
            )
        check_field(self.beta <= 1, "beta", f"must be at most 1, got {self.beta}")
        check_field(
            self.temperature == "constant" or self.tau_min <= self.tau,
            "tau_min",
            f"is {self.tau_min}, above method.tau={self.tau}",
        )
        check_field(
            self.temperature != "individual" or self.tau <= self.tau_max,
            "tau",
            f"is {self.tau}, above method.tau_max={self.tau_max}",
        )
