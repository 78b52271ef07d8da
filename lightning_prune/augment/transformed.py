"""Real inputs under a random transform, in a generative model's place.

Enters: inputs and a transform. Leaves: something with ``sample(n)``, to be used wherever a VAE is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class TransformedInputs(nn.Module):
    """Draw copies of real inputs, each changed by a random transform that keeps its meaning.

    What a network was trained on is often more than its inputs: shifted, cropped, noisy copies of
    them. As calibration data these copies cost less than a VAE's training and were worth about as
    much on digits (docs/refit.md). Takes a generator's place in ``prune`` and in
    ``VAEAugmentCallback``; there is nothing to train.

    Args:
        inputs: (N, *shape), N >= 1; kept as they are, and left out of the state_dict.
        transform: Input (*shape) -> input of the same shape, drawing from torch's random state:
            the prune call and the callback fix it, so that results repeat for a seed.
        batched: ``transform`` takes many inputs (n, *shape) at once and changes each on its own.
            Most of torchvision's change all of a batch alike: leave it False for these.

    Raises:
        TypeError: ``inputs`` is no tensor, or ``transform`` cannot be called.
        ValueError: There are no inputs.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> step = lambda x: x.roll(int(torch.randint(-1, 2, ())))
        >>> shifted = TransformedInputs(torch.eye(4), step)
        >>> shifted.sample(6).sum(1)
        tensor([1., 1., 1., 1., 1., 1.])
    """

    inputs: Tensor

    def __init__(
        self, inputs: Tensor, transform: Callable[[Tensor], Tensor], *, batched: bool = False
    ) -> None:
        super().__init__()
        given: Any = inputs
        if not isinstance(given, Tensor):
            raise TypeError(
                f"Expected argument `inputs` to be a tensor (N, *shape), but got {type(given)}."
            )
        if given.ndim == 0 or not len(given):
            raise ValueError(
                "Expected argument `inputs` to be a tensor (N, *shape) of at least one input, but "
                f"got shape {tuple(given.shape)}."
            )
        if not callable(transform):
            raise TypeError(
                "Expected argument `transform` to be a callable input -> input, but got "
                f"{transform!r}."
            )
        self.register_buffer("inputs", given.detach(), persistent=False)
        self.transform, self.batched = transform, batched

    def sample(self, n: int) -> Tensor:
        """Return n changed inputs, (n, *shape); none twice before all have been drawn once."""
        size = len(self.inputs)
        rounds = max(1, math.ceil(n / size))
        order = torch.cat([torch.randperm(size) for _ in range(rounds)])[:n]
        picked = self.inputs[order.to(self.inputs.device)]
        if self.batched or not n:
            return self.transform(picked)
        return torch.stack([self.transform(x) for x in picked])

    def loss(self, x: Tensor) -> Tensor:
        """Return 0: there is nothing to train."""
        return x.new_zeros((), dtype=torch.float32)
