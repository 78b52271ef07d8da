"""p(x|z): how a decoder's output is read as a distribution over inputs.

A likelihood is a module with three methods: ``log_prob(output, x)``, in nats for each element;
``sample(output)``, an input made from the output; ``location(output)``, the same without noise.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

LikelihoodName: TypeAlias = Literal["bernoulli", "gaussian", "logistic"]


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

    def location(self, output: Tensor) -> Tensor:
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

    def location(self, output: Tensor) -> Tensor:
        """Return the means."""
        return output

    def deviation(self) -> Tensor:
        """Return the standard deviation.

        Kept above e^-4 of the range, so that it cannot collapse onto a constant element.
        """
        return (0.5 * self.log_variance).clamp(min=-4.0).exp()


class DiscretisedLogisticLikelihood(nn.Module):
    """Each element is one of ``levels`` grey levels, evenly spaced over [0, 1].

    A level's probability is what a logistic distribution around the output, with one learnt scale
    an element, puts on the level's bin; the outermost bins reach to infinity (Kingma et al. 2016,
    "Improved variational inference with inverse autoregressive flow"; Salimans et al. 2017,
    "PixelCNN++"). Probabilities and not densities: they sum to 1, and the ELBO in nats can be
    compared across ranges of the inputs. ``sample`` draws levels.

    Args:
        shape: Shape of one input.
        levels: How many grey levels an element has: 256 for eight bits.

    Example:
        >>> likelihood = DiscretisedLogisticLikelihood((), levels=3)
        >>> log_p = likelihood.log_prob(torch.full((3,), 0.4), torch.tensor([0.0, 0.5, 1.0]))
        >>> bool((log_p.exp().sum() - 1).abs() < 1e-6)
        True
    """

    def __init__(self, shape: tuple[int, ...], levels: int = 256) -> None:
        super().__init__()
        self.levels = levels
        self.log_scale = nn.Parameter(torch.full(shape, math.log(0.1)))

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return log P(x) around ``output``; values between levels count as the nearest."""
        scale = self.scale()
        width = 1.0 / (self.levels - 1)
        index = (x * (self.levels - 1)).round().clamp(0, self.levels - 1)
        distance = index * width - output
        below_upper = F.logsigmoid((distance + 0.5 * width) / scale)
        above_lower = F.logsigmoid((0.5 * width - distance) / scale)
        # s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)): no difference of nearly equal numbers.
        inside = below_upper + above_lower + torch.log(-torch.expm1(-width / scale))
        log_p = torch.where(index == 0, below_upper, inside)
        return torch.where(index == self.levels - 1, above_lower, log_p)

    def sample(self, output: Tensor) -> Tensor:
        """Draw levels around the outputs."""
        # The logit of a uniform number is logistic; not 0 or 1, which have none.
        uniform = torch.rand_like(output).clamp(1e-6, 1.0 - 1e-6)
        return self._nearest(output + self.scale() * uniform.logit())

    def location(self, output: Tensor) -> Tensor:
        """Return the levels nearest to the outputs."""
        return self._nearest(output)

    def scale(self) -> Tensor:
        """Return the logistic distribution's scale, kept above e^-7 of the range."""
        return self.log_scale.clamp(min=-7.0).exp()

    def _nearest(self, value: Tensor) -> Tensor:
        return (value.clamp(0.0, 1.0) * (self.levels - 1)).round() / (self.levels - 1)


AnyLikelihood: TypeAlias = BernoulliLikelihood | GaussianLikelihood | DiscretisedLogisticLikelihood


def build_likelihood(
    name: LikelihoodName, shape: tuple[int, ...], *, variance: float | None, levels: int
) -> AnyLikelihood:
    """Return the likelihood of a name for inputs of a shape; the others' arguments are ignored."""
    if name == "bernoulli":
        return BernoulliLikelihood()
    if name == "gaussian":
        return GaussianLikelihood(shape, variance)
    return DiscretisedLogisticLikelihood(shape, levels)
