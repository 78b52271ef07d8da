"""The likelihoods against torch's distributions and against their own samples, in float64."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.augment.likelihoods import (
    DiscretisedLogisticLikelihood,
    build_likelihood,
)


def _logistic(shape=(), levels=256, scale=0.1):
    likelihood = DiscretisedLogisticLikelihood(shape, levels).double()
    with torch.no_grad():
        likelihood.log_scale.fill_(torch.tensor(scale).log())
    return likelihood


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("scale", [0.003, 0.1, 5.0])
def test_probabilities_of_all_levels_sum_to_one(levels, scale):
    likelihood = _logistic(levels=levels, scale=scale)
    grid = torch.linspace(0, 1, levels).double()
    for output in (-3.0, 0.0, 0.237, 1.0, 4.0):
        log_p = likelihood.log_prob(torch.full((levels,), output).double(), grid)
        torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-9)


def test_each_level_has_the_mass_of_its_bin():
    levels, scale, output = 9, 0.2, torch.tensor(0.3).double()
    likelihood = _logistic(levels=levels, scale=scale)
    for level in range(levels):
        upper = 1.0 if level == levels - 1 else torch.sigmoid(((level + 0.5) / 8 - output) / scale)
        lower = 0.0 if level == 0 else torch.sigmoid(((level - 0.5) / 8 - output) / scale)
        log_p = likelihood.log_prob(output, torch.tensor(level / 8).double())
        assert log_p.exp().item() == pytest.approx(float(upper - lower), rel=1e-5)


def test_far_levels_keep_a_finite_probability_and_gradient():
    likelihood = DiscretisedLogisticLikelihood((1,), 256)
    with torch.no_grad():
        likelihood.log_scale.fill_(-30.0)
    output = torch.tensor([[50.0], [-50.0], [0.5]], requires_grad=True)
    log_p = likelihood.log_prob(output, torch.tensor([[0.0], [1.0], [0.1]]))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert output.grad.isfinite().all()


def test_samples_are_levels_with_the_probabilities_of_log_prob():
    torch.manual_seed(0)
    likelihood = _logistic(levels=5, scale=0.15)
    samples = likelihood.sample(torch.full((40_000,), 0.35).double())
    grid = torch.linspace(0, 1, 5).double()
    drawn = torch.stack([(samples == level).double().mean() for level in grid])
    assert drawn.sum() == pytest.approx(1.0)  # nothing between the levels
    expected = likelihood.log_prob(torch.full((5,), 0.35).double(), grid).exp()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.01)


def test_the_scale_is_learnt():
    torch.manual_seed(0)
    x = _logistic(levels=256, scale=0.03).sample(torch.full((2000, 1), 0.5).double()).detach()
    likelihood = DiscretisedLogisticLikelihood((1,), 256).double()
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-likelihood.log_prob(torch.full_like(x, 0.5), x).mean()).backward()
        optimizer.step()
    assert likelihood.scale().item() == pytest.approx(0.03, rel=0.07)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "logistic"])
def test_the_location_is_what_samples_scatter_around(name):
    torch.manual_seed(0)
    likelihood = build_likelihood(name, (3,), variance=0.01, levels=101)
    output = torch.tensor([0.4, 0.5, 0.6])
    if name == "logistic":
        with torch.no_grad():
            likelihood.log_scale.fill_(-3.5)
    mean = likelihood.sample(output.expand(20_000, 3)).mean(0)
    torch.testing.assert_close(likelihood.location(output), mean, rtol=0, atol=5e-3)
