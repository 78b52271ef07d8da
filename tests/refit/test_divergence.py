from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.conjugate_gradient import conjugate_gradient
from lightning_prune.refit.divergence import Output, divergence
from lightning_prune.refit.merging import first_samples, merge_batches

CG = "lightning_prune.refit.conjugate_gradient"
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def logits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(shape, generator=generator).double() for _ in range(2))


def slow(likelihood: str, z: torch.Tensor, dense: torch.Tensor, t: float) -> torch.Tensor:
    if likelihood == "categorical":
        z, dense = z.movedim(1, -1) / t, dense.movedim(1, -1) / t
        return kl_divergence(Categorical(logits=dense), Categorical(logits=z)).sum()
    if likelihood == "bernoulli":
        return kl_divergence(Bernoulli(logits=dense / t), Bernoulli(logits=z / t)).sum()
    return kl_divergence(Normal(dense, torch.ones(())), Normal(z, torch.ones(()))).sum()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2)])
def test_value_gradient_and_curvature_are_those_of_autograd(likelihood, shape):
    z, dense = logits(*shape)
    output = Output(likelihood, 1.7)
    assert torch.allclose(output.divergence(z, dense), slow(likelihood, z, dense, 1.7))
    gradient = torch.func.grad(lambda z: slow(likelihood, z, dense, 1.7))(z)
    assert torch.allclose(output.gradient(z, dense), gradient)
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    _, product = torch.autograd.functional.hvp(lambda z: slow(likelihood, z, dense, 1.7), z, vector)
    assert torch.allclose(output.curvature(z, vector), product)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_sure_network_has_a_finite_divergence(likelihood):
    z, dense = torch.tensor([[200.0, -300.0]]), torch.tensor([[-200.0, 300.0]])
    assert 400 < Output(likelihood).divergence(z, dense) < 1e6


def test_divergence_is_a_mean_over_the_samples_checked_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3))
    dense = Teacher.of(model)
    x = torch.randn(50, 4)
    z = model.eval()(x)
    model.train()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    random_state = torch.get_rng_state()
    parts = [(part, None) for part in x.split(7)]
    found = divergence(model, Calibration(dense, [], parts), temperature=3.0)
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    expected = slow("categorical", model.eval()(x), z, 3.0) / len(x)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    only = divergence(model, Calibration(dense, [x], []), temperature=3.0)
    assert only == pytest.approx(found, rel=1e-6)  # without any held out, those fitted to


def test_divergence_refuses_what_it_cannot_measure():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has none"):
        divergence(model, Calibration(Teacher.of(model), [], []))
    with pytest.raises(ValueError, match="temperature"):
        divergence(model, Calibration(Teacher.of(model), [torch.ones(1, 2)], []), temperature=0)


def test_merging_keeps_samples_order_and_form():
    batches = [{"x": torch.arange(i, i + 3), "y": [torch.ones(3, 2)]} for i in range(0, 15, 3)]
    merged = list(merge_batches(batches, at_most=7))
    assert [len(batch["x"]) for batch in merged] == [6, 6, 3]
    assert torch.equal(torch.cat([batch["x"] for batch in merged]), torch.arange(15))
    assert merged[0]["y"][0].shape == (6, 2)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, 4),  # another shape
        torch.ones(2, 3, dtype=torch.float64),
        (torch.ones(2, 3), torch.ones(2)),  # another form
        (torch.ones(2, 3), "a word"),
        (torch.ones(2, 3), torch.tensor(1.0)),  # not one entry a sample
    ],
)
def test_what_does_not_fit_together_stays_apart(other):
    plain = torch.ones(2, 3)
    sizes = [
        len(torch.utils._pytree.tree_leaves(b)[0])
        for b in merge_batches([plain, plain, other, other])
    ]
    together = not isinstance(other, tuple) or all(
        isinstance(t, torch.Tensor) and t.ndim for t in other
    )
    assert sizes == ([4, 4] if together else [4, 2, 2])


def test_first_samples_cuts_the_last_batch():
    taken = first_samples([torch.arange(4), torch.arange(4, 8), torch.arange(8, 12)], 6)
    assert torch.cat(taken).tolist() == [0, 1, 2, 3, 4, 5]


def test_conjugate_gradient_solves_and_reports_its_value():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator).double()
    a = root @ root.T + torch.diag(torch.logspace(-2, 2, 12).double())
    b = torch.randn(12, generator=generator).double()
    values = []
    for products in range(1, 40):
        x, value = conjugate_gradient(lambda v: a @ v, b, products)
        assert value == pytest.approx(float(x @ a @ x / 2 - b @ x), rel=1e-9)
        values.append(value)
    assert values[0] < 0
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert torch.allclose(x, torch.linalg.solve(a, b), rtol=1e-4)


@pytest.mark.parametrize("remembered", ["all", "four", "none"])
def test_conjugate_gradient_does_not_hang_on_the_order_of_sums(remembered, monkeypatch):
    """A few large eigenvalues, as a network's: the Ritz values that find them spoil plain ones."""
    size, products = 200, 30
    if remembered != "all":
        count = {"four": 4, "none": 0}[remembered]
        monkeypatch.setattr(f"{CG}.REMEMBERED_BYTES", count * 8 * size)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    a = basis * torch.logspace(-4, 4, size).double() @ basis.T
    b = torch.randn(size, generator=generator).double()
    order = torch.randperm(size, generator=generator)
    x, value = conjugate_gradient(lambda v: a @ v, b, products)
    mixed = a[order][:, order]
    y, other = conjugate_gradient(lambda v: mixed @ v, b[order], products)
    difference = float((y - x[order]).norm() / x.norm())
    if remembered == "all":
        assert difference < 1e-9
        assert value == pytest.approx(other, rel=1e-10)
    else:  # what is not remembered spoils the digits, not the descent
        assert 1e-9 < difference < 0.5
        assert value == pytest.approx(other, rel=0.1)
        assert value < 0


def test_conjugate_gradient_stops_where_the_operator_bends_down():
    x, value = conjugate_gradient(lambda v: torch.tensor([1.0, -5.0]) * v, torch.ones(2), 5)
    assert torch.equal(x, torch.zeros(2))
    assert value == 0
    x, _ = conjugate_gradient(lambda v: v * float("nan"), torch.ones(2), 5)
    assert torch.equal(x, torch.zeros(2))
