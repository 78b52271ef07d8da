"""An unbiased estimate of the scores from random signs, for outputs too wide to be exact about.

With independent signs v, E[v v^T] = 1, so that for one draw a sample

    E[(v^T J dz/dw)^2] = || J dz/dw ||^2 = sum_y (dP_y/dw)^2,

and signs that are independent between positions make one backward pass serve all positions at once
(Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"). The estimate is
noisy: with a single prediction a sample a handful of exact rows is both cheaper and better. Its
standard error comes from the spread between draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune._types import Likelihood
from lightning_prune.passes.precision import precise
from lightning_prune.saliency.target import Target, check_finite, check_labels, output_weights


@dataclass(frozen=True)
class RandomSigns:
    """Ask for an estimate instead of exact scores.

    Args:
        draws: Backward passes a batch, at least 2, so that there is a spread to tell the standard
            error from.
        seed: Seed of the generator that draws the signs; no other random state is used.

    Raises:
        ValueError: If there are fewer than two draws.
    """

    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(f"Expected argument `draws` to be at least 2 but got {self.draws}.")

    def generator(self) -> torch.Generator:
        """Return a new generator at the seed."""
        return torch.Generator().manual_seed(self.seed)


def check_signs(signs: object) -> None:
    """Raise TypeError unless ``signs`` is what it can be."""
    if signs is not None and not isinstance(signs, RandomSigns):
        raise TypeError(
            f"Expected argument `signs` to be a RandomSigns, such as RandomSigns(draws=8), or None "
            f"for exact scores, but got {signs!r}."
        )


def random_rows(
    logits: Tensor,
    target: Target,
    likelihood: Likelihood,
    labels: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Draw one gradient of the output, in every position at once.

    It has the logits' shape and dtype.
    """
    check_finite(logits)
    check_labels(logits, labels, target, likelihood)
    z = precise(logits.detach())
    signs = torch.randint(0, 2, z.shape, generator=generator).to(z).mul_(2).sub_(1)
    if likelihood != "categorical":
        return (signs * output_weights(z, target, likelihood, labels)).to(logits)
    terms = signs * output_weights(z, target, likelihood, labels)
    p = z.softmax(1)
    return (terms - terms.sum(1, keepdim=True) * p).to(logits)
