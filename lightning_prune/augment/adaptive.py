"""Whether generated samples are needed: losses on training and validation data -> a factor.

Enters: the loss of each of some samples, of those trained on and of those held out. Leaves: the
factor, in [0, 1], of the generated samples' part in the training.

Samples from a generator tell the model nothing that the real ones did not. They keep it from
learning these by heart. So they help as far as the held-out loss is a matter of too few samples,
and no further: a model that is as bad on what it has seen has too little room, and each generated
sample takes some of it away. The *gap share* tells the two apart,

    s = (V - L) / V,    V the held-out loss, L the training loss, of the same weights,

which is 1 where the training data are known by heart and 0 where held-out data are no harder.

It does not tell whether the samples are any good: that is for the eye, and the generator's loss.

Alignment of gradients (Du et al. 2018, "Adapting auxiliary losses using gradient similarity") was
tried instead. It does not see the harm: with 3,600 digits at 98 % sparsity the term's gradient had
a positive product with that of the held-out loss, by up to 12 standard errors, in runs which the
term made 2 points worse; beside the training loss's gradient, what was left of it was within about
two standard errors of nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune._types import Likelihood

START = 0.25
"""The factor before there is a comparison. On 784-128-10 at 98 % with 3,600 digits a whole epoch at
1 cost 0.35 points in the end (10 seeds, standard error 0.25), at 0 0.15 (0.17); with 100 digits the
gain was 10.0 either way, with 200 7.1 and 7.2 (5 seeds)."""


@dataclass(frozen=True)
class Losses:
    """Sums over samples from which a mean loss and its error follow; add up over batches.

    Attributes:
        count: Samples.
        total: Sum of their losses.
        squares: Sum of the squares of their losses.

    Example:
        >>> both = Losses.of(torch.tensor([1.0, 3.0])) + Losses.of(torch.tensor([2.0]))
        >>> both.mean, both.variance_of_mean
        (2.0, 0.3333333333333333)
    """

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, losses: Tensor) -> Losses:
        """Read the losses (N,) of N samples."""
        values = losses.detach().to("cpu", torch.float64)
        return cls(float(len(values)), float(values.sum()), float(values.square().sum()))

    def __add__(self, other: Losses) -> Losses:
        """Return the sums over both."""
        return Losses(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> float:
        """The mean loss."""
        return self.total / self.count

    @property
    def variance_of_mean(self) -> float:
        """The square of the mean's standard error."""
        spread = max(0.0, self.squares - self.total * self.mean) / (self.count - 1)
        return spread / self.count


def gap_share(training: Losses, held_out: Losses) -> tuple[float, float] | None:
    """Return how much of the held-out loss is a matter of too few samples, and its standard error.

    Args:
        training: Losses of samples trained on.
        held_out: Losses of samples held out, by the same weights.

    Returns:
        ``(V - L) / V`` and the standard error of ``V - L`` in the same unit; None where that is not
        known: fewer than two samples of either, no loss at all, or losses that are not finite.

    Example:
        >>> training = Losses.of(torch.tensor([0.1, 0.1, 0.1]))
        >>> share, error = gap_share(training, Losses.of(torch.tensor([0.0, 0.5, 1.0])))
        >>> round(share, 3), round(error, 3)
        (0.8, 0.577)
    """
    if min(training.count, held_out.count) < 2:
        return None
    error = math.sqrt(training.variance_of_mean + held_out.variance_of_mean)
    known = all(map(math.isfinite, (training.mean, held_out.mean, error)))
    if not known or held_out.mean <= 0:
        return None
    return (held_out.mean - training.mean) / held_out.mean, error / held_out.mean


@dataclass(frozen=True)
class MixRule:
    """How the factor follows the gap share.

    ``ramp(s)`` rises from 0 at ``none`` to 1 at ``full``. With s known to within an error e the
    factor may be anything from ``ramp(s - e)`` to ``ramp(s + e)``: it stays where it is in there
    and is moved to the nearer end otherwise. It thus falls only as far as is sure, and comes back
    only when, and as far as, that is sure.

    Args:
        none: Gap share up to which generated samples do harm.
        full: Gap share from which on they are used to the full.
        errors: How many standard errors e is.
        floor: A factor below this is 0: the term is then skipped and costs nothing.

    Raises:
        ValueError: The arguments do not make a ramp.

    Example:
        >>> rule = MixRule()
        >>> rule(1.0, 0.9, 0.4), rule(1.0, 0.3, 0.1), rule(0.0, 0.95, 0.2), rule(0.0, 0.95, 0.05)
        (1.0, 0.0, 0.6, 1.0)
    """

    # On 784-128-10 at 98 % shares were mostly 0.6 to 1 with 100 or 200 digits, where the term
    # gained 10 and 7 points (5 seeds), and 0.1 to 0.55 with 3,600, where it cost 2 (3 seeds). A
    # ramp from 0.5 to 0.75 lost 0.2 points more with 3,600 (10 seeds).
    none: float = 0.6
    full: float = 0.85
    errors: float = 1.0
    floor: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what is no ramp."""
        if not (self.none < self.full <= 1 and self.errors >= 0 and 0 <= self.floor < 1):
            raise ValueError(
                "Expected `none` < `full` <= 1, `errors` >= 0 and `floor` in [0, 1), but got "
                f"{self}."
            )

    def __call__(self, mix: float, share: float, error: float) -> float:
        """Return the next factor, in [0, 1].

        Args:
            mix: The factor so far.
            share: The gap share, s.
            error: Its standard error.
        """
        low, high = self._ramp(share - self.errors * error), self._ramp(share + self.errors * error)
        moved = max(low, min(high, mix))
        return 0.0 if moved < self.floor else moved

    def _ramp(self, share: float) -> float:
        return round(max(0.0, min(1.0, (share - self.none) / (self.full - self.none))), 12)


def losses_of(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the negative log-likelihood of each sample's labels (N,), in nats.

    Args:
        logits: (N, C), or (N, C, ...) with classes on axis 1; the model's output.
        labels: Class indices (N, ...) or probabilities like the logits; bits; or, for a regression
            of unit variance, its targets (whose loss is half the squared difference).
        likelihood: How the logits are read.

    Returns:
        The mean over positions, in float32 at least.

    Raises:
        ValueError: The labels' shape does not go with the logits'.

    Example:
        >>> losses_of(torch.zeros(2, 4), torch.tensor([0, 3]), "categorical")
        tensor([1.3863, 1.3863])
    """
    logits = logits.detach()
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    labels = labels.detach().to(logits.device)
    try:
        if likelihood == "categorical":
            target = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
            each = F.cross_entropy(logits, target, reduction="none")
        else:
            target = labels.to(logits.dtype).reshape(logits.shape)
            if likelihood == "bernoulli":
                each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            else:
                each = 0.5 * (logits - target).square()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"Expected labels that go with logits of shape {tuple(logits.shape)} under the "
            f"{likelihood!r} likelihood, but got {labels.dtype} of shape {tuple(labels.shape)}: "
            f"{error}. Set `likelihood` to what your loss assumes."
        ) from error
    return each.reshape(len(each), -1).mean(1)
