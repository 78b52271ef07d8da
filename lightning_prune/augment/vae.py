"""A variational autoencoder: (N, *shape) -> its negative ELBO in nats, n -> n new inputs.

Maximises E_q[log p(x|z)] - KL(q(z|x) || p(z)) (Kingma & Welling 2014, "Auto-encoding variational
Bayes"). The encoder, decoder and likelihood are parts (networks.py, likelihoods.py); another kind
of VAE is another choice of parts.

Anything with ``loss(x) -> scalar Tensor`` and ``sample(n) -> Tensor`` can stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from lightning_prune.augment.input_range import InputRange, Units, find_units
from lightning_prune.augment.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    LikelihoodName,
)
from lightning_prune.augment.networks import (
    DenseDecoder,
    DenseEncoder,
    DenseSizes,
    dense_sizes,
)

RANGE_BATCHES = 50
"""How many batches widen the input range: rare elements (the rim of a digit) show late."""

KL_WARMUP = 200
"""Steps until the KL term has its full weight. On small grey pictures (8 x 8 digits) a posterior
that meets the whole term at once collapses onto the prior and needs twice the steps to recover."""


class Terms(NamedTuple):
    """The parts of a VAE's loss, each a scalar tensor in nats per sample.

    ``loss = reconstruction + weight * kl``, with the KL weight of the moment; the negative ELBO is
    ``reconstruction + kl``.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


class VAE(nn.Module):
    """A VAE with a standard normal prior, put together from its parts.

    Args:
        encoder: (N, *shape) -> (N, 2 L), mean and log-variance of q(z|x).
        decoder: (N, L) -> (N, *shape), the likelihood's natural parameter.
        likelihood: p(x|z), see likelihoods.py.
        input_range: The user's range <-> [0, 1]; learns in training mode.
        latent: L.
        kl_weight: Weight of the KL term once warmed up; 1 is the ELBO.
        warmup: Training steps over which the KL weight rises linearly from ``kl_weight / warmup``,
            which keeps the posterior from collapsing onto the prior before the decoder has learnt
            anything (Bowman et al. 2016); 0 for none.

    Every random number comes from torch's global generator: wrap calls in ``own_randomness``.
    """

    prior_mean: Tensor
    steps: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: BernoulliLikelihood | GaussianLikelihood,
        input_range: InputRange,
        *,
        latent: int,
        kl_weight: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.likelihood, self.input_range = likelihood, input_range
        self.latent, self.kl_weight, self.warmup = latent, kl_weight, warmup
        self.register_buffer("prior_mean", torch.zeros(latent))
        self.register_buffer("steps", torch.tensor(0))

    def loss(self, x: Tensor) -> Tensor:
        """Return the loss of a batch (N, *shape), in nats per sample."""
        return self.terms(x).loss

    def terms(self, x: Tensor) -> Terms:
        """Return the loss of a batch and its parts. In training mode this counts as a step."""
        x = x.to(self.prior_mean.dtype)
        if self.training:
            self.input_range.observe(x)
            self.steps += 1
        unit = self.input_range(x)
        posterior = self.posterior(unit)
        output = self.decoder(posterior.rsample())
        reconstruction = -self.likelihood.log_prob(output, unit).sum() / len(x)
        kl = kl_divergence(posterior, self.prior()).mean()
        return Terms(reconstruction + self.current_kl_weight() * kl, reconstruction, kl)

    def posterior(self, unit: Tensor) -> Independent[Normal]:
        """Return q(z|x) for inputs in units of the range: a diagonal Normal over (N, L)."""
        mean, log_variance = self.encoder(unit).chunk(2, dim=1)
        # e^6 and e^-12 are far outside what training visits; beyond them exp overflows.
        deviation = (0.5 * log_variance.clamp(-12.0, 6.0)).exp()
        return Independent(Normal(mean, deviation, validate_args=False), 1, validate_args=False)

    def prior(self) -> Independent[Normal]:
        """Return p(z) = Normal(0, I)."""
        deviation = torch.ones_like(self.prior_mean)
        unit = Normal(self.prior_mean, deviation, validate_args=False)
        return Independent(unit, 1, validate_args=False)

    def current_kl_weight(self) -> Tensor | float:
        """Return the weight of the KL term at this step (outside training: the final one)."""
        if not self.warmup or not self.training:
            return self.kl_weight
        return self.kl_weight * (self.steps / self.warmup).clamp(max=1.0)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Return ``n`` new inputs (n, *shape), in the user's range."""
        latent = self.prior().sample(torch.Size([n]))
        return self.input_range.inverse(self.likelihood.sample(self.decoder(latent)))


class DenseVAE(VAE):
    """A VAE of linear layers over flattened inputs of any shape.

    Args:
        shape: Shape of one input.
        hidden: Widths of the two hidden layers, outer first; None chooses by the input's size.
        latent: Dimensions of the latent space; None chooses by the input's size.
        likelihood: ``"bernoulli"`` for bounded grey levels, ``"gaussian"`` for the rest.
        variance: Of the Gaussian; None learns it.
        units: What has a range of its own (see :class:`InputRange`).
        kl_weight: See :class:`VAE`.
        warmup: See :class:`VAE`.

    Example:
        >>> vae = DenseVAE((1, 8, 8))
        >>> vae.loss(torch.rand(5, 1, 8, 8)).shape, vae.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: Sequence[int] | None = None,
        latent: int | None = None,
        likelihood: LikelihoodName = "bernoulli",
        variance: float | None = None,
        units: Units = "all",
        kl_weight: float = 1.0,
        warmup: int = KL_WARMUP,
    ) -> None:
        shape = tuple(int(width) for width in shape)
        sizes = _checked_sizes(shape, hidden, latent)
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(
                f"Expected argument `likelihood` to be 'bernoulli' or 'gaussian', "
                f"but got {likelihood!r}."
            )
        super().__init__(
            DenseEncoder(shape, sizes),
            DenseDecoder(shape, sizes),
            BernoulliLikelihood()
            if likelihood == "bernoulli"
            else GaussianLikelihood(shape, variance),
            InputRange(shape, units, batches=RANGE_BATCHES),
            latent=sizes.latent,
            kl_weight=kl_weight,
            warmup=warmup,
        )
        self.settings: dict[str, Any] = {
            "shape": list(shape),
            "hidden": [sizes.outer, sizes.inner],
            "latent": sizes.latent,
            "likelihood": likelihood,
            "variance": variance,
            "units": units,
            "kl_weight": kl_weight,
            "warmup": warmup,
        }
        """The arguments that build this VAE again, as plain values."""


def settings_for(x: Tensor) -> dict[str, Any]:
    """Return the arguments of a :class:`DenseVAE` that suits inputs like the batch (N, *shape).

    Bernoulli for pictures and for vectors with a background, i.e. a tenth of the values or more on
    an end of the range, as in a flattened picture; Gaussian for other vectors.

    Example:
        >>> settings_for(torch.rand(8, 28, 28))["likelihood"]
        'bernoulli'
        >>> settings_for(torch.randn(8, 5))["likelihood"]
        'gaussian'
    """
    x = x.detach().float()
    units = find_units(x)
    background = max(float((x == end).float().mean()) for end in (x.min(), x.max()))
    picture = x.ndim > 2 or (units == "all" and background >= 0.1)
    return {
        "shape": list(x.shape[1:]),
        "likelihood": "bernoulli" if picture else "gaussian",
        "units": units,
    }


def _checked_sizes(
    shape: tuple[int, ...], hidden: Sequence[int] | None, latent: int | None
) -> DenseSizes:
    if any(width < 1 for width in shape):
        raise ValueError(f"Expected argument `shape` to hold positive sizes, but got {shape}.")
    default = dense_sizes(math.prod(shape))
    widths = list(default[:2]) if hidden is None else list(hidden)
    if len(widths) != 2 or any(width < 1 for width in widths):
        raise ValueError(
            f"Expected argument `hidden` to be two positive widths, but got {hidden!r}."
        )
    if latent is not None and latent < 1:
        raise ValueError(f"Expected argument `latent` to be positive, but got {latent!r}.")
    outer, inner = widths
    return DenseSizes(outer, inner, default.latent if latent is None else latent)
