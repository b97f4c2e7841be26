"""SimCLR: the loss against the reference numbers that the SogCLR authors' baseline gave, and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.testing.golden import load_cases
from sslzoo_methods.simclr.loss import nt_xent
from tests.conftest import GOLDEN

NTXENT = [case for case in load_cases(GOLDEN / "sogclr", {}) if case.kind == "ntxent"]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("case", NTXENT, ids=lambda case: case.name)
def test_equals_the_reference(case, precision):
    arrays = case.tensors(precision)
    h = [arrays["h1"].requires_grad_(), arrays["h2"].requires_grad_()]
    z = [normalize(x) for x in h]
    loss = 2 * nt_xent(
        z, z, offset=0, temperature=case.hyper["temperature"]
    )  # theirs sums the two directions
    loss.backward()
    case.check({"loss": loss, "grad_h1": h[0].grad, "grad_h2": h[1].grad}, precision)


def test_three_views_by_brute_force():
    z = [normalize(torch.randn(4, 5, dtype=torch.float64)) for _ in range(3)]
    globals_, tau = z[:2], 0.3
    terms = []
    for v in range(3):
        for i in range(4):
            others = [(g, j) for g in range(2) for j in range(4) if (g, j) != (v, i)]
            exps = {(g, j): torch.exp(z[v][i] @ globals_[g][j] / tau) for g, j in others}
            per_anchor = [-torch.log(exps[g, i] / sum(exps.values())) for g in range(2) if g != v]
            terms.append(torch.stack(per_anchor).mean())
    got = nt_xent(z, globals_, offset=0, temperature=tau)
    torch.testing.assert_close(got, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_gradient_by_finite_differences():
    z = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        views = [normalize(a), normalize(b)]
        return nt_xent(views, views, offset=0, temperature=0.2)

    assert torch.autograd.gradcheck(loss, tuple(z))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.temperature=0", "method.temperature: must be positive, got 0.0"),
        ("method.projector.widths=[]", "method.projector.widths: must hold at least the embedding width"),
        (
            "method.projector=[512, 128]",
            "method.projector: expected a section with the keys widths, hidden_norm",
        ),
        ("views.0.count=1", "views: must have at least two global views, got 1; set count: 2"),
    ],
)
def test_refusals(override, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe("simclr_fashion_mnist", [override])
    assert said in str(caught.value)
