"""Inputs of a generative model in the form of the user's batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.passes.batches import batch_size, read_inputs, read_labels, take_samples
from lightning_prune.passes.isolation import own_randomness
from lightning_prune.refit import Calibration, hold_out
from lightning_prune.refit.divergence import divergence
from lightning_prune.refit.merging import first_samples

AT_LEAST = 1000
"""A few real inputs leave directions out that as many generated ones would leave out, too."""

NUMBERS = (250, 1000, 2000)
"""How many generated inputs are tried beside none."""

EVERY = 5
"""A trial leaves out one real sample in so many, and is judged by it."""

SEEN = 20
"""Real samples that judge, at least; if one trial leaves out fewer there is a second one."""

GROUPS = 20
"""Samples are judged in so many groups, whose spread says how sure the judgement is."""

Trial: TypeAlias = Callable[[list[Any], list[Any], list[Any]], Tensor]
"""(real, generated, unseen) batches -> how far a model pruned with the first two is from the dense
one on the unseen, a number for each group of them."""


class Sampler(Protocol):
    """What has generated inputs to give, such as a VAE."""

    def sample(self, n: int, /) -> Tensor:
        """Return n inputs, (n, *input shape)."""


def generated_batches(
    model: nn.Module,
    real: list[Any],
    generator: Sampler,
    number: int | None,
    *,
    forward: Forward,
    likelihood: Likelihood,
    seed: int,
) -> list[Any]:
    """Draw inputs once and return them in batches of the form and size of the first real one.

    Labels, where real batches have any, are the model's own prediction.

    Args:
        model: Not pruned yet.
        real: The user's batches.
        generator: Where inputs come from.
        number: How many; by default as many as there are real samples, at least ``AT_LEAST``.
        forward: ``forward(model, batch) -> logits``.
        likelihood: How the logits are read.
        seed: Of the draws; the global random state stays as it is.

    Raises:
        ValueError: The generator returned something else than finite inputs of the real ones'
            shape.
    """
    first = real[0]
    inputs = read_inputs(first)
    form = BatchForm(first, inputs, read_labels(first))
    left = max(AT_LEAST, sum(map(batch_size, real))) if number is None else number
    found = []
    with torch.no_grad(), own_randomness(inputs.device, seed, "prune"):
        while left > 0:
            sample: Any = generator.sample(min(left, len(inputs)))
            usable = isinstance(sample, Tensor) and sample.shape[1:] == inputs.shape[1:]
            if not usable or not len(sample):  # of no samples one could wait forever for enough
                got = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
                raise ValueError(
                    "Expected generator.sample(n) to return a tensor (n, *shape) with the shape "
                    f"{tuple(inputs.shape[1:])} of an input in `batches`, but got {got}."
                )
            left -= len(sample)
            sample = sample.to(inputs.device, inputs.dtype)
            if not bool(sample.isfinite().all()):
                raise ValueError(
                    f"Expected generator.sample(n) of the {type(generator).__name__} to return "
                    "finite inputs, but some are NaN or infinite. Nothing was pruned; see to its "
                    "training, or leave `generator` out."
                )
            found.append(Injection(forward, likelihood).labelled(model, form, sample))
    return found


def chosen_batches(
    trial: Trial, real: list[Any], draw: Callable[[int | None], list[Any]]
) -> list[Any]:
    """Return as many generated batches as real samples that a trial has not seen speak for.

    The generator may have seen them in its training, so a model that knows its few samples by heart
    is judged too kindly.

    Args:
        trial: What is done with the batches.
        real: The user's batches.
        draw: How many (or None) -> generated batches.

    Returns:
        The first 0, 250, 1,000 or 2,000 generated inputs: the number with the smallest mean
        divergence, unless that is within a standard error of the one without any. With fewer real
        samples than two trials leave out two of each, nothing can be judged: what None draws.
    """
    count = sum(map(batch_size, real))
    if count < 2 * EVERY:
        return draw(None)
    everything = draw(NUMBERS[-1])
    folds = [
        hold_out(real, EVERY, place=EVERY - 1 - k)
        for k in range(1 if count // EVERY >= SEEN else 2)
    ]
    found = {}
    for number in (0, *NUMBERS):
        extra = first_samples(everything, number)
        found[number] = torch.cat([trial(fit, extra, unseen) for fit, unseen in folds])
    return first_samples(everything, fewest_that_help(found))


def fewest_that_help(divergences: dict[int, Tensor]) -> int:
    """Return the number with the smallest mean divergence, or 0 if that is no clear gain.

    Args:
        divergences: How many generated inputs -> the divergence on each of the same groups of
            samples (G,); with an entry for 0. One that is not finite is never chosen.

    Returns:
        A key: the one with the smallest mean, of equal ones the smallest, if its mean gain over 0
        is above one standard error of that mean.

    Example:
        >>> none = torch.tensor([0.4, 0.5, 0.6])
        >>> fewest_that_help({0: none, 250: none - 0.1, 1000: none - 0.2})
        1000
        >>> fewest_that_help({0: none, 250: none + torch.tensor([0.1, -0.2, 0.05])})
        0
    """
    usable = {n: d for n, d in divergences.items() if bool(d.isfinite().all())}
    best = min(usable, key=lambda n: (usable[n].mean().item(), n), default=0)
    if best == 0 or 0 not in usable:
        return best
    gain = usable[0] - usable[best]
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return best if gain.mean().item() > error else 0


def group_divergences(model: nn.Module, calibration: Calibration) -> Tensor:
    """Return the mean divergence from the dense model on groups of samples, (G,), in nats.

    Args:
        model: The network as it is.
        calibration: Its held-out samples are put into up to ``GROUPS`` groups, batch by batch.
    """
    batches = calibration.held_out
    size = math.ceil(sum(map(batch_size, batches)) / GROUPS)
    groups = [
        [take_samples(batch, index)]
        for batch in batches
        for index in torch.split(torch.arange(batch_size(batch)), size)
    ]
    return torch.tensor(
        [divergence(model, replace(calibration, held_out=group)) for group in groups],
        dtype=torch.float64,
    )
