"""Running sums of squared gradients over batches and processes.

Enters: batches. Leaves: :data:`~lightning_prune._types.Scores`. The sums live in a
``torchmetrics.Metric``, which brings reset, device moves and the reduction across processes;
:func:`squared_gradients` is its functional twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune._types import Forward, Likelihood, Scores
from lightning_prune.passes.precision import precise_device
from lightning_prune.saliency.engine import WORKSPACE, Engine
from lightning_prune.saliency.parameters import check_scores
from lightning_prune.saliency.registry import in_score_precision
from lightning_prune.saliency.signs import RandomSigns
from lightning_prune.saliency.target import Target


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: Target = "probability",
    likelihood: Likelihood = "categorical",
    tolerance: float = 0.0,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    signs: RandomSigns | None = None,
    workspace: int = WORKSPACE,
) -> Scores:
    r"""Compute how strongly each parameter moves a model's predicted probabilities.

    .. math:: R_i = \sum_x \sum_y \left(\frac{\partial P(y \mid x)}{\partial w_i}\right)^2

    One square per sample x and class y, taken before any sum. The model is left as it was: mode,
    gradients, hooks, ``requires_grad`` and random state, also after an exception. It is evaluated
    in eval mode with autocast off.

    Args:
        model: Any module. Samples must not interact (batch norm has to be in eval mode).
        batches: Iterable of ``x``, ``(x, y)`` or dicts; axis 0 of every tensor counts samples.
        target: ``"probability"`` (the formula above), ``"label_probability"`` (only y = the label),
            ``"fisher"`` (sum_y P (d log P/dw)^2), ``"empirical_fisher"`` ((d log P(label)/dw)^2).
        likelihood: ``"categorical"`` (logits (N, C) or (N, C, ...), every position a prediction),
            ``"bernoulli"`` (one logit an output), ``"gaussian"`` (the output itself, unit
            variance).
        tolerance: Share of the output energy, sum over samples of the squared Frobenius norm of
            dP/dlogits, that may be left out to save time, in [0, 1). 0 is exact to round-off.
        forward: ``forward(module, batch) -> logits`` for batches or models that the default cannot
            read.
        parameters: Names to score; None for all parameters, tied ones once.
        signs: Ask for an unbiased estimate from random signs instead, for outputs with very many
            positions (dense prediction, language models); ``tolerance`` has no part in it. Its
            standard error: :meth:`SaliencyAccumulator.standard_error`.
        workspace: Bytes of memory to use beyond the model, its activations and the scores.

    Returns:
        Full parameter name -> R (probability^2 per weight^2), shaped like the parameter; float32,
        or float64 for a float64 model. A sum over all samples, so twice the data gives twice the
        score.

    Raises:
        ValueError: Unknown parameter names, labels missing for a target that needs them, or outputs
            of the wrong shape.
        BatchFormatError: The default forward cannot read a batch.
        NonFiniteScoresError: Logits or scores are not finite.
        SaliencyError: A parameter has no gradient path to the output, or samples of a batch are
            mixed.

    Where closed forms apply, time at tolerance 1e-3 is one to two forward and backward passes;
    memory never holds a gradient for each sample. In a distributed run every
    process gets the sum over its own batches; use :class:`SaliencyAccumulator` for the sum over
    all of them.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x = torch.randn(5, 3)
        >>> scores = squared_gradients(model, [x])
        >>> p = model(x).softmax(-1)[:, 0]
        >>> torch.allclose(scores["bias"][0], 2 * (p * (1 - p)).square().sum())
        True
    """
    accumulator = SaliencyAccumulator(
        model,
        target=target,
        likelihood=likelihood,
        tolerance=tolerance,
        forward=forward,
        parameters=parameters,
        signs=signs,
        workspace=workspace,
    )
    for batch in batches:
        accumulator.update(batch)
    if not accumulator.samples:
        raise ValueError("Expected at least one batch to score but `batches` was empty.")
    return accumulator.checked_sums()


COUNTS = ("samples_seen", "energy", "dropped")


class SaliencyAccumulator(Metric):
    """Accumulate :func:`squared_gradients` batch by batch.

    :meth:`compute` sums them across processes. The arguments are those of
    :func:`squared_gradients`. The model is referred to, not owned: it is no submodule of the
    metric.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(3, 2), torch.randn(6, 3)
        >>> accumulator = SaliencyAccumulator(model)
        >>> accumulator.update(x[:4])
        >>> accumulator.update(x[4:])
        >>> torch.allclose(accumulator.compute()["weight"], squared_gradients(model, [x])["weight"])
        True
        >>> accumulator.samples
        6
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    samples_seen: Tensor
    energy: Tensor
    dropped: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        target: Target = "probability",
        likelihood: Likelihood = "categorical",
        tolerance: float = 0.0,
        forward: Forward | None = None,
        parameters: Iterable[str] | None = None,
        signs: RandomSigns | None = None,
        workspace: int = WORKSPACE,
    ) -> None:
        super().__init__()
        self._engine = Engine(
            model,
            target=target,
            likelihood=likelihood,
            tolerance=tolerance,
            forward=forward,
            parameters=parameters,
            signs=signs,
            workspace=workspace,
        )
        self.names = list(self._engine.parameters)
        with torch.inference_mode(False):  # sums that the scoring, outside of it, may write to
            for i, parameter in enumerate(self._engine.parameters.values()):
                zeros = in_score_precision(torch.zeros_like(parameter, requires_grad=False))
                self._add_sum(f"sum_{i}", zeros)
                if signs is not None:
                    self._add_sum(f"variance_{i}", torch.zeros_like(zeros))
            for name in COUNTS:
                self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")

    def _add_sum(self, name: str, zeros: Tensor) -> None:
        self.add_state(name, zeros, "sum")
        # What reset() clones: a single zero, not a copy as large as the scores.
        self._defaults[name] = zeros.new_zeros(()).expand(zeros.shape)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()
    ) -> nn.Module:
        """Move the states, but for counts in float64 to a device that has none."""
        device = fn(torch.zeros(())).device
        stay = () if precise_device(device) == device else COUNTS
        return super()._apply(fn, (*exclude_state, *stay))

    def reset(self) -> None:
        """Start from nothing."""
        with torch.inference_mode(False):
            super().reset()

    def check(self, batch: Any) -> list[str]:
        """Raise what scoring this batch would raise, at the cost of running two of its samples.

        Returns:
            The parameters without a gradient path from the outputs of these two. Other samples may
            have one (experts); if none has, :meth:`compute` raises.
        """
        return self._engine.check(batch)

    def update(self, batch: Any, logits: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            batch: N samples in the form that ``forward`` reads.
            logits: (N, ...) the model's output for this batch where it is known already; saves a
                forward pass.
        """
        if self._engine.signs is None:
            report = self._engine.add(batch, self.sums, logits)
        else:
            variances = {name: getattr(self, f"variance_{i}") for i, name in enumerate(self.names)}
            report = self._engine.add_estimate(batch, self.sums, variances)
        self.samples_seen += report.samples
        self.energy += report.energy
        self.dropped += report.dropped

    def compute(self) -> Scores:
        """Return the sums over everything seen, on all processes.

        Raises:
            SaliencyError: If a parameter never had a gradient path to the output.
            NonFiniteScoresError: If a score is not finite.
        """
        return {name: total.clone() for name, total in self.checked_sums().items()}

    def checked_sums(self) -> Scores:
        """Return the running sums of this process, not copied, for who needs nothing else of it.

        Raises:
            SaliencyError: As :meth:`compute`.
            NonFiniteScoresError: As :meth:`compute`.
        """
        self._engine.check_reached()
        check_scores(self.sums)
        return self.sums

    def standard_error(self) -> Scores:
        """Return the standard error of this process's estimate, shaped like the scores.

        It is zero where they are exact.
        """
        if self._engine.signs is None:
            return {name: torch.zeros_like(total) for name, total in self.sums.items()}
        return {name: getattr(self, f"variance_{i}").sqrt() for i, name in enumerate(self.names)}

    @property
    def sums(self) -> Scores:
        """The running sums of this process, not copied."""
        return {name: getattr(self, f"sum_{i}") for i, name in enumerate(self.names)}

    @property
    def samples(self) -> int:
        """How many samples this process has added since the last reset."""
        return int(self.samples_seen)

    @property
    def dropped_energy(self) -> float:
        """The share of the output energy that was left out, at most ``tolerance``."""
        return float(self.dropped / self.energy) if float(self.energy) else 0.0
