"""Products in full float32, forwards and backwards, whatever torch's settings allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslzoo.nn.numerics import ieee_matmul, normalize, product
from sslzoo_methods.margin.factors import NO_MARGIN, Chunk
from sslzoo_methods.margin.loss import contrast, contrast_queue, margin_loss, margin_push, view_alignment
from sslzoo_methods.metaug.loss import Contrast, bank_objective, batch_objective
from sslzoo_methods.mmcl.kernels import Kernel, bandwidth
from sslzoo_methods.mmcl.loss import dual_health, dual_problem, kernel_means, mmcl_loss, normalized
from sslzoo_methods.mmcl.solvers import solve_adaptive
from sslzoo_methods.sce.loss import TermWeights, crop_pairs, sce_loss, sce_multicrop_loss
from sslzoo_methods.simclr.loss import nt_xent, nt_xent_lean
from sslzoo_methods.sogclr.bimodal import bimodal_loss
from sslzoo_methods.sogclr.loss import gcl_columns_loss, gcl_loss, gcl_loss_lean, ntxent_loss

BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
N, D = 6, 5


class Products(TorchDispatchMode):
    """Notes, at every matrix product, the precision in force and the type of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []  # CUDA, CPU, type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}:
            self.seen.append((*(b.fp32_precision for b in BACKENDS), args[-1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["high", "tf32"])
def lowered(request: pytest.FixtureRequest) -> Iterator[None]:
    """TF32 by the older of torch's settings, and by the newer, which makes it refuse to read the older."""
    before = [b.fp32_precision for b in BACKENDS]
    if request.param == "high":
        torch.set_float32_matmul_precision("high")
    else:
        BACKENDS[0].fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def _fail_inside() -> None:
    with ieee_matmul():
        raise RuntimeError("on purpose")


@pytest.mark.usefixtures("lowered")
def test_the_setting_is_as_before_also_after_an_error() -> None:
    before = [b.fp32_precision for b in BACKENDS]
    assert "tf32" in before
    with ieee_matmul():
        assert {b.fp32_precision for b in BACKENDS} <= {"ieee", "none"}
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_inside()
    assert [b.fp32_precision for b in BACKENDS] == before


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))])
def test_a_product_is_differentiable_twice(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(product, (a, b))
    assert torch.autograd.gradgradcheck(product, (a, b))
    if a.ndim == 2:
        c = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda a, b, c: product(a, b, addend=c), (a, b, c))


@pytest.mark.parametrize("swap", [False, True])
def test_a_product_is_torchs_to_the_bit(swap: bool) -> None:
    """So are its gradients, also of a transposed factor."""
    results = []
    for multiply in (product, torch.matmul):
        torch.manual_seed(0)
        a, b = torch.randn(31, 17, requires_grad=True), torch.randn(29, 17, requires_grad=True)
        out = multiply(b, a.T) if swap else multiply(a, b.T)
        results.append((out, *torch.autograd.grad((out.square() * 0.3).sum(), (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# -- the methods' losses ----------------------------------------------------------------------------------


def _mmcl(z: Tensor) -> Tensor:
    sigma = bandwidth(z[0], sigma=1.0, rule="median")
    problem = dual_problem(z[0], anchors=N, kernel=Kernel("rbf", sigma), self_term="one", C=1.0, reg=0.1)
    duals = solve_adaptive(problem, max_iter=10, tol=1e-3).duals
    dual_health(problem, duals)
    kernel_means(z[1], z[0], first=0, kernel=Kernel("rbf", sigma))
    return mmcl_loss(z[1], z[0], normalized(duals), first=0, kernel=Kernel("rbf", sigma))


GCL: dict[str, Any] = {
    "temperature": 0.1,
    "gamma": 0.8,
    "first_visit": "sample",
    "u_floor": None,
    "offset": 0,
}
EMPTY = torch.full((N,), -torch.inf)


def _gcl(form: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda z: form(z[:2], z, EMPTY, u_write="mean", **GCL)[0]


def _bimodal(z: Tensor) -> Tensor:
    options = GCL | {"temperature": [0.1, 0.1], "scale": "mean"}
    return bimodal_loss([z[0], z[1]], [z[2], z[3]], [EMPTY, EMPTY], **options)[0]


def _margin(chunk: int | None) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        push = partial(margin_push, margin=NO_MARGIN, temperature=0.1, beta=1.0)
        options: dict[str, Any] = {"temperature": 0.1, "chunk": chunk and Chunk(chunk, push)}
        rows = torch.arange(N)
        pairs = [
            contrast(z[0], z[1], rows, own=None, **options),
            contrast_queue(z[1], z[2], z[3].detach(), **options),
        ]
        losses = [margin_loss(p, NO_MARGIN, temperature=0.1, beta=1.0, detached=False) for p in pairs]
        return torch.stack(losses).mean() + view_alignment(list(z))

    return loss


def _metaug(banks: bool) -> Callable[[Tensor], Tensor]:
    """With a second derivative, as the meta step takes it."""

    def loss(z: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "contrast": Contrast(8.0, 1.0, None),
            "margin": None,
            "generated_weight": 0.5,
            "local": [z[0].flip(0)],
        }
        original, generated = list(z[:2]), list(z[2:])
        if banks:
            keys = normalize(torch.randn(4, 2, N, 4, D)).unbind()
            value = bank_objective(original, generated, keys, **options).loss
        else:
            keys = torch.stack(original)
            value = batch_objective(original, generated, keys, offset=0, query_keys=z, **options).loss
        (gradient,) = torch.autograd.grad(value, z, create_graph=True)
        return value + gradient.square().sum()

    return loss


def _sce(z: Tensor) -> Tensor:
    options: dict[str, Any] = {
        "first_row": 0,
        "queue": z[3],
        "temperature": 0.1,
        "target_temperature": 0.07,
        "target_positive": "masked",
    }
    dense = sce_loss(z[0], z[1], keys=z[2], contrastive_weight=0.5, **options).terms.loss
    pairs, weights = crop_pairs(2, 2, symmetric=True, weighting="flat"), TermWeights.sce(0.5)
    keys = [z[1], z[2]]
    return dense + sce_multicrop_loss(keys, keys, pairs, keys=keys, weights=weights, **options).terms.loss


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "simclr": lambda z: nt_xent(list(z), list(z[:2]), offset=0, temperature=0.1),
    "simclr-lean": lambda z: nt_xent_lean(list(z), list(z[:2]), offset=0, temperature=0.1),
    "mmcl": _mmcl,
    "sogclr": _gcl(gcl_loss_lean),
    "sogclr-dense": _gcl(gcl_loss),
    "sogclr-columns": lambda z: gcl_columns_loss(
        z, z[:2].detach(), torch.zeros(2, N), temperature=0.1, u_floor=None, offset=0
    ),
    "sogclr-ntxent": lambda z: ntxent_loss(z[:2], z, temperature=0.1, offset=0),
    "sogclr-bimodal": _bimodal,
    "margin": _margin(None),
    "margin-chunks": _margin(4),
    "metaug": _metaug(False),
    "metaug-bank": _metaug(True),
    "sce": _sce,
}


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_full_float32_forwards_and_backwards(name: str) -> None:
    """Under autocast too."""
    leaf = torch.randn(4, N, D, requires_grad=True)
    before = [b.fp32_precision for b in BACKENDS]
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        LOSSES[name](normalize(leaf)).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert products.seen
    for *precisions, dtype in products.seen:
        assert set(precisions) <= {"ieee", "none"} and dtype == torch.float32
    assert [b.fp32_precision for b in BACKENDS] == before
