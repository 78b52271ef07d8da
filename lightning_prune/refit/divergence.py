"""How far a network's output is from the dense network's, and the first two derivatives of that.

Enters: logits of both. Leaves: the Kullback-Leibler divergence KL(dense || pruned), its gradient
with respect to the pruned logits and its curvature there times a vector. For the logits of these
three likelihoods that curvature is the Fisher information, so it is positive semi-definite, and it
doesn't depend on the dense network (Martens 2020, "New insights and perspectives on the natural
gradient method").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune._types import Likelihood
from lightning_prune.passes.batches import batch_size
from lightning_prune.passes.outputs import check_classes
from lightning_prune.passes.precision import widest
from lightning_prune.refit.borrowing import borrowed
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.merging import merge_batches


@dataclass(frozen=True)
class Output:
    """How logits are read, and how soft.

    Args:
        likelihood: ``"categorical"`` (softmax over axis 1; further axes are positions),
            ``"bernoulli"`` (one logit an output) or ``"gaussian"`` (unit variance around it).
        temperature: T > 0; logits are divided by it. Means nothing to the Gaussian.

    Source of the temperature: Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural
    network".

    Example:
        >>> import torch
        >>> z, dense = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
        >>> output = Output("categorical")
        >>> f"{output.divergence(z, dense).item():.4f}"
        '0.3278'
        >>> output.gradient(z, dense)
        tensor([[-0.3808,  0.3808]])
        >>> output.curvature(z, torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """

    likelihood: Likelihood
    temperature: float = 1.0

    def divergence(self, logits: Tensor, dense: Tensor) -> Tensor:
        """Return KL(dense || pruned) at the temperature, summed over everything, in nats.

        In float64 where the device has it: differences of nearly equal sums decide over a step.
        """
        z, reference = self._scaled(precise(logits)), self._scaled(precise(dense))
        if self.likelihood == "gaussian":
            return 0.5 * (z - reference).square().sum()
        if self.likelihood == "bernoulli":
            on, off = F.logsigmoid(reference), F.logsigmoid(-reference)
            kl = on.exp() * (on - F.logsigmoid(z)) + off.exp() * (off - F.logsigmoid(-z))
            return kl.sum()
        check_classes(logits)
        log_p = reference.log_softmax(1)
        return (log_p.exp() * (log_p - z.log_softmax(1))).sum()

    def gradient(self, logits: Tensor, dense: Tensor) -> Tensor:
        """Return the derivative of the divergence with respect to ``logits``, in their shape."""
        if self.likelihood == "gaussian":
            return logits - dense
        return (self.mean(logits) - self.mean(dense)) / self.temperature

    def curvature(self, logits: Tensor, vector: Tensor) -> Tensor:
        """Return the second derivative of the divergence at ``logits`` times ``vector``.

        ``diag(p) - p p^T`` a sample and position, ``p (1 - p)`` an output, or the identity.
        """
        if self.likelihood == "gaussian":
            return vector
        p, scale = self.mean(logits), self.temperature**2
        if self.likelihood == "bernoulli":
            return p * (1 - p) * vector / scale
        weighted = p * vector
        return (weighted - p * weighted.sum(1, keepdim=True)) / scale

    def mean(self, logits: Tensor) -> Tensor:
        """Return what the logits predict: probabilities at the temperature, or themselves."""
        z = self._scaled(logits)
        if self.likelihood == "gaussian":
            return z
        return z.sigmoid() if self.likelihood == "bernoulli" else z.softmax(1)

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits if self.likelihood == "gaussian" else logits / self.temperature


def divergence(model: nn.Module, calibration: Calibration, *, temperature: float = 1.0) -> float:
    """Return how far ``model`` is from the dense network, on the samples that are checked on.

    Args:
        model: The network as it is; it is run in eval mode and left untouched.
        calibration: The dense weights, the samples and how to read the output.
        temperature: Softens both distributions before they are compared.

    Returns:
        The mean over samples of KL(dense || model) in nats, summed over positions and outputs
        (half the squared error for the Gaussian likelihood); NaN if the logits are not finite.

    Raises:
        ValueError: There are no samples, or ``temperature`` is no number > 0.

    Example:
        >>> import torch
        >>> from lightning_prune.passes.teacher import Teacher
        >>> model = nn.Linear(2, 3)
        >>> calibration = Calibration(Teacher.of(model), [torch.ones(4, 2)], [])
        >>> divergence(model, calibration)
        0.0
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"Expected `temperature` to be a number > 0, but got {temperature!r}.")
    output, total, count = Output(calibration.likelihood, temperature), 0.0, 0
    with borrowed(model):
        for batch in merge_batches(calibration.checked_on):
            logits = calibration.forward(model, batch)
            dense = calibration.dense.logits(model, batch, calibration.forward)
            total += output.divergence(logits, dense).item()
            count += batch_size(batch)
    if not count:
        raise ValueError("Expected the calibration to hold samples, but it has none.")
    return total / count


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, or in float32 on a device (MPS) that has none."""
    return tensor.to(widest(tensor.device))
