"""MMCL: Max-Margin Contrastive Learning (Shah et al., AAAI 2022, arXiv:2112.11450)."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor, nn

from sslzoo.batch import Batch
from sslzoo.distributed import gather, rank
from sslzoo.method import SSLMethod
from sslzoo.nn.heads import mlp
from sslzoo.nn.passes import forward_crops
from sslzoo_methods.mmcl.config import MMCLConfig
from sslzoo_methods.mmcl.loss import dual_health, dual_problem, kernel_means, mmcl_loss
from sslzoo_methods.mmcl.solvers import (
    DualProblem,
    Solution,
    solve_adaptive,
    solve_exact,
    solve_inv,
    solve_pgd,
    start_point,
)


class MMCL(SSLMethod[MMCLConfig]):
    """Each image's second view is scored by an SVM of its first view against the other images.

    No state across steps: sigma is a function of the epoch, random starts of (seed, step), so all ranks
    hold the same duals and a resumed run continues alike.
    """

    Config = MMCLConfig

    def __init__(self, cfg: MMCLConfig, backbone: nn.Module, feature_dim: int) -> None:
        super().__init__(cfg, backbone, feature_dim)
        self.projector = mlp(
            (feature_dim, *cfg.projector),
            output_norm=cfg.projector_norm,
            output_bias=cfg.projector_norm == "none",
        )

    @property
    def sigma(self) -> float:
        """The bandwidth of this epoch; milestone m acts from the m-th epoch, which is number m - 1 from 0."""
        passed = sum(self.epoch >= m - 1 for m in self.cfg.sigma_milestones)
        return self.cfg.sigma * self.cfg.sigma_gamma**passed

    def loss(self, batch: Batch) -> Tensor:
        """SVMs from the first global view, every other crop a query; ``symmetric``: from the second one too."""
        cfg = self.cfg
        crops = (*batch.global_views, *batch.local_views)
        pairs = cfg.symmetric or cfg.negatives == "both"
        if len(crops) < 2 or (pairs and len(batch.global_views) < 2):
            kind = "two global views" if pairs else "two views, the first global"
            raise ValueError(
                f"MMCL needs {kind} as configured, got {len(crops)}; add to views, or raise count"
            )
        features, z = forward_crops(self.backbone, self.projector, crops, cfg.crop_batching)
        self.publish(backbone=features[0], projector=z[0])
        return torch.stack([self._term(z, anchor) for anchor in range(1 + cfg.symmetric)]).mean()

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """``backbone`` and ``projector``."""
        h = self.backbone(x)
        return {"backbone": h, "projector": self.projector(h)}

    def _term(self, z: tuple[Tensor, ...], anchor: int) -> Tensor:
        """The loss of view ``anchor`` against all other crops; only what the SVMs are made of is gathered."""
        cfg, n = self.cfg, len(z[0])
        views = [z[anchor]] if cfg.negatives == "view1" else [z[anchor], z[1 - anchor]]
        pool = torch.cat([gather(view) for view in views] if cfg.gather else views)
        problem, sigma = dual_problem(
            pool,
            anchors=len(pool) // len(views),
            kernel=cfg.kernel,
            sigma=self.sigma,
            sigma_rule=cfg.sigma_rule,
            self_kernel=cfg.self_kernel,
            C=cfg.C,
            reg=cfg.reg,
        )
        solution = self._solve(problem, anchor)
        first = rank() * n if cfg.gather else 0
        queries = z[:anchor] + z[anchor + 1 :]
        if anchor == 0:
            own = pool[: problem.anchors]
            positive, negative = kernel_means(queries[0], own, first=first, kernel=cfg.kernel, sigma=sigma)
            health = dual_health(problem, solution.duals)
            health |= {"pos_kernel_mean": positive, "neg_kernel_mean": negative}
            for name, value in health.items():
                self.record(f"method/{name}", value)
            # Not torch.tensor(number, device=...), whose copy to the device waits for it.
            self.record("method/iterations", solution.duals.new_full((), solution.iterations))
            if isinstance(sigma, Tensor):
                self.record("method/bandwidth", sigma)
            else:
                self.setting("method/sigma", sigma)
        losses = [
            mmcl_loss(
                query,
                pool,
                solution.duals,
                first=first,
                kernel=cfg.kernel,
                sigma=sigma,
                alpha_normalize=cfg.alpha_normalize,
            )
            for query in queries
        ]
        return torch.stack(losses).mean()

    def _solve(self, problem: DualProblem, anchor: int) -> Solution:
        """The duals. ``inv``, and ``pgd_adaptive`` with tol 0, never wait for the device; the others do, to stop."""
        cfg, pgd = self.cfg, self.cfg.pgd
        if cfg.solver == "inv":
            return solve_inv(problem)
        if cfg.solver == "exact":
            return solve_exact(problem)
        if cfg.solver == "pgd_adaptive":
            return solve_adaptive(problem, max_iter=cfg.adaptive.max_iter, tol=cfg.adaptive.tol)
        generator = torch.Generator(problem.gram.device)
        generator.manual_seed(random.Random(f"mmcl {self.seed} {self.step} {anchor}").getrandbits(63))
        start, theta = start_point(problem, pgd.init, generator)
        solution = solve_pgd(
            problem,
            start,
            theta=theta,
            variant=pgd.variant,
            step=pgd.step,
            eta=pgd.eta,
            max_iter=pgd.max_iter,
            stop=pgd.stop,
            tol=pgd.tol,
        )
        limit = (1 if pgd.variant == "nesterov" else 2) / pgd.eta
        if pgd.step == "fixed" and solution.curvature is not None and solution.curvature > limit:
            warnings.warn(
                f"method.pgd.eta={pgd.eta} bears a curvature of {limit:.0f}, the dual problem has up to "
                f"{solution.curvature:.0f}: use method.pgd.step=lipschitz, or method.solver=pgd_adaptive",
                stacklevel=2,
            )
        return solution
