"""One batch -> its squared gradients, added to running sums.

The order of work for a batch: logits (the validation step's own where given, else one cheap pass)
say which rows of which samples carry the score; samples are grouped by how many rows they need;
each group is run forward once under :class:`~lightning_prune.saliency.capture.Capture` and backward
once a row; each captured call's rule turns output gradients into squared per-sample gradients.
Which of these shortcuts is taken is chosen by cost; the number computed is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood
from lightning_prune.exceptions import SaliencyError
from lightning_prune.passes.batches import (
    batch_size,
    default_forward,
    outside_inference_mode,
    read_labels,
    take_samples,
    unwrap_logits,
)
from lightning_prune.passes.precision import precise_device
from lightning_prune.saliency.capture import Capture, backpropagate
from lightning_prune.saliency.given_logits import GivenLogits, usable
from lightning_prune.saliency.grouping import group_rows, whole_batch
from lightning_prune.saliency.head import head_weight, row_squares, squares_below
from lightning_prune.saliency.parameters import named_tensors
from lightning_prune.saliency.preparation import explained, prepared
from lightning_prune.saliency.proof import Plans
from lightning_prune.saliency.registry import in_score_precision
from lightning_prune.saliency.rows import Rows
from lightning_prune.saliency.rules import generic
from lightning_prune.saliency.rules.linear import Linear
from lightning_prune.saliency.signs import RandomSigns, check_signs, random_rows
from lightning_prune.saliency.target import (
    Target,
    check_finite,
    check_labels,
    check_target,
    class_rows,
    output_rows,
)
from lightning_prune.saliency.uses import Uses

WORKSPACE = 256 * 2**20
"""Default work space in bytes beyond the model, its activations and the scores."""

ROUND_OFF = 4.0
"""At tolerance 0 the share of energy left out, in units of epsilon: less than what one backward
pass after the other loses to rounding (LeNet-5, ResNet-20 and an encoder in float32: 14-75)."""

SELECTION_WORK = 50_000
"""Multiply-accumulates a row from which on choosing rows costs less than taking all of them."""

MANY_ROWS = 64
"""With more rows a sample than this, rows are always chosen."""


@dataclass(frozen=True)
class BatchReport:
    """What one batch added.

    Attributes:
        samples: How many samples it held.
        energy: The rows' squared norm.
        dropped: The part of it that was left out.
    """

    samples: int
    energy: float
    dropped: float


class Engine:
    """Squared gradients of a model's outputs, batch by batch.

    Args:
        model: Any module; a compiled one is scored through the module it was compiled from.
        target: See :mod:`lightning_prune.saliency.target`.
        likelihood: Likewise.
        tolerance: Share of the rows' energy that may be left out.
        forward: ``forward(module, batch) -> logits``; None reads ``x``, ``(x, y)`` and dicts.
        parameters: Names to score; None for all of them.
        signs: Estimate from random signs instead of being exact; see
            :mod:`lightning_prune.saliency.signs`.
        workspace: Bytes of work space.

    Raises:
        ValueError: If a name is unknown, no parameter is left, or tolerance is outside [0, 1).
    """

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
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"Expected argument `tolerance` to be in [0, 1) but got {tolerance}.")
        check_target(target, likelihood)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.target = target
        self.likelihood = likelihood
        self.tolerance = tolerance
        self.forward = default_forward if forward is None else forward
        self.workspace = workspace
        check_signs(signs)
        self.signs = signs
        self._generator = None if signs is None else signs.generator()
        self.parameters = named_tensors(model, parameters)
        self._plans = Plans(self._run, self.parameters, workspace)
        self._misled = False  # by given logits: from then on none are used

    def check(self, batch: Any) -> list[str]:
        """Raise what scoring this batch would raise, by two samples; return what is not reached."""
        with prepared(self.model, self.parameters), explained(self.model, self._run, batch):
            batch = outside_inference_mode(batch)
            self._plans.make(batch)
            first = take_samples(batch, torch.tensor([0]))
            self._rows(self._run(first), first)
        return self._plans.unreached

    def add(
        self, batch: Any, totals: Mapping[str, Tensor], logits: Tensor | None = None
    ) -> BatchReport:
        """Add the batch's squared gradients to ``totals``, in place.

        Args:
            batch: N samples in the form that ``forward`` reads.
            totals: Full name -> running sum.
            logits: The model's output for this batch where it is known already, in the weights'
                precision. Where it proves to be wrong it is not used.
        """
        if not batch_size(batch):
            return BatchReport(0, 0.0, 0.0)
        with prepared(self.model, self.parameters), explained(self.model, self._run, batch):
            batch = outside_inference_mode(batch)
            self._plans.prepare(batch)
            if self._plans.latest.head and self._sums_over_classes:
                energy = self._add_by_head(batch, totals)
                if energy is not None:
                    return BatchReport(batch_size(batch), energy, 0.0)
            if not self._selects():
                return BatchReport(batch_size(batch), *self._add_all_rows(batch, totals))
            given = None if self._misled else usable(logits, batch_size(batch))
            if given is None:
                return BatchReport(batch_size(batch), *self._add_chosen_rows(batch, totals))
            added = self._add_by_given(batch, totals, GivenLogits(given))
            return BatchReport(batch_size(batch), *added)

    def add_estimate(
        self, batch: Any, totals: Mapping[str, Tensor], variances: Mapping[str, Tensor]
    ) -> BatchReport:
        """Add an unbiased estimate of the batch's squared gradients, and its variance, in place.

        The arguments are those of :meth:`add`. Needs ``signs``.
        """
        if self.signs is None or self._generator is None:
            raise ValueError(
                "Expected argument `signs` to say how many draws to make, but it is None."
            )
        if not batch_size(batch):
            return BatchReport(0, 0.0, 0.0)
        draws = self.signs.draws
        with prepared(self.model, self.parameters), explained(self.model, self._run, batch):
            batch = outside_inference_mode(batch)
            self._plans.prepare(batch)
            means = {name: torch.zeros_like(total) for name, total in totals.items()}
            spreads = {name: torch.zeros_like(total) for name, total in totals.items()}
            for count in range(1, draws + 1):
                with Capture(self.parameters) as capture:
                    logits = self._run(batch)
                capture.close()
                rows = random_rows(
                    logits, self.target, self.likelihood, read_labels(batch), self._generator
                )
                one = {name: torch.zeros_like(total) for name, total in totals.items()}
                self._backward(batch, capture, logits, rows[None], one)
                # Welford's running mean and sum of squared differences.
                for name, value in one.items():
                    before = value - means[name]
                    means[name].add_(before, alpha=1 / count)
                    spreads[name].addcmul_(before, value - means[name])
        for name, mean in means.items():
            totals[name].add_(mean)
            variances[name].add_(spreads[name], alpha=1 / (draws * (draws - 1)))
        return BatchReport(batch_size(batch), 0.0, 0.0)

    def check_reached(self) -> None:
        """Raise SaliencyError if some parameter never had a gradient path to the output."""
        if missing := self._plans.unreached:
            raise SaliencyError(
                f"Expected every parameter to have a gradient path to the output, but {missing} "
                f"{'has' if len(missing) == 1 else 'have'} none. Leave them out with "
                "`parameters=[...]`, or return the output that uses them from `forward`."
            )

    def _run(self, batch: Any) -> Tensor:
        logits = unwrap_logits(self.forward(self.model, batch))
        expected = batch_size(batch)
        if logits.ndim == 0 or logits.shape[0] != expected:
            raise SaliencyError(
                f"Expected logits with one row a sample, (N, ...) with N = {expected}, "
                f"but got {tuple(logits.shape)}."
            )
        return logits

    def _rows(self, logits: Tensor, batch: Any, rotate: bool = True) -> Rows:
        round_off = ROUND_OFF * torch.finfo(in_score_precision(logits).dtype).eps
        tolerance = max(self.tolerance, round_off)
        return output_rows(
            logits,
            target=self.target,
            likelihood=self.likelihood,
            tolerance=tolerance,
            labels=read_labels(batch),
            rotate=rotate,
        )

    @property
    def _sums_over_classes(self) -> bool:
        return self.likelihood == "categorical" and self.target in ("probability", "fisher")

    def _selects(self) -> bool:
        """Tell whether rows are chosen from logits first, or all of them are backpropagated.

        Decided by cost.
        """
        plan = self._plans.latest
        rows = plan.output.numel()
        if self.likelihood == "categorical":
            rows = rows if self._sums_over_classes else rows // plan.output[0]
        return rows > MANY_ROWS or (
            (rows > 1 or self.tolerance > 0) and (bool(plan.generic) or plan.work > SELECTION_WORK)
        )

    def _add_all_rows(self, batch: Any, totals: Mapping[str, Tensor]) -> tuple[float, float]:
        """Add the batch where rows cost next to nothing; return its energy and what was dropped."""
        with Capture(self.parameters) as capture:
            logits = self._run(batch)
        capture.close()
        if logits.ndim == 2 and self._sums_over_classes:
            gradients = class_rows(logits, self.target)
            energy, dropped = float(gradients.square().sum()), 0.0
        else:
            rows = self._rows(logits, batch, rotate=False)
            gradients = whole_batch(rows).gradients(logits)
            energy, dropped = rows.total, rows.dropped
        self._backward(batch, capture, logits, gradients, totals)
        return energy, dropped

    def _add_by_head(self, batch: Any, totals: Mapping[str, Tensor]) -> float | None:
        """Add the batch with all class rows at once; return its energy, None if that cannot be."""
        with Capture(self.parameters) as capture:
            logits = self._run(batch)
        capture.close()
        plan = self._plans.find(capture, logits)
        weight, below = head_weight(capture, logits), capture.last_input
        if plan is None or not plan.head or weight is None or below is None:
            return None
        check_finite(logits)
        check_labels(logits, None, self.target, self.likelihood)
        softmax, squares = row_squares(in_score_precision(logits.detach()), self.target)
        head = capture.calls[-1]
        sums = {role: totals[name] for role, name in head.names.items()}
        Linear.add_squares(squares, in_score_precision(head.arguments["input"]), sums)
        names = plan.closed - set(head.names.values())
        calls, layouts = capture.calls[:-1], plan.layouts[:-1]
        uses = Uses(calls, layouts, names, len(logits), self.workspace)
        if uses.indices:
            weight = in_score_precision(weight)
            direction = squares_below(softmax, weight, self.target, self.workspace).sqrt_()
            uses.add(backpropagate(below, uses.edges, direction.to(below.dtype)), totals)
            uses.finish(totals)
        squares = squares.to(precise_device(squares.device))
        return float(squares.sum(dtype=torch.float64))

    def _add_by_given(
        self, batch: Any, totals: Mapping[str, Tensor], given: GivenLogits
    ) -> tuple[float, float]:
        """Add the rows that carry the score by given logits, or by found ones if those are wrong.

        Aside first: by wrong logits too much may be left out of the right samples as well.
        """
        aside = {name: torch.zeros_like(total) for name, total in totals.items()}
        added = self._add_chosen_rows(batch, aside, given)
        if not given.right:
            self._misled = True
            return self._add_chosen_rows(batch, totals)
        for name, total in totals.items():
            total.add_(aside[name])
        return added

    def _add_chosen_rows(
        self, batch: Any, totals: Mapping[str, Tensor], given: GivenLogits | None = None
    ) -> tuple[float, float]:
        """Add the rows that carry the score; return the batch's energy and what was dropped."""
        if given is None:
            with torch.no_grad():
                logits = self._run(batch)
        else:
            logits = given.logits
        rows = self._rows(logits.detach(), batch)
        plan = self._plans.latest
        for group in group_rows(rows, self.workspace, plan.launch, plan.width, plan.alone):
            part = take_samples(batch, group.samples)
            with Capture(self.parameters) as capture:
                found = self._run(part)
            capture.close()
            if given is not None and not given.compare(group.samples, found):
                break  # an output of something else
            self._backward(part, capture, found, group.gradients(found), totals)
        return rows.total, rows.dropped

    def _backward(
        self,
        batch: Any,
        capture: Capture,
        logits: Tensor,
        rows: Tensor,
        totals: Mapping[str, Tensor],
    ) -> None:
        """Backpropagate rows (K, N, ...) and hand the gradients to the rules."""
        plan = self._plans.settle(batch, capture, logits)
        uses = Uses(
            capture.calls, plan.layouts, plan.closed, len(logits), self.workspace, len(rows)
        )
        for k in range(len(rows) if uses.indices else 0):
            more = k + 1 < len(rows)
            found = backpropagate(logits, uses.edges, rows[k], keep=more)
            uses.add(found, totals)
        uses.finish(totals)
        if plan.generic:
            others = {name: self.parameters[name] for name in plan.generic}
            self._plans.reached |= generic.add_squared_gradients(
                self._run, batch, rows, logits, others, totals
            )
