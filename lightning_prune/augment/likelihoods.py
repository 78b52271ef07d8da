"""p(x|z): how a decoder's output is read as a distribution over inputs.

A likelihood is a module with two methods: ``log_prob(output, x)``, in nats for each element, and
``sample(output)``, an input made from the output.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

LikelihoodName: TypeAlias = Literal["bernoulli", "gaussian"]


class BernoulliLikelihood(nn.Module):
    """Each element is a grey level in [0, 1], read as the probability of a one.

    For grey levels strictly between 0 and 1 this is a cross entropy and not a normalised density;
    it makes sharper pictures than a Gaussian (Loaiza-Ganem & Cunningham 2019, "The continuous
    Bernoulli", on what is lost). ``sample`` returns the grey level, not a draw of zeros and ones.

    Example:
        >>> BernoulliLikelihood().log_prob(torch.zeros(1), torch.ones(1))
        tensor([-0.6931])
    """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return log p(x) for logits ``output``; values outside [0, 1] count as the nearest end."""
        p = Bernoulli(logits=output, validate_args=False)
        log_p: Tensor = p.log_prob(x.clamp(0.0, 1.0))  # type: ignore[no-untyped-call]
        return log_p

    def sample(self, output: Tensor) -> Tensor:
        """Return the grey levels."""
        return output.sigmoid()


class GaussianLikelihood(nn.Module):
    """Each element is Normal around the output, with one variance an element.

    ``sample`` draws from that Normal, so that the samples' variance is that of the data.

    Args:
        shape: Shape of one input.
        variance: A fixed variance, in squared units of the learnt range; None learns one for each
            element, starting from 0.1.
    """

    def __init__(self, shape: tuple[int, ...], variance: float | None = None) -> None:
        super().__init__()
        start = torch.full(shape, math.log(0.1 if variance is None else variance))
        self.log_variance: Tensor
        if variance is None:
            self.log_variance = nn.Parameter(start)
        else:
            self.register_buffer("log_variance", start)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return log p(x) for means ``output``."""
        p = Normal(output, self.deviation(), validate_args=False)
        log_p: Tensor = p.log_prob(x)  # type: ignore[no-untyped-call]
        return log_p

    def sample(self, output: Tensor) -> Tensor:
        """Draw inputs around the means."""
        return output + self.deviation() * torch.randn_like(output)

    def deviation(self) -> Tensor:
        """Return the standard deviation.

        Kept above e^-4 of the range, so that it cannot collapse onto a constant element.
        """
        return (0.5 * self.log_variance).clamp(min=-4.0).exp()
