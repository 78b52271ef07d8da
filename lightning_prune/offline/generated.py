"""Inputs of a generative model in the form of the user's batches."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prune._types import Forward
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm, Likelihood
from lightning_prune.passes.batches import batch_size, read_inputs, read_labels
from lightning_prune.passes.isolation import own_randomness

AT_LEAST = 1000
"""A few real inputs leave directions out that as many generated ones would leave out, too."""


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
        ValueError: The generator returned something else than inputs of the real ones' shape.
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
            found.append(Injection(forward, likelihood).labelled(model, form, sample))
    return found
