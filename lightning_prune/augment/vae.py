"""A variational autoencoder: (N, *shape) -> its negative ELBO in nats, n -> n new inputs.

Maximises E_q[log p(x|z)] - KL(q(z|x) || p(z)) (Kingma & Welling 2014, "Auto-encoding variational
Bayes"), each conditional on the class if there are any. The encoder, decoder and likelihood are
parts (networks.py, conv_networks.py, likelihoods.py); another kind of VAE is another choice of
parts.

Anything with ``loss(x) -> scalar Tensor`` and ``sample(n) -> Tensor`` can stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from lightning_prune.augment.conditional import beside, condition_of, uniform_labels
from lightning_prune.augment.input_range import InputRange, Units
from lightning_prune.augment.likelihoods import AnyLikelihood, LikelihoodName, build_likelihood
from lightning_prune.augment.networks import DenseDecoder, DenseEncoder, DenseSizes, dense_sizes
from lightning_prune.augment.settings import argument_faults, raise_faults, settings_for
from lightning_prune.passes.isolation import evaluating

__all__ = ["COLLAPSE", "KL_WARMUP", "RANGE_BATCHES", "VAE", "DenseVAE", "Terms", "settings_for"]

RANGE_BATCHES = 50
"""How many batches widen the input range: rare elements (the rim of a digit) show late."""

KL_WARMUP = 200
"""Steps until the KL term has its full weight. On small grey pictures (8 x 8 digits) a posterior
that meets the whole term at once collapses onto the prior and needs twice the steps to recover."""

COLLAPSE = 0.05
"""KL in nats per sample, over all latent dimensions, below which samples carry no information."""


class Terms(NamedTuple):
    """The parts of a VAE's loss, each a scalar tensor in nats per sample.

    ``loss = reconstruction + weight * kl``, with the KL weight of the moment, and with the floor
    under the KL if there are free bits; the negative ELBO is ``reconstruction + kl``.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


class VAE(nn.Module):
    """A VAE with a standard normal prior, put together from its parts.

    Args:
        encoder: (N, *shape) -> (N, 2 L), mean and log-variance of q(z|x). With classes it is
            called with the one-hot labels (N, K) as a second argument.
        decoder: (N, L) -> (N, *shape), the likelihood's natural parameter. With classes its input
            is (N, L + K), the one-hot label behind the latent point.
        likelihood: p(x|z), see likelihoods.py.
        input_range: The user's range <-> [0, 1]; learns in training mode.
        latent: L.
        kl_weight: Weight of the KL term once warmed up; 1 is the ELBO.
        warmup: Training steps over which the KL weight rises linearly from ``kl_weight / warmup``,
            which keeps the posterior from collapsing onto the prior before the decoder has learnt
            anything (Bowman et al. 2016); 0 for none.
        free_bits: Nats that each latent dimension may carry, in the mean over a batch, before the
            loss counts them: ``max(free_bits, KL_j)`` in place of ``KL_j`` (Kingma et al. 2016).
            Against collapse; 0 for none.
        classes: K, to condition on the class; None for an unconditional VAE.

    Labels are class indices (N,). An unconditional VAE ignores them, except where it is asked for
    samples of a class. Every random number comes from torch's global generator: wrap calls in
    ``own_randomness``.
    """

    prior_mean: Tensor
    steps: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: AnyLikelihood,
        input_range: InputRange,
        *,
        latent: int,
        kl_weight: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.likelihood, self.input_range = likelihood, input_range
        self.latent, self.kl_weight, self.warmup = latent, kl_weight, warmup
        self.free_bits, self.classes = free_bits, classes
        self.register_buffer("prior_mean", torch.zeros(latent))
        self.register_buffer("steps", torch.tensor(0))

    # The objective

    def loss(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the loss of a batch (N, *shape) with labels (N,), in nats per sample."""
        return self.terms(x, y).loss

    def terms(self, x: Tensor, y: Tensor | None = None) -> Terms:
        """Return the loss of a batch and its parts. In training mode this counts as a step.

        Raises:
            ValueError: A conditional VAE got no labels, or such that are no class indices.
        """
        x, condition = self._taken(x, y)
        if self.training:
            self.input_range.observe(x)
            self.steps += 1
        unit = self.input_range(x)
        posterior = self.posterior(unit, condition)
        output = self.decoder(beside(posterior.rsample(), condition))
        reconstruction = -self.likelihood.log_prob(output, unit).sum() / len(x)
        kl = kl_divergence(posterior, self.prior()).mean()
        counted = self._above_free_bits(posterior) if self.free_bits else kl
        return Terms(reconstruction + self.current_kl_weight() * counted, reconstruction, kl)

    def posterior(self, unit: Tensor, condition: Tensor | None = None) -> Independent[Normal]:
        """Return q(z|x) for inputs in units of the range: a diagonal Normal over (N, L)."""
        given = (unit,) if condition is None else (unit, condition)
        mean, log_variance = self.encoder(*given).chunk(2, dim=1)
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

    def collapsed(self, kl: Tensor | float) -> bool:
        """Tell whether a KL, best the mean over an epoch, is that of a collapsed posterior.

        Less than 0.05 nats in all after the warm-up, and after 200 steps at least: every input is
        then encoded as the prior, and samples do not depend on the latent point. Free bits, a
        longer warm-up, fewer latent dimensions or a smaller ``kl_weight`` are what helps.
        """
        learnt = int(self.steps) >= max(self.warmup, KL_WARMUP)
        return learnt and float(kl) < COLLAPSE

    # What a fitted VAE says and makes, in eval mode

    @torch.no_grad()
    def elbo(self, x: Tensor, y: Tensor | None = None, *, samples: int = 1) -> Tensor:
        """Return a lower bound of each input's log p(x), in nats: (N,).

        Inputs near the data have a high one. It is that of the inputs mapped to [0, 1]; only the
        discretised logistic one is a log-probability, the others are log-densities.

        Args:
            x: Inputs (N, *shape) in the user's range.
            y: Labels (N,), for log p(x|y).
            samples: Latent points an input: 1 is the ELBO, estimated with the KL in closed form;
                more is the tighter importance-weighted bound (Burda et al. 2016).

        Raises:
            ValueError: As :meth:`terms`; or no samples.
        """
        if samples < 1:
            raise ValueError(f"Expected argument `samples` to be at least 1, but got {samples!r}.")
        with evaluating(self):
            x, condition = self._taken(x, y)
            unit = self.input_range(x)
            posterior = self.posterior(unit, condition)
            if samples == 1:
                kl: Tensor = kl_divergence(posterior, self.prior())
                return self._log_likelihood(posterior.sample(), unit, condition) - kl
            weights = []
            for _ in range(samples):
                z = posterior.sample()
                ratio: Tensor = self.prior().log_prob(z) - posterior.log_prob(z)  # type: ignore[no-untyped-call]
                weights.append(self._log_likelihood(z, unit, condition) + ratio)
        return torch.stack(weights).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what the posterior's mean is decoded to, without noise, in the user's range."""
        return self.interpolate(x, x, 0.0, y)

    @torch.no_grad()
    def interpolate(
        self,
        x: Tensor,
        other: Tensor,
        t: Tensor | float = 0.5,
        y: Tensor | None = None,
        other_y: Tensor | None = None,
    ) -> Tensor:
        """Return inputs between pairs of inputs, on the line between their posteriors' means.

        Args:
            x: Inputs (N, *shape): the result at ``t = 0``.
            other: Inputs (N, *shape): the result at ``t = 1``.
            t: Where on the line, for all pairs or for each (N,).
            y: Labels of ``x``.
            other_y: Labels of ``other``; None for those of ``x``. Conditions are mixed as the
                latent points are.

        Returns:
            Inputs (N, *shape) in the user's range, without noise and without random numbers.
        """
        with evaluating(self):
            x, condition = self._taken(x, y)
            other, other_condition = self._taken(other, y if other_y is None else other_y)
            share = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1)
            ends = [
                beside(self.posterior(self.input_range(inputs), given).mean, given)
                for inputs, given in ((x, condition), (other, other_condition))
            ]
            output = self.decoder(torch.lerp(ends[0], ends[1], share))
            return self.input_range.inverse(self.likelihood.location(output))

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Return ``n`` new inputs (n, *shape), in the user's range; see :meth:`sample_labelled`."""
        return self.sample_labelled(n, labels)[0]

    @torch.no_grad()
    def sample_labelled(self, n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``n`` new inputs (n, *shape) and the labels (n,) that they were made for.

        Args:
            n: How many.
            labels: Of which classes, (n,) or one for all; None draws each class alike often. An
                unconditional VAE has none, neither to take nor to return.

        Raises:
            ValueError: Labels for an unconditional VAE, or such that are no class indices.
        """
        if self.classes is None and labels is not None:
            raise ValueError(
                "Expected no labels for an unconditional VAE, but got some. Build it with "
                "`classes=` and train it on labels to sample by class."
            )
        if self.classes is not None and labels is None:
            labels = uniform_labels(n, self.classes, self.prior_mean.device)
        condition = condition_of(labels, self.classes, n, self.prior_mean)
        latent = self.prior().sample(torch.Size([n]))
        output = self.decoder(beside(latent, condition))
        samples = self.input_range.inverse(self.likelihood.sample(output))
        return samples, None if condition is None else condition.argmax(1)

    def _taken(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x.to(self.prior_mean.dtype)
        return x, condition_of(y, self.classes, len(x), self.prior_mean)

    def _above_free_bits(self, posterior: Independent[Normal]) -> Tensor:
        deviation = torch.ones_like(self.prior_mean)
        prior = Normal(self.prior_mean, deviation, validate_args=False)
        each: Tensor = kl_divergence(posterior.base_dist, prior)
        return each.mean(0).clamp(min=self.free_bits).sum()

    def _log_likelihood(self, z: Tensor, unit: Tensor, condition: Tensor | None) -> Tensor:
        log_p = self.likelihood.log_prob(self.decoder(beside(z, condition)), unit)
        return log_p.reshape(len(unit), math.prod(unit.shape[1:])).sum(1)


class DenseVAE(VAE):
    """A VAE of linear layers over flattened inputs of any shape.

    Args:
        shape: Shape of one input.
        hidden: Widths of the two hidden layers, outer first; None chooses by the input's size.
        latent: Dimensions of the latent space; None chooses by the input's size.
        likelihood: ``"bernoulli"`` for bounded grey levels, ``"logistic"`` for a fixed number of
            them, ``"gaussian"`` for the rest.
        variance: Of the Gaussian; None learns it.
        units: What has a range of its own (see :class:`InputRange`).
        kl_weight: See :class:`VAE`.
        warmup: See :class:`VAE`.
        levels: Grey levels of the logistic likelihood.
        free_bits: See :class:`VAE`.
        classes: See :class:`VAE`.

    Raises:
        ValueError: Arguments out of range; one message names them all.

    Example:
        >>> vae = DenseVAE((1, 8, 8))
        >>> vae.loss(torch.rand(5, 1, 8, 8)).shape, vae.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 8, 8]))
        >>> x, y = DenseVAE((4,), classes=3).sample_labelled(2, torch.tensor([2, 0]))
        >>> x.shape, y
        (torch.Size([2, 4]), tensor([2, 0]))
    """

    def __init__(  # noqa: PLR0913 - plain values, as they are written in a file of settings
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
        levels: int = 256,
        free_bits: float = 0.0,
        classes: int | None = None,
    ) -> None:
        shape = tuple(int(width) for width in shape)
        settings: dict[str, Any] = {
            "shape": list(shape),
            "hidden": None if hidden is None else list(hidden),
            "latent": latent,
            "likelihood": likelihood,
            "variance": variance,
            "units": units,
            "kl_weight": kl_weight,
            "warmup": warmup,
            "levels": levels,
            "free_bits": free_bits,
            "classes": classes,
        }
        raise_faults("DenseVAE", argument_faults(settings))
        default = dense_sizes(math.prod(shape))
        outer, inner = default[:2] if hidden is None else hidden
        sizes = DenseSizes(outer, inner, default.latent if latent is None else latent)
        super().__init__(
            DenseEncoder(shape, sizes, classes or 0),
            DenseDecoder(shape, sizes, classes or 0),
            build_likelihood(likelihood, shape, variance=variance, levels=levels),
            InputRange(shape, units, batches=RANGE_BATCHES),
            latent=sizes.latent,
            kl_weight=kl_weight,
            warmup=warmup,
            free_bits=free_bits,
            classes=classes,
        )
        self.settings = settings | {"hidden": [outer, inner], "latent": sizes.latent}
        """The arguments that build this VAE again, as plain values."""
