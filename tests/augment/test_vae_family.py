"""The maths of the VAEs' parts: likelihoods, bounds, free bits, conditions, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from lightning_prune.augment.conv_vae import ConvVAE, recipe_of, vae_from
from lightning_prune.augment.likelihoods import DiscretisedLogisticLikelihood
from lightning_prune.augment.vae import VAE, DenseVAE


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing by threads, which wait for one another when busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float().div(16).reshape(-1, 8, 8), torch.from_numpy(y).long()


def trained(vae: VAE, *data: Tensor, steps: int = 600) -> VAE:
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    for _ in range(steps):
        index = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        vae.loss(*(part[index] for part in data)).backward()
        optimizer.step()
    return vae.eval()


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_the_levels_of_a_discretised_logistic_have_a_probability_of_one(levels) -> None:
    likelihood = DiscretisedLogisticLikelihood((3,), levels).double()
    output = torch.tensor([-0.3, 0.4, 1.2], dtype=torch.float64)
    grey = torch.linspace(0, 1, levels, dtype=torch.float64)[:, None].expand(levels, 3)
    total = likelihood.log_prob(output.expand(levels, 3), grey).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))


def test_a_level_has_the_mass_of_its_bin() -> None:
    likelihood = DiscretisedLogisticLikelihood((), 9).double()
    scale, output = likelihood.scale().item(), 0.37
    for k in range(9):
        upper = 1.0 if k == 8 else torch.sigmoid(torch.tensor(((k + 0.5) / 8 - output) / scale))
        lower = 0.0 if k == 0 else torch.sigmoid(torch.tensor(((k - 0.5) / 8 - output) / scale))
        found = likelihood.log_prob(torch.tensor(output).double(), torch.tensor(k / 8).double())
        assert found.exp().item() == pytest.approx(float(upper - lower), rel=1e-4)


@pytest.mark.parametrize("free_bits", [0.0, 0.3])
def test_the_loss_is_its_twin_in_double_precision(free_bits) -> None:
    vae = DenseVAE((5,), latent=3, likelihood="gaussian", free_bits=free_bits, warmup=0).double()
    x = torch.rand(7, 5, dtype=torch.float64)
    vae.train()
    vae.terms(x)  # learns the range
    vae.eval()
    torch.manual_seed(3)
    terms = vae.terms(x)
    torch.manual_seed(3)
    unit = (x - vae.input_range.low) / (vae.input_range.high - vae.input_range.low)
    mean, log_variance = vae.encoder(unit).chunk(2, 1)
    z = mean + (0.5 * log_variance).exp() * torch.randn(7, 3, dtype=torch.float64)
    variance = vae.likelihood.deviation() ** 2
    log_p = -0.5 * ((unit - vae.decoder(z)) ** 2 / variance + (2 * math.pi * variance).log())
    each = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    torch.testing.assert_close(terms.reconstruction, -log_p.sum() / 7)
    torch.testing.assert_close(terms.kl, each.sum(1).mean())
    counted = each.mean(0).clamp(min=free_bits).sum() if free_bits else each.sum(1).mean()
    torch.testing.assert_close(terms.loss, terms.reconstruction + counted)


def test_more_samples_make_a_tighter_bound_and_none_beats_log_p() -> None:
    # A linear decoder: log p(x) is that of a Normal (Tipping and Bishop 1999).
    torch.manual_seed(0)
    vae = DenseVAE((4,), latent=2, likelihood="gaussian", variance=0.5).double()
    linear = nn.Linear(2, 4).double()
    vae.decoder = linear
    vae.input_range.observe(torch.tensor([[0.0] * 4, [1.0] * 4]).double())
    x = torch.rand(6, 4, dtype=torch.float64)
    covariance = linear.weight @ linear.weight.T + 0.5 * torch.eye(4, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(linear.bias, covariance).log_prob(x)
    one = torch.stack([vae.elbo(x) for _ in range(400)]).mean(0)
    many = torch.stack([vae.elbo(x, samples=64) for _ in range(50)]).mean(0)
    assert bool((one < exact).all())
    assert bool(((exact - many).abs() < (exact - one).abs()).all())
    torch.testing.assert_close(many, exact.detach(), atol=0.05, rtol=0)


def test_the_elbo_of_samples_is_their_mean_loss() -> None:
    vae = trained(DenseVAE((8, 8), warmup=0), digits()[0], steps=50)
    x = digits()[0][:200]
    torch.manual_seed(0)
    mean = torch.stack([-vae.elbo(x).mean() for _ in range(20)]).mean()
    losses = torch.stack([vae.loss(x) for _ in range(20)]).mean()
    torch.testing.assert_close(mean, losses.detach(), rtol=0.02, atol=0)


def test_the_closed_form_is_the_divergence_of_the_distributions() -> None:
    vae = DenseVAE((6,), latent=2)
    posterior = vae.posterior(torch.rand(5, 6))
    z = posterior.sample((20_000,))
    estimate = (posterior.log_prob(z) - vae.prior().log_prob(z)).mean(0)
    exact = kl_divergence(posterior, Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    torch.testing.assert_close(estimate, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 15, 21), (9, 7), (50,), (2, 5, 6, 7), (1, 1, 1)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
def test_convolutional_vaes_take_any_size(shape, likelihood) -> None:
    vae = ConvVAE(shape, likelihood=likelihood, classes=3)
    x, y = torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])
    vae.loss(x, y).backward()
    assert all(bool(p.grad.isfinite().all()) for p in vae.parameters() if p.grad is not None)
    assert vae.sample(5).shape == (5, *shape)
    assert vae.reconstruct(x, y).shape == x.shape


@pytest.mark.parametrize("kind", [DenseVAE, ConvVAE])
def test_a_conditional_vae_draws_what_it_is_asked_for(kind) -> None:
    torch.manual_seed(0)
    x, y = digits()
    vae = trained(kind((8, 8), classes=10), x, y, steps=900)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    for _ in range(400):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(judge(x[index]), y[index]).backward()
        optimizer.step()
    samples, labels = vae.sample_labelled(500)
    assert float((judge(samples).argmax(1) == labels).float().mean()) > 0.8
    assert len(labels.unique()) == 10
    threes = vae.sample(20, torch.full((20,), 3))
    assert float((judge(threes).argmax(1) == 3).float().mean()) > 0.6


def test_conditions_are_checked() -> None:
    x = torch.rand(2, 4)
    with pytest.raises(ValueError, match="label"):
        DenseVAE((4,), classes=3).loss(x)
    with pytest.raises(ValueError, match="class"):
        DenseVAE((4,), classes=3).loss(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="unconditional"):
        DenseVAE((4,)).sample(2, torch.tensor([0, 1]))


def test_interpolations_start_and_end_at_the_reconstructions() -> None:
    vae = trained(DenseVAE((8, 8)), digits()[0], steps=100)
    x, other = digits()[0][:5], digits()[0][5:10]
    torch.testing.assert_close(vae.interpolate(x, other, 0.0), vae.reconstruct(x))
    torch.testing.assert_close(vae.interpolate(x, other, 1.0), vae.reconstruct(other))
    middle = vae.interpolate(x, other, torch.full((5,), 0.5))
    assert not torch.allclose(middle, vae.reconstruct(x), atol=1e-3)


def test_a_collapsed_posterior_is_told_from_a_young_one() -> None:
    vae = DenseVAE((4,), warmup=10)
    assert not vae.collapsed(0.0)
    vae.steps.fill_(1000)
    assert vae.collapsed(0.01)
    assert not vae.collapsed(3.0)


@pytest.mark.parametrize("vae", [DenseVAE((4, 4), classes=2), ConvVAE((4, 4), free_bits=0.1)])
def test_a_recipe_builds_the_same_kind_again(vae) -> None:
    again = vae_from(recipe_of(vae))
    assert type(again) is type(vae)
    again.load_state_dict(vae.state_dict())
    assert recipe_of(nn.Linear(1, 1)) is None
