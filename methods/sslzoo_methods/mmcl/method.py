"""MMCL: Max-Margin Contrastive Learning (Shah et al., AAAI 2022, arXiv:2112.11450)."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch, Contrast
from sslzoo.distributed import gather, gather_detached, rank, world_size
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import build_head
from sslzoo.nn.passes import forward_crops
from sslzoo_methods.mmcl.config import INV, AdaptivePGD, Bandwidth, Exact, MMCLConfig
from sslzoo_methods.mmcl.kernels import Kernel, bandwidth
from sslzoo_methods.mmcl.loss import dual_health, dual_problem, kernel_means, mmcl_loss, normalized
from sslzoo_methods.mmcl.solvers import (
    DualProblem,
    OfRanks,
    Solution,
    alone,
    solve_adaptive,
    solve_exact,
    solve_inv,
    solve_pgd,
    start_point,
)


class MMCL(SSLMethod[MMCLConfig]):
    """MMCL: an SVM that separates an image's first view from the other images scores its second view.

    Stateless: sigma is a function of the epoch, and random initial points are functions of the seed and the number
    of earlier batches of negatives, so the duals are equal on all ranks and reproducible after a resume.
    """

    Config = MMCLConfig

    def __init__(self, cfg: MMCLConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = build_head(feature_dim, cfg.projector)
        self.micro_batch = 0  # index within the current step

    def loss(self, batch: Batch) -> Tensor:
        """Loss with the first global view as anchors and all other crops as queries; if ``symmetric``, averaged with
        that of the second global view as anchors."""
        cfg = self.cfg
        crops = (*batch.global_views, *batch.local_views)
        features, z = forward_crops(self.backbone, self.projector, crops, cfg.crop_batching)
        self.publish(backbone=features[0], projector=z[0])
        loss = torch.stack([self._term(z, anchor) for anchor in range(1 + cfg.symmetric)]).mean()
        self.micro_batch += 1
        return loss

    def after_step(self, step: int) -> None:
        """Count the next step's micro-batches from 0."""
        self.micro_batch = 0

    def after_skipped_step(self, step: int) -> None:
        """Count the next step's micro-batches from 0."""
        self.micro_batch = 0

    def depends_on_processes(self) -> str:
        """Without gathering."""
        return "" if self.cfg.gather else "method.gather=false contrasts the images of one process"

    def depends_on_micro_batches(self) -> str:
        """It does."""
        return "MMCL separates the images of a micro-batch from one another"

    def contrasted(self, batch: Batch) -> Contrast:
        """Projections of two global views."""
        temperature = self.cfg.softmax_temperature
        return Contrast.of_views(batch, lambda x: self.projector(self.backbone(x)), temperature=temperature)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``backbone`` (N, F) and ``projector`` (N, D)."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}

    def _term(self, z: tuple[Tensor, ...], anchor: int) -> Tensor:
        """The loss of view ``anchor`` with all other crops as queries. The pool of the SVMs is gathered, and each rank
        solves for its own anchors."""
        cfg, n = self.cfg, len(z[0])
        first = rank() * n if cfg.gather else 0
        views = [z[anchor]] if cfg.negatives == "view1" else [z[anchor], z[1 - anchor]]
        pool = torch.cat([gather(view) for view in views] if cfg.gather else views)
        kernel = Kernel(cfg.kernel.name, self._sigma(pool))
        problem = dual_problem(
            pool,
            anchors=len(pool) // len(views),
            kernel=kernel,
            self_term=cfg.kernel.self_term,
            C=cfg.C,
            reg=cfg.reg,
            rows=slice(first, first + n),
        )
        of_ranks = _of_ranks if cfg.gather else alone
        solution = self._solve(problem, anchor, of_ranks)
        queries = z[:anchor] + z[anchor + 1 :]
        if anchor == 0:
            anchors = pool[: problem.anchors]
            positive, negative = kernel_means(queries[0], anchors, first=first, kernel=kernel)
            health = dual_health(problem, solution.duals, of_ranks)
            health |= {"pos_kernel_mean": positive, "neg_kernel_mean": negative}
            for name, value in health.items():
                self.record(f"method/{name}", value)
            # Not torch.tensor(number, device=...), which would synchronise with the device.
            self.record("method/iterations", solution.duals.new_full((), solution.iterations))
            if isinstance(kernel.sigma, Tensor):
                self.record("method/bandwidth", kernel.sigma)
            elif kernel.sigma is not None:
                self.setting("method/sigma", kernel.sigma)
        duals = solution.duals if cfg.alpha_normalize == "none" else normalized(solution.duals, of_ranks)
        losses = [mmcl_loss(query, pool, duals, first=first, kernel=kernel) for query in queries]
        return torch.stack(losses).mean()

    def _sigma(self, pool: Tensor) -> float | Tensor | None:
        """The bandwidth in this epoch; None if the kernel has none."""
        kernel = self.cfg.kernel
        if not isinstance(kernel, Bandwidth):
            return None
        return bandwidth(pool, sigma=kernel.sigma_at(self.epoch), rule=kernel.sigma_rule)

    def _solve(self, problem: DualProblem, anchor: int, of_ranks: OfRanks) -> Solution:
        """Solve for the duals. ``inv``, and ``pgd_adaptive`` without ``tol``, need no host-device synchronisation; the
        other solvers need one in ten updates, for their stopping criterion."""
        solver = self.cfg.solver
        if isinstance(solver, INV):
            return solve_inv(problem)
        if isinstance(solver, Exact):
            return solve_exact(problem, of_ranks=of_ranks)
        if isinstance(solver, AdaptivePGD):
            return solve_adaptive(problem, max_iter=solver.max_iter, tol=solver.tol, of_ranks=of_ranks)
        position = self.step * self.plan.accumulate + self.micro_batch
        if not self.cfg.gather:  # each rank solves its own problem
            position = position * world_size() + rank()
        seed = random.Random(f"mmcl {self.seed} {position} {anchor}").getrandbits(63)
        start, theta = start_point(problem, solver.init, seed)
        solution = solve_pgd(
            problem,
            start,
            theta=theta,
            variant=solver.variant,
            step=solver.step,
            max_iter=solver.max_iter,
            stop=solver.stop,
            tol=solver.tol,
            of_ranks=of_ranks,
        )
        if not isinstance(solver.step, str) and solution.curvature is not None:
            limit = (1 if solver.variant == "nesterov" else 2) / solver.step
            if solution.curvature > limit:
                warnings.warn(
                    f"method.solver.step={solver.step} is stable up to a curvature of {limit:.0f}, but the dual "
                    f"problem has up to {solution.curvature:.0f}: use method.solver.step=lipschitz or "
                    "method.solver=pgd_adaptive",
                    stacklevel=2,
                )
        return solution


def _of_ranks(x: Tensor) -> Tensor:
    """``x`` of every rank, stacked (W, ...)."""
    return gather_detached(x[None])
