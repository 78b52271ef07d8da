"""The VAE against its maths, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.augment.input_range import InputRange
from lightning_prune.augment.likelihoods import BernoulliLikelihood, GaussianLikelihood
from lightning_prune.augment.networks import dense_sizes
from lightning_prune.augment.vae import VAE, DenseVAE, settings_for


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_terms_are_those_of_the_textbook(shape, likelihood):
    vae = DenseVAE(shape, likelihood=likelihood, kl_weight=0.7).double().eval()
    x = torch.rand(5, *shape, dtype=torch.float64)
    mean, log_variance = vae.encoder(x).chunk(2, dim=1)

    torch.manual_seed(1)
    terms = vae.terms(x)
    torch.manual_seed(1)
    z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    output = vae.decoder(z)
    if likelihood == "bernoulli":
        nats = F.binary_cross_entropy_with_logits(output, x, reduction="sum")
    else:
        variance = torch.tensor(0.1, dtype=torch.float64)
        nats = 0.5 * ((x - output).square() / variance + (2 * math.pi * variance).log()).sum()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
    torch.testing.assert_close(terms.reconstruction, nats / 5, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.loss, terms.reconstruction + 0.7 * kl, rtol=1e-12, atol=0)


def test_elbo_is_a_bound_that_the_true_posterior_reaches():
    """A linear Gaussian VAE has log p(x) in closed form; with q = p(z|x) the ELBO equals it."""
    weight, variance = torch.tensor(1.5).double(), 0.3

    class Encoder(nn.Module):
        """The exact posterior of x = weight * z + noise, or one that is off by ``error``."""

        def __init__(self, error: float) -> None:
            super().__init__()
            self.error = error

        def forward(self, x):
            precision = 1 + weight.square() / variance
            mean = weight * x / variance / precision + self.error
            return torch.cat([mean, torch.full_like(mean, -precision.log().item())], dim=1)

    class Decoder(nn.Module):
        def forward(self, z):
            return weight * z

    def elbo(error: float) -> torch.Tensor:
        vae = VAE(
            Encoder(error),
            Decoder(),
            GaussianLikelihood((1,), variance),
            InputRange((1,), "all", batches=0),
            latent=1,
        ).double()
        return -vae.eval().loss(x)

    x = torch.full((200_000, 1), 0.8, dtype=torch.float64)
    total = weight.square() + variance
    evidence = -0.5 * (0.8**2 / total + (2 * math.pi * total).log())
    assert elbo(0.0).item() == pytest.approx(evidence.item(), abs=3e-3)
    assert elbo(0.5).item() < evidence.item() - 0.1


def test_kl_warmup_rises_linearly_and_only_in_training():
    vae = DenseVAE((4,), warmup=4)
    x = torch.rand(3, 4)
    shares = []
    for _ in range(6):
        terms = vae.terms(x)
        shares.append(((terms.loss - terms.reconstruction) / terms.kl).item())
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-3)

    fresh = DenseVAE((4,), warmup=4).eval()
    terms = fresh.terms(x)
    torch.testing.assert_close(terms.loss, terms.reconstruction + terms.kl)
    assert fresh.steps == 0


@pytest.mark.parametrize("shape", [(5,), (4, 4), (3, 4, 2), (2, 3, 4, 5)])
def test_samples_have_the_shape_of_the_inputs(shape):
    vae = DenseVAE(shape)
    assert vae.sample(7).shape == (7, *shape)
    assert vae.sample(0).shape == (0, *shape)
    assert not vae.sample(2).requires_grad
    assert vae.loss(torch.rand(1, *shape)).ndim == 0


def test_gaussian_samples_have_the_variance_of_the_data():
    """Elements that the latent space does not explain keep their spread through the noise."""
    torch.manual_seed(0)
    x = torch.randn(512, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    vae = DenseVAE((6,), likelihood="gaussian", units="feature")
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        vae.loss(x).backward()
        optimizer.step()
    torch.testing.assert_close(vae.sample(4000).std(0), x.std(0), rtol=0.2, atol=0)


def test_digits_are_learnt(digits):
    """Samples look like digits: near the mean image, each near some real one, not all alike."""
    vae = DenseVAE(**settings_for(digits[:64]))
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        for batch in digits.split(64):
            optimizer.zero_grad()
            loss = vae.loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-29:]) < 0.8 * sum(losses[:29])

    samples = vae.eval().sample(200).flatten(1)
    real = digits.flatten(1)
    assert torch.corrcoef(torch.stack([samples.mean(0), real.mean(0)]))[0, 1] > 0.97
    nearest = torch.cdist(samples, real).min(1).values.mean()
    shuffled = samples.gather(1, torch.rand_like(samples).argsort(1))
    assert nearest < 0.6 * torch.cdist(shuffled, real).min(1).values.mean()
    assert samples.std(0).mean() > 0.4 * real.std(0).mean()
    assert samples.min() >= 0
    assert samples.max() <= 16


def test_settings_build_the_same_vae_again():
    vae = DenseVAE((3, 4), latent=5, hidden=(9, 7), likelihood="gaussian", variance=0.2, warmup=3)
    again = DenseVAE(**vae.settings)
    assert again.settings == vae.settings
    again.load_state_dict(vae.state_dict())


def test_settings_follow_the_data(digits):
    flat = digits.flatten(1)
    table = torch.randn(64, 5) * torch.tensor([1.0, 10.0, 1e2, 1e3, 1e4])
    assert settings_for(digits[:32])["likelihood"] == "bernoulli"
    assert settings_for(flat[:32])["likelihood"] == "bernoulli"
    assert settings_for(flat[:32])["units"] == "all"
    assert settings_for((flat[:32] - 4.8) / 6.0)["likelihood"] == "bernoulli"
    assert settings_for(table) == {
        "shape": [5],
        "likelihood": "gaussian",
        "units": "feature",
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"shape": (3, 0)}, "shape"),
        ({"shape": (3,), "hidden": (4,)}, "hidden"),
        ({"shape": (3,), "hidden": (4, 0)}, "hidden"),
        ({"shape": (3,), "latent": 0}, "latent"),
        ({"shape": (3,), "likelihood": "poisson"}, "likelihood"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        DenseVAE(**arguments)


@pytest.mark.parametrize("features", [1, 7, 64, 784, 3072, 150_528])
def test_default_sizes_stay_small(features):
    sizes = dense_sizes(features)
    assert sizes.outer <= 512
    assert sizes.outer >= sizes.inner >= sizes.latent >= 2


def test_bernoulli_takes_values_outside_its_range_for_its_ends():
    likelihood, logits = BernoulliLikelihood(), torch.randn(4)
    outside = likelihood.log_prob(logits, torch.tensor([-1.0, 2.0, 0.0, 1.0]))
    inside = likelihood.log_prob(logits, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(outside, inside)


def _linear(weights: torch.Tensor, variance: float, *, error: float = 0.0, **arguments) -> VAE:
    """x = weights z + noise, with the exact posterior where it is diagonal, or off by ``error``."""
    precision = 1 + weights.square().sum(0) / variance

    class Encoder(nn.Module):
        def forward(self, x):
            mean = x @ weights / variance / precision + error
            return torch.cat([mean, -precision.log().expand_as(mean)], dim=1)

    class Decoder(nn.Module):
        def forward(self, z):
            return z @ weights.T

    size, latent = weights.shape
    likelihood = GaussianLikelihood((size,), variance)
    identity = InputRange((size,), "all", batches=0)
    vae = VAE(Encoder(), Decoder(), likelihood, identity, latent=latent, **arguments)
    return vae.double().eval()


def test_the_bound_of_each_input_is_its_log_probability_under_ppca():
    """Tipping & Bishop 1999: x ~ N(0, W W^T + s^2 I); orthogonal columns, diagonal posterior."""
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(5, 2).double()).Q
    weights, variance = orthogonal * torch.tensor([2.0, 0.7]).double(), 0.2
    covariance = weights @ weights.T + variance * torch.eye(5).double()
    p = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    x = p.sample((6,))

    exact = _linear(weights, variance)
    # With q = p(z|x) every importance weight equals p(x): no noise at all.
    torch.testing.assert_close(exact.elbo(x, samples=2), p.log_prob(x), rtol=1e-5, atol=1e-5)
    mean = torch.stack([exact.elbo(x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, p.log_prob(x), rtol=0, atol=0.1)

    poor = _linear(weights, variance, error=0.4)
    loose = torch.stack([poor.elbo(x) for _ in range(300)]).mean(0)
    tighter = torch.stack([poor.elbo(x, samples=10) for _ in range(300)]).mean(0)
    assert (loose < tighter).all()
    assert (tighter < p.log_prob(x) + 0.02).all()
    with pytest.raises(ValueError, match="`samples`"):
        exact.elbo(x, samples=0)


def test_the_bound_is_the_loss_by_sample_and_leaves_the_vae_alone(digits):
    vae = DenseVAE((8, 8), likelihood="logistic", levels=17)
    vae.loss(digits[:32])
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.manual_seed(3)
    each = vae.elbo(digits[:50] * 2)
    assert vae.training
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    torch.manual_seed(3)
    terms = vae.eval().terms(digits[:50] * 2)
    torch.testing.assert_close(-each.mean(), terms.reconstruction + terms.kl)


def test_digits_have_a_higher_bound_than_shuffled_ones(digits):
    vae = DenseVAE((8, 8), likelihood="logistic", levels=17)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in digits[:1500].split(64):
            optimizer.zero_grad()
            vae.loss(batch).backward()
            optimizer.step()
    real = digits[1500:]
    order = torch.rand(real.flatten(1).shape).argsort(1)
    shuffled = real.flatten(1).gather(1, order).view_as(real)
    assert (vae.elbo(real) > vae.elbo(shuffled)).double().mean() > 0.95
    assert set(vae.sample(100).unique().tolist()) <= set(range(17))


def test_the_kl_is_that_of_monte_carlo():
    vae = DenseVAE((4,), latent=3).double().eval()
    with torch.no_grad():
        vae.encoder[-1].bias.copy_(torch.tensor([0.5, -1.0, 0.2, -1.0, 0.3, 0.0]))
    x = torch.rand(2, 4).double()
    q = vae.posterior(x)
    torch.manual_seed(0)
    z = q.sample((100_000,))
    sampled = (q.log_prob(z) - vae.prior().log_prob(z)).mean(0)
    torch.testing.assert_close(vae.terms(x).kl, sampled.mean(), rtol=0, atol=0.02)


def test_free_bits_are_a_floor_for_each_dimension_and_kl_is_reported_raw():
    vae = DenseVAE((4,), latent=3, free_bits=0.3).double().eval()
    with torch.no_grad():
        vae.encoder[-1].weight.zero_()
        vae.encoder[-1].bias.copy_(torch.tensor([2.0, 0.1, 0.0, 0.0, 0.0, 0.0]))
    terms = vae.terms(torch.rand(5, 4).double())
    assert terms.kl.item() == pytest.approx(2.0 + 0.005)
    assert (terms.loss - terms.reconstruction).item() == pytest.approx(2.0 + 0.3 + 0.3)

    (terms.loss - terms.reconstruction).backward()
    # Only the dimension above the floor is pulled towards the prior.
    assert vae.encoder[-1].bias.grad[:3].tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_reconstructions_and_interpolations_are_those_of_posterior_means(digits):
    vae = DenseVAE((8, 8))
    vae.loss(digits)
    x, other = digits[:3], digits[3:6]
    a, b = (vae.encoder(part / 16).chunk(2, 1)[0] for part in (x, other))
    t = torch.tensor([0.0, 0.25, 1.0])
    expected = 16 * vae.decoder(a + t[:, None] * (b - a)).sigmoid()
    torch.testing.assert_close(vae.interpolate(x, other, t), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.reconstruct(x)[0], expected[0], rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    vae.interpolate(x, other, 0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training


def test_a_collapse_is_seen_after_the_warmup_only():
    vae = DenseVAE((4,), warmup=300)
    assert not vae.collapsed(0.0)
    vae.steps.fill_(299)
    assert not vae.collapsed(0.0)
    vae.steps.fill_(300)
    assert vae.collapsed(torch.tensor(0.04))
    assert not vae.collapsed(0.06)
    assert not vae.collapsed(float("nan"))
    hasty = DenseVAE((4,), warmup=0)
    hasty.steps.fill_(5)
    assert not hasty.collapsed(0.0)  # no VAE has learnt anything by then


def test_settings_of_earlier_checkpoints_still_build_a_vae():
    earlier = {
        name: value
        for name, value in DenseVAE((3,)).settings.items()
        if name not in ("levels", "free_bits", "classes")
    }
    built, saved = DenseVAE(**earlier), DenseVAE((3,)).state_dict()
    built.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in built.state_dict().items())
