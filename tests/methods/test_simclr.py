"""SimCLR: the loss against the reference numbers that the SogCLR authors' baseline gave, and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslzoo.nn.numerics import normalize
from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.testing.golden import load_cases
from sslzoo_methods.simclr.loss import nt_xent, nt_xent_lean
from tests.conftest import GOLDEN

NTXENT = [case for case in load_cases(GOLDEN / "sogclr", {}) if case.kind == "ntxent"]


FORMS = [nt_xent, nt_xent_lean]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("case", NTXENT, ids=lambda case: case.name)
def test_equals_the_reference(case, precision, form):
    arrays = case.tensors(precision)
    h = [arrays["h1"].requires_grad_(), arrays["h2"].requires_grad_()]
    z = [normalize(x) for x in h]
    loss = 2 * form(z, z, offset=0, temperature=case.hyper["temperature"])  # theirs sums the two directions
    loss.backward()
    case.check({"loss": loss, "grad_h1": h[0].grad, "grad_h2": h[1].grad}, precision)


@pytest.mark.parametrize("form", FORMS)
def test_three_views_by_brute_force(form):
    z = [normalize(torch.randn(4, 5, dtype=torch.float64)) for _ in range(3)]
    globals_, tau = z[:2], 0.3
    terms = []
    for v in range(3):
        for i in range(4):
            others = [(g, j) for g in range(2) for j in range(4) if (g, j) != (v, i)]
            exps = {(g, j): torch.exp(z[v][i] @ globals_[g][j] / tau) for g, j in others}
            per_anchor = [-torch.log(exps[g, i] / sum(exps.values())) for g in range(2) if g != v]
            terms.append(torch.stack(per_anchor).mean())
    got = form(z, globals_, offset=0, temperature=tau)
    torch.testing.assert_close(got, torch.stack(terms).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_by_finite_differences(form):
    z = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        views = [normalize(a), normalize(b)]
        return form(views, views, offset=0, temperature=0.2)

    assert torch.autograd.gradcheck(loss, tuple(z))


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.005])
def test_lean_equals_dense(temperature, monkeypatch):
    monkeypatch.setattr("sslzoo.nn.streaming.BLOCK", {"cpu": 64})  # blocks of two anchors
    z = [normalize(torch.randn(16, 7, dtype=torch.float64)) for _ in range(3)]  # the last is a local crop
    mine = slice(5, 10)  # of the second of several ranks
    found = []
    for form in FORMS:
        anchors = [x[mine].clone().requires_grad_() for x in z]
        candidates = [x.clone().requires_grad_() for x in z[:2]]
        loss = form(anchors, candidates, offset=5, temperature=temperature)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*anchors, *candidates])])
    for dense, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, dense, rtol=1e-10, atol=1e-12)


def test_lean_float32_is_as_accurate_as_dense():
    views = [normalize(torch.randn(200, 32)) for _ in range(2)]
    views[1] = normalize(views[0] + 0.3 * views[1])

    def gradient(form, precision):
        z = [x.clone().to(precision).requires_grad_() for x in views]
        return torch.stack(torch.autograd.grad(form(z, z, offset=0, temperature=0.2), z)).double()

    exact = gradient(nt_xent, torch.float64)
    error = [float((gradient(f, torch.float32) - exact).abs().max() / exact.abs().max()) for f in FORMS]
    assert error[1] < max(2 * error[0], 4e-7)


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
